"""Arrow IPC files as memory-mapped tables of fixed-width rows.

Written as a stream in batches of equal size, so that neither writer nor reader ever holds a whole
file, and so that row -> (batch, offset) is arithmetic.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa

from retro_ray.errors import DatabaseError

ROWS_PER_BATCH = 1 << 16


class ArrowRowWriter:
    """Writes tables of one schema to a file that appears, whole, when the writer closes."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path = path
        self._temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        self._schema = schema
        self._pending: list[pa.Table] = []
        self._num_pending_rows = 0
        self._sink = pa.OSFile(str(self._temporary), "wb")
        self._writer = pa.ipc.new_file(self._sink, schema)
        self.num_rows = 0

    def write(self, table: pa.Table) -> None:
        self._pending.append(table.cast(self._schema))
        self._num_pending_rows += table.num_rows
        self.num_rows += table.num_rows
        if self._num_pending_rows >= ROWS_PER_BATCH:
            self._flush(keep_rows=self._num_pending_rows % ROWS_PER_BATCH)

    def _flush(self, keep_rows: int) -> None:
        rows = pa.concat_tables(self._pending).combine_chunks()
        num_full = rows.num_rows - keep_rows
        for batch in rows.slice(0, num_full).to_batches(max_chunksize=ROWS_PER_BATCH):
            self._writer.write_batch(batch)
        self._pending = [rows.slice(num_full)]
        self._num_pending_rows = keep_rows

    def __enter__(self) -> ArrowRowWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self._num_pending_rows:
                    self._flush(keep_rows=0)
                self._writer.close()
                self._sink.close()
                os.replace(self._temporary, self._path)
        finally:
            self._sink.close()
            self._temporary.unlink(missing_ok=True)


def write_rows(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> int:
    """Write tables as one file; returns the number of rows."""
    with ArrowRowWriter(path, schema) as writer:
        for table in tables:
            writer.write(table)
    return writer.num_rows


class ArrowRows:
    """A memory-mapped file of fixed-width rows, read by row number."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = pa.ipc.open_file(pa.memory_map(str(path)))
        except (OSError, pa.ArrowInvalid) as error:
            raise DatabaseError(f"cannot read {path} ({error}): check it with `python -m retro_ray verify`") from error
        batches = [self._file.get_batch(i) for i in range(self._file.num_record_batches)]
        self.num_rows = sum(batch.num_rows for batch in batches)
        self._schema = self._file.schema
        batches = batches or [pa.RecordBatch.from_pylist([], schema=self._schema)]
        self._columns = {name: [_as_numpy(batch.column(name)) for batch in batches] for name in self._schema.names}

    def gather(self, column: str, rows: np.ndarray) -> np.ndarray:
        """The values of `rows` (int64 [n], each in 0..num_rows-1): a copy, [n] or [n, width]."""
        rows = np.asarray(rows, dtype=np.int64)
        views = self._columns[column]
        if len(views) == 1:
            return views[0][rows]
        batch_of_row, offset = np.divmod(rows, ROWS_PER_BATCH)
        out = np.empty((len(rows), *self._width(column)), self._dtype(column))
        for batch in np.unique(batch_of_row):
            chosen = batch_of_row == batch
            out[chosen] = views[batch][offset[chosen]]
        return out

    def slice(self, column: str, start: int, stop: int) -> np.ndarray:
        """The values of rows start..stop-1."""
        return self.gather(column, np.arange(start, min(stop, self.num_rows)))

    def column(self, column: str) -> np.ndarray:
        """A whole column; without a copy where the file has one batch."""
        views = self._columns[column]
        return views[0] if len(views) == 1 else self.slice(column, 0, self.num_rows)

    def _width(self, column: str) -> tuple[int, ...]:
        kind = self._schema.field(column).type
        return (kind.list_size,) if pa.types.is_fixed_size_list(kind) else ()

    def _dtype(self, column: str) -> np.dtype:
        kind = self._schema.field(column).type
        return np.dtype((kind.value_type if pa.types.is_fixed_size_list(kind) else kind).to_pandas_dtype())


def _as_numpy(array: pa.Array) -> np.ndarray:
    if isinstance(array, pa.FixedSizeListArray):
        return array.flatten().to_numpy(zero_copy_only=True).reshape(len(array), array.type.list_size)
    return array.to_numpy(zero_copy_only=True)


def fixed_size_lists(values: np.ndarray, kind: pa.DataType) -> pa.FixedSizeListArray:
    """A 2-D array [n, width] as an Arrow column of fixed-size lists of `kind`."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1), type=kind)
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
