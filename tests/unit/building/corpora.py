"""Chunked documents made of their ids alone, and their way through pages to the files of a partition."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retro_ray.building.assemble import assemble_partition
from retro_ray.building.pages import PageMaker, write_contents, write_page
from retro_ray.database.format import Partition
from retro_ray.database.split import Split, document_hash
from retro_ray.text.chunking import ChunkedDocument

M = 4
VOCAB_SIZE = 300
KEY_DIM = 2


def make_document(name: str, num_tokens: int) -> ChunkedDocument:
    """A document of tokens drawn from its name."""
    num_chunks = -(-num_tokens // M)
    tokens = np.zeros(num_chunks * M, np.int64)
    tokens[:num_tokens] = np.random.default_rng(document_hash(name)).integers(1, VOCAB_SIZE, num_tokens)
    lengths = np.full(num_chunks, M, np.int64)
    lengths[-1] = num_tokens - (num_chunks - 1) * M
    return ChunkedDocument(name, f"Title of {name}", "made.txt", tokens.reshape(-1, M), lengths, 3 * lengths)


def keys_of(tokens: np.ndarray) -> np.ndarray:
    """float32 [n, 2]: a key that its chunk determines."""
    return np.stack([tokens.sum(1), tokens[:, 0]], axis=1).astype(np.float32)


def split_of(names: list[str], num_shards: int, validation_share: float, seed: int = 0) -> Split:
    return Split.of(np.array([document_hash(name) for name in names], np.uint64), num_shards, validation_share, seed)


@dataclass
class Pages:
    """Units of documents, paged into a folder."""

    folder: Path
    units: list[list[ChunkedDocument]]
    split: Split

    def write(self, *, skip_existing: bool = False, only_first: int | None = None) -> int:
        """Page all units; or stop, as if killed, after some pages. Returns the number of pages written."""
        num_written = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        for number, documents in enumerate(self.units):
            maker = PageMaker(number, self.split, VOCAB_SIZE)
            for page in maker.pages(documents):
                if skip_existing and page.path(self.folder).exists():
                    continue
                if num_written == only_first:
                    return num_written
                tokens = page.chunks["tokens"].combine_chunks().flatten().to_numpy().reshape(-1, M)
                write_page(self.folder, page, keys_of(tokens))
                num_written += 1
            write_contents(self.folder, number, maker.contents)
        return num_written

    def assemble(self, build: Path) -> dict[str, Partition]:
        """All partitions that have chunks."""
        units = list(range(len(self.units)))
        made = {
            name: assemble_partition(self.folder, units, name, build / name, M, VOCAB_SIZE, KEY_DIM)
            for name in self.split.partitions
        }
        return {name: partition for name, partition in made.items() if partition is not None}
