"""The two stages that Ray Data runs over the input: units to pages, pages to pages with keys.

Plain callables over batches (dicts of numpy arrays), as `map_batches` calls them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from retro_ray.config import CorpusConfig
from retro_ray.database.pages import (
    Page,
    PageMaker,
    contents_path,
    page_path,
    write_contents,
    write_page,
)
from retro_ray.database.reading import chosen_records
from retro_ray.database.split import Split
from retro_ray.embedding import ChunkEmbedder
from retro_ray.text.chunking import ChunkedDocument, chunk_document
from retro_ray.text.corpus import ReadUnit, SkippedRecord
from retro_ray.text.tokenizer import TextTokenizer

Batch = dict[str, np.ndarray]


def unit_is_finished(pages: Path, unit: int) -> bool:
    """Whether a unit was chunked and each of its pages is on disk."""
    path = contents_path(pages, unit)
    if not path.exists():
        return False
    num_pages: dict[str, int] = json.loads(path.read_text())
    return all(
        page_path(pages, unit, partition, number).exists()
        for partition, count in num_pages.items()
        for number in range(count)
    )


def chunk_units(
    batch: Batch, pages: Path, corpus: CorpusConfig, split: Split, tokenizer_folder: Path, chunk_length: int
) -> Iterator[Batch]:
    """Read units and yield their pages, leaving out the pages that an earlier run finished."""
    tokenizer = TextTokenizer.load(tokenizer_folder)
    for content in batch["unit"]:
        unit = ReadUnit.from_dict(json.loads(str(content)))
        maker = PageMaker(unit.index, split, tokenizer.vocab_size)
        for page in maker.pages(_chunked_documents(unit, corpus, tokenizer, chunk_length)):
            if not page.path(pages).exists():
                yield _page_to_batch(page)
        write_contents(pages, unit.index, maker.contents)


def _chunked_documents(
    unit: ReadUnit, corpus: CorpusConfig, tokenizer: TextTokenizer, chunk_length: int
) -> Iterator[ChunkedDocument]:
    for record in chosen_records(unit, corpus):
        if not isinstance(record, SkippedRecord):  # the survey has counted these
            yield chunk_document(record, tokenizer, chunk_length)


class PageEmbedder:
    """Embeds pages and writes them; yields how many chunks each had."""

    def __init__(self, pages: Path, tokenizer: Path, embedder: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self._pages = pages
        self._tokenizer = TextTokenizer.load(tokenizer)
        self._embedder = ChunkEmbedder(embedder)

    def __call__(self, batch: Batch) -> Batch:
        pages = [_page_from_row(batch, row) for row in range(len(batch["unit"]))]
        for page in pages:
            write_page(self._pages, page, self._embedder.embed(self._texts(page)))
        return {"num_chunks": np.array([page.chunks.num_rows for page in pages])}

    def _texts(self, page: Page) -> list[str]:
        """The text form of chunks: their real tokens decoded, without the start token."""
        column = page.chunks["tokens"].combine_chunks()
        tokens = column.flatten().to_numpy().reshape(page.chunks.num_rows, -1)
        lengths = page.chunks["length"].to_pylist()
        return self._tokenizer.decode_batch([row[:length] for row, length in zip(tokens, lengths, strict=True)])


def _page_to_batch(page: Page) -> Batch:
    """A batch of one row. A row is never divided, so a page stays whole however blocks are cut."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, page.chunks.schema) as writer:
        writer.write_table(page.chunks)
    chunks = np.empty(1, object)
    chunks[0] = sink.getvalue().to_pybytes()
    return {
        "unit": np.array([page.unit]),
        "partition": np.array([page.partition]),
        "number": np.array([page.number]),
        "chunks": chunks,
    }


def _page_from_row(batch: Batch, row: int) -> Page:
    chunks = pa.ipc.open_stream(batch["chunks"][row]).read_all()
    return Page(int(batch["unit"][row]), str(batch["partition"][row]), int(batch["number"][row]), chunks)
