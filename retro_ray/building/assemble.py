"""From the pages of one partition to its files: chunks, keys and documents, row by row aligned."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retro_ray.building.pages import contents_path, documents_path, page_path
from retro_ray.building.segment_writer import SegmentWriter
from retro_ray.database.format import Partition, write_json_atomically
from retro_ray.index.keys import write_keys


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
    with SegmentWriter(folder, chunk_length, vocab_size) as writer:
        for unit in units:
            listed = documents_path(pages, unit, partition)
            if listed.exists():
                writer.add(pq.read_table(listed), map(_page_chunks, unit_pages(pages, unit, partition)))
    if not writer.num_chunks:
        shutil.rmtree(folder)
        return None
    paths = [path for unit in units for path in unit_pages(pages, unit, partition)]
    write_keys(folder / "keys.npy", map(_page_keys, paths), writer.num_chunks, key_dim)
    assembled = writer.partition(partition)
    write_json_atomically(summary, vars(assembled))
    return assembled


def _page_chunks(path: Path) -> pa.Table:
    return pq.read_table(path, columns=["tokens", "length", "num_bytes"])


def _page_keys(path: Path) -> np.ndarray:
    column = pq.read_table(path, columns=["key"])["key"].combine_chunks()
    return column.values.to_numpy().reshape(len(column), -1)
