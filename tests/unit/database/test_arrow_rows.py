"""Tables of fixed-width rows on disk read back as numpy would index them, and appear whole or not at all."""

import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retro_ray.database import arrow_rows
from retro_ray.database.arrow_rows import ArrowRows, ArrowRowWriter, fixed_size_lists, write_rows
from retro_ray.errors import DatabaseError

WIDTH = 3
SCHEMA = pa.schema({"vector": pa.list_(pa.uint16(), WIDTH), "number": pa.int32()})


def tables_of(sizes: list[int]) -> list[pa.Table]:
    """Tables of these numbers of rows; number counts them all, vector follows from it."""
    tables, start = [], 0
    for size in sizes:
        number = np.arange(start, start + size, dtype=np.int32)
        vector = number[:, None].astype(np.uint16) * 7 + np.arange(WIDTH, dtype=np.uint16)
        tables.append(pa.table({"vector": fixed_size_lists(vector, pa.uint16()), "number": number}))
        start += size
    return tables


def expected_vectors(numbers: np.ndarray) -> np.ndarray:
    return (numbers[:, None] * 7 + np.arange(WIDTH)).astype(np.uint16)


@given(
    sizes=st.lists(st.integers(0, 11), max_size=12),
    rows_per_batch=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_tables_gathered_in_any_order_equal_numpy(sizes: list[int], rows_per_batch: int, seed: int) -> None:
    num_rows = sum(sizes)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(arrow_rows, "ROWS_PER_BATCH", rows_per_batch):
        path = Path(folder) / "rows.arrow"
        assert write_rows(path, SCHEMA, tables_of(sizes)) == num_rows
        read = ArrowRows(path)
        assert read.num_rows == num_rows
        order = np.random.default_rng(seed).integers(0, num_rows, 20) if num_rows else np.empty(0, np.int64)
        numbers, vectors = read.gather("number", order), read.gather("vector", order)
        np.testing.assert_array_equal(numbers, order)
        np.testing.assert_array_equal(vectors, expected_vectors(order))
        assert (numbers.dtype, vectors.dtype, vectors.shape) == (np.int32, np.uint16, (len(order), WIDTH))
        np.testing.assert_array_equal(read.column("number"), np.arange(num_rows))
        np.testing.assert_array_equal(
            read.slice("number", num_rows // 3, num_rows + 5), np.arange(num_rows)[num_rows // 3 :]
        )


def test_a_file_without_rows_has_typed_columns(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.arrow", SCHEMA, [])
    read = ArrowRows(tmp_path / "rows.arrow")
    assert read.num_rows == 0
    assert read.column("vector").shape == (0, WIDTH)
    assert read.column("number").dtype == np.int32


def test_a_table_of_another_schema_is_refused(tmp_path: Path) -> None:
    with pytest.raises((ValueError, pa.ArrowInvalid)):
        write_rows(tmp_path / "rows.arrow", SCHEMA, [pa.table({"number": [1]})])
    assert list(tmp_path.iterdir()) == []


def test_a_crash_leaves_no_file(tmp_path: Path) -> None:
    def crashing():
        yield from tables_of([5])
        raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        write_rows(tmp_path / "rows.arrow", SCHEMA, crashing())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sizes", [[5], [5, 5]])
def test_a_failure_at_the_last_flush_leaves_the_old_file(tmp_path: Path, sizes: list[int]) -> None:
    path = tmp_path / "rows.arrow"
    write_rows(path, SCHEMA, tables_of([2]))
    before = path.read_bytes()
    full = OSError(28, "No space left on device")
    with mock.patch.object(ArrowRowWriter, "_flush", side_effect=full), pytest.raises(OSError, match="No space"):
        write_rows(path, SCHEMA, tables_of(sizes))
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "text"])
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "rows.arrow"
    write_rows(path, SCHEMA, tables_of([50]))
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": content[:-20], "text": b"not Arrow at all"}[damage])
    with pytest.raises(DatabaseError, match=str(path)) as caught:
        ArrowRows(path)
    assert "\n" not in str(caught.value)
