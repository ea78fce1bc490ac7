"""Documents that were deleted but still stand in their segments, until the database is compacted."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from retro_ray.database.arrow_rows import write_rows
from retro_ray.database.format import DELETED_SCHEMA
from retro_ray.errors import DatabaseError


class DeletedDocuments:
    """Which chunks of a database belong to deleted documents, whose text nobody may see again.

    Args:
        table: DELETED_SCHEMA, ascending by `first_chunk_id`; no two ranges overlap.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    @classmethod
    def none(cls) -> DeletedDocuments:
        return cls(DELETED_SCHEMA.empty_table())

    @classmethod
    def read(cls, path: Path) -> DeletedDocuments:
        """The deletions listed in a file.

        Raises:
            DatabaseError: it is missing or damaged.
        """
        try:
            with pa.ipc.open_file(path) as file:
                return cls(file.read_all())
        except (OSError, pa.ArrowInvalid) as error:
            raise DatabaseError(f"cannot read {path} ({error}): check it with `python -m retro_ray verify`") from error

    def write(self, path: Path) -> None:
        write_rows(path, DELETED_SCHEMA, [self.table])

    def with_more(self, table: pa.Table) -> DeletedDocuments:
        """These and the deletions of another table, in any order."""
        return DeletedDocuments(pa.concat_tables([self.table, table]).sort_by("first_chunk_id"))

    def __len__(self) -> int:
        return self.table.num_rows

    @cached_property
    def ranges(self) -> np.ndarray:
        """int64 [n, 2], ascending: first and last chunk_id of each deleted document."""
        columns = [self.table[name].to_numpy() for name in ("first_chunk_id", "last_chunk_id")]
        return np.stack(columns, axis=1).astype(np.int64)

    def contain(self, chunk_ids: np.ndarray) -> np.ndarray:
        """bool, of the shape of `chunk_ids` (int64): True for chunks of deleted documents."""
        chunk_ids = np.asarray(chunk_ids, np.int64)
        if not len(self):
            return np.zeros(chunk_ids.shape, bool)
        last_started = np.searchsorted(self.ranges[:, 0], chunk_ids, side="right") - 1
        return (last_started >= 0) & (chunk_ids <= self.ranges[last_started, 1])

    def rows(self, chunk_id_base: int, num_chunks: int) -> np.ndarray:
        """Which rows of the segment whose row 0 is `chunk_id_base` are deleted: bool [num_chunks]."""
        return self.contain(np.arange(chunk_id_base, chunk_id_base + num_chunks))
