"""Pages hold all chunks in order, depend on the input alone, and reassemble to the documents."""

import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_ray.building import pages as pages_module
from retro_ray.building.chunk_units import unit_is_finished
from retro_ray.building.pages import PageMaker
from retro_ray.database.store import ChunkStore
from tests.unit.building.corpora import M, Pages, keys_of, make_document, split_of

units_strategy = st.lists(st.lists(st.integers(1, 40), max_size=6), min_size=1, max_size=4)


def make_units(sizes: list[list[int]]) -> list[list]:
    return [[make_document(f"{u}/{d}", size) for d, size in enumerate(unit)] for u, unit in enumerate(sizes)]


@settings(max_examples=25)
@given(
    sizes=units_strategy.filter(lambda units: any(units)),
    num_shards=st.integers(1, 4),
    share=st.sampled_from([0.0, 0.3, 0.9]),
    per_page=st.integers(1, 7),
)
def test_assembled_pages_are_the_documents(
    sizes: list[list[int]], num_shards: int, share: float, per_page: int
) -> None:
    units = make_units(sizes)
    names = [document.id for unit in units for document in unit]
    split = split_of(names, num_shards, share)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(pages_module, "CHUNKS_PER_PAGE", per_page):
        pages = Pages(Path(folder) / "pages", units, split)
        pages.write()
        build = Path(folder) / "b1"
        partitions = pages.assemble(build)
        by_name = {document.id: document for unit in units for document in unit}
        seen = []
        for name, partition in partitions.items():
            assert partition.folder == f"b1/{name}"
            store = ChunkStore(Path(folder), partition, M)
            # In reading order, row after row.
            expected = [n for n in names if split.partition_of(n) == name]
            assert [store.document_ref(i).id for i in range(store.num_documents)] == expected
            seen += expected
            for number, document in enumerate(by_name[n] for n in expected):
                rows = np.arange(*store.document_rows(number))
                np.testing.assert_array_equal(store.tokens(rows), document.tokens)
                np.testing.assert_array_equal(store.lengths(rows), document.lengths)
                np.testing.assert_array_equal(store.num_bytes(rows), document.num_bytes)
                np.testing.assert_array_equal(store.keys[rows], keys_of(document.tokens))
                assert set(store.document_of(rows)) == {number}
                assert store.document_ref(number).title == document.title
                assert store.document_num_bytes[number] == document.num_bytes.sum()
            assert store.document_num_chunks.sum() == partition.num_chunks == store.num_chunks
            assert partition.num_tokens == sum(by_name[n].lengths.sum() for n in expected)
            assert partition.num_bytes == sum(by_name[n].num_bytes.sum() for n in expected)
        assert sorted(seen) == sorted(names)


def page_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@settings(max_examples=12)
@given(sizes=units_strategy.filter(lambda units: sum(map(sum, units)) > 30), stop_at=st.integers(0, 6))
def test_pages_do_not_depend_on_interruptions(sizes: list[list[int]], stop_at: int) -> None:
    """Killed after any page and run again, the same files to the byte; finished pages are not written again."""
    units = make_units(sizes)
    split = split_of([document.id for unit in units for document in unit], 2, 0.2)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(pages_module, "CHUNKS_PER_PAGE", 3):
        undisturbed = Pages(Path(folder) / "undisturbed", units, split)
        num_pages = undisturbed.write()
        killed = Pages(Path(folder) / "killed", units, split)
        num_before = killed.write(only_first=stop_at)
        assert killed.write(skip_existing=True) == num_pages - num_before
        assert page_files(killed.folder) == page_files(undisturbed.folder)


def test_pages_are_bounded_and_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_module, "CHUNKS_PER_PAGE", 5)
    documents = [make_document("long", 4 * 23), make_document("short", 3)]
    pages = list(PageMaker(0, split_of(["long", "short"], 1, 0.0), 300).pages(iter(documents)))
    assert [(page.number, page.chunks.num_rows) for page in pages] == [(0, 5), (1, 5), (2, 5), (3, 5), (4, 4)]


def test_a_page_comes_before_the_next_document_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by a document and a page, whatever the unit holds."""
    monkeypatch.setattr(pages_module, "CHUNKS_PER_PAGE", 2)
    read: list[str] = []

    def documents():
        for number in range(3):
            read.append(f"{number}")
            yield make_document(f"{number}", 8)

    pages = PageMaker(0, split_of(["0", "1", "2"], 1, 0.0), 300).pages(documents())
    next(pages)
    assert read == ["0"]


def test_a_unit_is_finished_with_its_last_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_module, "CHUNKS_PER_PAGE", 2)
    pages = Pages(tmp_path, [[make_document("a", 20)], []], split_of(["a"], 1, 0.0))
    assert not unit_is_finished(tmp_path, 0)
    pages.write()
    assert unit_is_finished(tmp_path, 0)
    assert unit_is_finished(tmp_path, 1)  # holds nothing, and that was found out
    next(iter(tmp_path.rglob("unit-000000-page-000001.parquet"))).unlink()
    assert not unit_is_finished(tmp_path, 0)


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(table, where, **options) -> None:
        Path(where).write_bytes(b"half a page")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="No space"):
        Pages(tmp_path, [[make_document("a", 20)]], split_of(["a"], 1, 0.0)).write()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
