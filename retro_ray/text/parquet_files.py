"""Rows of Parquet files, by batches of a few."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from retro_ray.config import CorpusConfig
from retro_ray.errors import InputError
from retro_ray.text.byte_stream import DamagedFileError

ROWS_PER_BATCH = 256


def checked_metadata(path: str, config: CorpusConfig) -> pq.FileMetaData:
    """The footer of a Parquet file whose columns are those that the settings name.

    Raises:
        DamagedFileError: the file is not Parquet.
        InputError: it lacks the text or the id column, or its text is no text.
    """
    with fsspec.open(path, "rb") as file, _damage_reported():
        parquet = pq.ParquetFile(file)
        metadata, schema = parquet.metadata, parquet.schema_arrow
    for setting, column in (("--text-column", config.text_column), ("--id-column", config.id_column)):
        if column is not None and column not in schema.names:
            raise InputError(f"{path} has no column {column!r} ({setting}); its columns are: {', '.join(schema.names)}")
    text_type = schema.field(config.text_column).type
    if not _is_text(text_type):
        raise InputError(
            f"column {config.text_column!r} of {path} holds {text_type}, not text: name another --text-column; "
            f"the columns are: {', '.join(schema.names)}"
        )
    return metadata


def iter_rows(
    path: str, row_groups: tuple[int, int] | None, config: CorpusConfig
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row counted from 1, values of the columns that a document is made of); text as bytes or None.

    Raises:
        DamagedFileError: the file is not Parquet, or its data is damaged from here on.
    """
    with fsspec.open(path, "rb") as file:
        with _damage_reported():
            parquet = pq.ParquetFile(file)
        first, end = row_groups or (0, parquet.num_row_groups)
        row = sum(parquet.metadata.row_group(group).num_rows for group in range(first))
        wanted = (config.text_column, config.id_column or "id", config.title_column)
        columns = [name for name in dict.fromkeys(wanted) if name in parquet.schema_arrow.names]
        batches = parquet.iter_batches(
            batch_size=ROWS_PER_BATCH, row_groups=range(first, end), columns=columns, use_threads=False
        )
        while True:
            with _damage_reported():
                batch = next(batches, None)
            if batch is None:
                return
            values = {name: _python_values(batch.column(name)) for name in columns}
            for at in range(batch.num_rows):
                row += 1
                yield row, {name: column[at] for name, column in values.items()}


def _python_values(column: pa.Array) -> list[Any]:
    """Strings as bytes: Parquet does not promise that they are UTF-8, and one bad row must not take its batch along."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()  # pyright: ignore[reportAttributeAccessIssue]
    if _is_text(column.type):
        column = column.cast(pa.large_binary())
    return column.to_pylist()


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    tests = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_binary_view,
    )
    return any(test(kind) for test in tests)


@contextmanager
def _damage_reported() -> Iterator[None]:
    try:
        yield
    except pa.ArrowInvalid as error:
        raise DamagedFileError(_first_line(error)) from error
    except OSError as error:
        # Arrow reports damaged data as an OSError without a number; those of a disk or a network have
        # one or are of a class of their own, and must not pass for bad data.
        if type(error) is not OSError or error.errno is not None:
            raise
        raise DamagedFileError(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
