"""Assembling partitions: what is empty, what was done before, and a fair sample of the keys."""

from pathlib import Path

import pytest

from tests.unit.building.corpora import Pages, make_document, split_of


def pages_of(folder: Path, num_documents: int, num_shards: int = 2, share: float = 0.0) -> Pages:
    documents = [make_document(f"{number}", 3 + 5 * number) for number in range(num_documents)]
    pages = Pages(folder / "pages", [documents], split_of([d.id for d in documents], num_shards, share))
    pages.write()
    return pages


def test_nothing_is_held_out(tmp_path: Path) -> None:
    pages = pages_of(tmp_path, 6)
    assert set(pages.assemble(tmp_path / "b1")) == {"shard-00000", "shard-00001"}
    assert not (tmp_path / "b1" / "validation").exists()


def test_fewer_documents_than_shards(tmp_path: Path) -> None:
    pages = pages_of(tmp_path, 2, num_shards=40)
    partitions = pages.assemble(tmp_path / "b1")
    assert sorted(partitions) == [f"shard-{shard:05d}" for shard in range(len(partitions))]
    assert sum(partition.num_documents for partition in partitions.values()) == 2


def test_an_assembled_partition_is_not_assembled_again(tmp_path: Path) -> None:
    pages = pages_of(tmp_path, 6)
    first = pages.assemble(tmp_path / "b1")
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.arrow")}
    assert pages.assemble(tmp_path / "b1") == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.arrow")} == stamps


def test_killed_between_its_files_a_partition_is_assembled_again(tmp_path: Path) -> None:
    pages = pages_of(tmp_path, 6)
    first = pages.assemble(tmp_path / "b1")
    contents = {path: path.read_bytes() for path in tmp_path.rglob("*.arrow")}
    for left in ("partition.json", "documents.arrow"):
        (tmp_path / "b1" / "shard-00000" / left).unlink()
    assert pages.assemble(tmp_path / "b1") == first
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.arrow")} == contents


def test_a_missing_page_ends_the_assembly_and_leaves_no_torn_file(tmp_path: Path) -> None:
    pages = pages_of(tmp_path, 6, num_shards=1)
    next(pages.folder.rglob("*-page-*.parquet")).unlink()
    with pytest.raises(FileNotFoundError):
        pages.assemble(tmp_path / "b1")
    assert [path for path in (tmp_path / "b1").rglob("*") if path.is_file()] == []
