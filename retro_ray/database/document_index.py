"""Finding a document by its id without reading the others: sorted hashes beside the documents of a partition.

One uint64 array [2, n]: the hashes of the n ids, ascending, and the row of each in documents.arrow.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from retro_ray.database.split import document_hash
from retro_ray.errors import DatabaseError


def write_document_index(path: Path, hashes: np.ndarray) -> None:
    """Write the index of documents with these hashes, uint64 [n] in row order; it appears whole or not at all."""
    rows = np.argsort(hashes, kind="stable").astype(np.uint64)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            np.save(file, np.stack([hashes[rows], rows]), allow_pickle=False)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class DocumentIndex:
    """The index of one partition, memory-mapped.

    Raises:
        DatabaseError: its file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._hashes, self._rows = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DatabaseError(f"cannot read {path} ({error}): check it with `python -m retro_ray verify`") from error

    def rows(self, document_id: str) -> list[int]:
        """Documents whose id has the hash of this one: it alone, but for one case in 2**64."""
        wanted = np.uint64(document_hash(document_id))
        first, stop = (int(np.searchsorted(self._hashes, wanted, side=side)) for side in ("left", "right"))
        return self._rows[first:stop].tolist()
