"""Pages: the unit of work between reading and indexing, and what makes a build resumable.

A page is up to 1,024 chunks of one partition, in reading order. Which chunks stand on which page
depends on the input and the settings alone, never on how many workers there are or what was
interrupted: so a page that exists on disk is finished, and a resumed build embeds the same batches
and gets the same keys, to the bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retro_ray.building.segment_writer import chunk_rows, document_row
from retro_ray.database.arrow_rows import fixed_size_lists
from retro_ray.database.format import write_json_atomically
from retro_ray.database.split import Split
from retro_ray.text.chunking import ChunkedDocument

CHUNKS_PER_PAGE = 1024


@dataclass(frozen=True)
class Page:
    """Chunks of one unit and one partition: columns tokens, length, num_bytes."""

    unit: int
    partition: str
    number: int
    chunks: pa.Table

    def path(self, directory: Path) -> Path:
        return page_path(directory, self.unit, self.partition, self.number)


@dataclass
class UnitContents:
    """What a unit was chunked into: its documents and its number of pages, per partition."""

    documents: dict[str, list[dict]] = field(default_factory=dict)
    num_pages: dict[str, int] = field(default_factory=dict)


class PageMaker:
    """Spreads the documents of one unit over the pages of their partitions.

    Memory is bounded by one document and one unfinished page per partition.
    """

    def __init__(self, unit: int, split: Split, vocab_size: int) -> None:
        self._unit = unit
        self._split = split
        self._vocab_size = vocab_size
        self._pending: dict[str, list[pa.Table]] = {}
        self.contents = UnitContents()

    def pages(self, documents: Iterable[ChunkedDocument]) -> Iterator[Page]:
        """The pages of `documents`, each as soon as it is full; at the end those that are not."""
        for document in documents:
            partition = self._split.partition_of(document.id)
            yield from self._add(partition, document)
        for partition in sorted(self._pending):
            yield from self._cut(partition, at_least=1)

    def _add(self, partition: str, document: ChunkedDocument) -> Iterator[Page]:
        listed = self.contents.documents.setdefault(partition, [])
        rows = chunk_rows(document.tokens, document.lengths, document.num_bytes, self._vocab_size)
        listed.append(document_row(document))
        self._pending.setdefault(partition, []).append(rows)
        yield from self._cut(partition, at_least=CHUNKS_PER_PAGE)

    def _cut(self, partition: str, at_least: int) -> Iterator[Page]:
        if sum(table.num_rows for table in self._pending[partition]) < at_least:
            return
        rows = pa.concat_tables(self._pending[partition]).combine_chunks()
        start = 0
        while rows.num_rows - start >= at_least:
            number = self.contents.num_pages.get(partition, 0)
            self.contents.num_pages[partition] = number + 1
            yield Page(self._unit, partition, number, rows.slice(start, CHUNKS_PER_PAGE))
            start += CHUNKS_PER_PAGE
        self._pending[partition] = [rows.slice(start)]


def page_path(directory: Path, unit: int, partition: str, number: int) -> Path:
    """Where a page lies once it is finished."""
    return directory / partition / f"unit-{unit:06d}-page-{number:06d}.parquet"


def contents_path(directory: Path, unit: int) -> Path:
    """The file that says how many pages a unit has: it was chunked to its end."""
    return directory / f"unit-{unit:06d}.json"


def write_contents(directory: Path, unit: int, contents: UnitContents) -> None:
    """Documents per partition, then the JSON file that marks the unit as chunked."""
    for partition, documents in contents.documents.items():
        path = documents_path(directory, unit, partition)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_parquet(pa.Table.from_pylist(documents), path)
    write_json_atomically(contents_path(directory, unit), contents.num_pages)


def documents_path(directory: Path, unit: int, partition: str) -> Path:
    """The list of documents that a unit puts into a partition."""
    return directory / partition / f"unit-{unit:06d}-documents.parquet"


def write_page(directory: Path, page: Page, keys: np.ndarray) -> None:
    """Write a page with its keys, float32 [n, D]; it appears whole or not at all."""
    path = page.path(directory)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_parquet(page.chunks.append_column("key", fixed_size_lists(keys, pa.float32())), path)


def _write_parquet(table: pa.Table, path: Path) -> None:
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        pq.write_table(table, temporary, compression="zstd", use_dictionary=False)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
