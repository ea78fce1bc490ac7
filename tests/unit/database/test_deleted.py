"""Deleted documents against plain sets of chunk_ids."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retro_ray.database.deleted import DeletedDocuments
from retro_ray.database.format import DELETED_SCHEMA
from retro_ray.errors import DatabaseError


def deletions(ranges: list[tuple[int, int]]) -> DeletedDocuments:
    """Deletions of documents named by their order in `ranges`."""
    rows = [{"id": f"{i}", "first_chunk_id": first, "last_chunk_id": last} for i, (first, last) in enumerate(ranges)]
    return DeletedDocuments.none().with_more(pa.Table.from_pylist(rows, schema=DELETED_SCHEMA))


@st.composite
def disjoint_ranges(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Ranges of chunk_ids that touch or lie apart, in any order."""
    ranges, start = [], draw(st.integers(0, 3))
    for _ in range(draw(st.integers(0, 8))):
        last = start + draw(st.integers(0, 4))
        ranges.append((start, last))
        start = last + 1 + draw(st.integers(0, 3))
    return draw(st.permutations(ranges))


@given(ranges=disjoint_ranges(), base=st.integers(0, 20), num_chunks=st.integers(0, 30))
def test_chunks_of_deleted_documents(ranges: list[tuple[int, int]], base: int, num_chunks: int) -> None:
    expected = {chunk_id for first, last in ranges for chunk_id in range(first, last + 1)}
    deleted = deletions(ranges)
    chunk_ids = np.arange(-1, 77).reshape(2, 39)
    assert deleted.contain(chunk_ids).tolist() == [[chunk_id in expected for chunk_id in row] for row in chunk_ids]
    assert deleted.rows(base, num_chunks).tolist() == [base + row in expected for row in range(num_chunks)]
    assert deleted.ranges.tolist() == sorted(map(list, ranges))
    assert len(deleted) == len(ranges)


def test_deletions_survive_the_disk(tmp_path: Path) -> None:
    written = deletions([(7, 9), (0, 0)])
    written.write(tmp_path / "deleted.arrow")
    read = DeletedDocuments.read(tmp_path / "deleted.arrow")
    assert read.table.to_pylist() == written.table.to_pylist()
    assert [row["id"] for row in read.table.to_pylist()] == ["1", "0"]


@pytest.mark.parametrize("content", [None, b"", b"ARROW1"])
def test_a_damaged_list_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "deleted.arrow"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DatabaseError, match=str(path)):
        DeletedDocuments.read(path)
