"""From the pages of one partition to its files: chunks, keys and documents, row by row aligned."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retro_ray.database.arrow_rows import ArrowRowWriter, write_rows
from retro_ray.database.format import (
    DOCUMENTS_SCHEMA,
    Partition,
    chunks_schema,
    write_json_atomically,
)
from retro_ray.database.keys import write_keys
from retro_ray.database.pages import contents_path, documents_path, page_path


def unit_pages(pages: Path, unit: int, partition: str) -> list[Path]:
    """The pages of a chunked unit in one partition, in order."""
    num_pages = json.loads(contents_path(pages, unit).read_text()).get(partition, 0)
    return [page_path(pages, unit, partition, number) for number in range(num_pages)]


def assemble_partition(
    pages: Path, units: Sequence[int], partition: str, folder: Path, chunk_length: int, vocab_size: int, key_dim: int
) -> Partition | None:
    """Write one partition's files under `folder` from the pages of all units, page by page.

    Returns:
        What was written, with `chunk_id_base` -1 (known once all partitions are), or None where the
        partition has no chunks. A partition that was assembled before is not assembled again.
    """
    summary = folder / "partition.json"
    if summary.exists():
        return Partition(**json.loads(summary.read_text()))
    folder.mkdir(parents=True, exist_ok=True)
    num_tokens = num_rows = num_documents = 0
    chunks = ArrowRowWriter(folder / "chunks.arrow", chunks_schema(chunk_length, vocab_size))
    with chunks:
        for unit in units:
            for path in unit_pages(pages, unit, partition):
                page = pq.read_table(path, columns=["tokens", "length", "num_bytes", "document"])
                document = pa.array(page["document"].to_numpy() + num_documents, pa.int32())
                chunks.write(page.drop_columns(["document"]).append_column("document", document))
                num_tokens += int(page["length"].to_numpy().sum())
                num_rows += page.num_rows
            listed = documents_path(pages, unit, partition)
            num_documents += pq.read_metadata(listed).num_rows if listed.exists() else 0
    if not num_rows:
        shutil.rmtree(folder)
        return None
    paths = [path for unit in units for path in unit_pages(pages, unit, partition)]
    write_keys(folder / "keys.npy", map(_page_keys, paths), num_rows, key_dim)
    num_bytes = _write_documents(pages, units, partition, folder / "documents.arrow")
    assembled = Partition(
        name=partition,
        chunk_id_base=-1,
        num_documents=num_documents,
        num_chunks=num_rows,
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        folder=f"{folder.parent.name}/{partition}",
    )
    write_json_atomically(summary, vars(assembled))
    return assembled


def _page_keys(path: Path) -> np.ndarray:
    column = pq.read_table(path, columns=["key"])["key"].combine_chunks()
    return column.values.to_numpy().reshape(len(column), -1)


def _write_documents(pages: Path, units: Sequence[int], partition: str, path: Path) -> int:
    """The documents table of a partition; returns its UTF-8 bytes of text."""
    num_bytes = next_row = 0

    def tables() -> Iterator[pa.Table]:
        nonlocal num_bytes, next_row
        for unit in units:
            listed = documents_path(pages, unit, partition)
            if not listed.exists():
                continue
            table = pq.read_table(listed)
            num_chunks = table["num_chunks"].to_numpy()
            ends = next_row + np.cumsum(num_chunks)
            num_bytes += int(table["num_bytes"].to_numpy().sum())
            next_row = int(ends[-1])
            yield table.append_column("first_row", pa.array(ends - num_chunks)).select(DOCUMENTS_SCHEMA.names)

    write_rows(path, DOCUMENTS_SCHEMA, tables())
    return num_bytes
