"""What each edit does, and what it leaves alone."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from retro_ray.building.edit import DatabaseEditor
from retro_ray.database.format import database_directory, read_manifest
from retro_ray.database.store import ChunkStore, Database
from retro_ray.retrieval.local import LocalRetriever
from tests.unit.building.editing import (
    NAMES,
    HashEmbedder,
    assert_nothing_changed,
    document,
    files_of,
    live_ids,
    live_ids_of,
    text_of,
    write_database,
)


def test_added_documents_are_found_and_nothing_else_is_touched(home: Path, editor: DatabaseEditor) -> None:
    before, old_files = Database.open(home), files_of(home)
    new = [document("new"), document("long", "kappa " * 30), document("short", "pi")]
    report = editor.add(iter(new))
    after = Database.open(home)
    assert (report.generation, report.documents_added, report.documents_deleted) == (2, 3, 0)
    assert report.chunks_added == after.manifest.num_chunks - before.manifest.num_chunks
    assert live_ids(home) == [*live_ids_of(before), "new", "long", "short"]
    for one in new:
        assert text_of(home, one.id) == one.text
        place = after.find_document(one.id)
        assert place is not None
        assert place[0].document_ref(place[1]).title == one.title
    assert {name: files_of(home)[name] for name in old_files} == old_files
    assert after.manifest.segments[:2] == before.manifest.segments
    assert after.manifest.next_chunk_id == before.manifest.next_chunk_id + report.chunks_added
    assert after.manifest.num_edits == 1
    after.check_files(*after.manifest.files)


def test_a_database_that_outgrew_its_exact_index_says_so(
    home: Path, editor: DatabaseEditor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert editor.add([document("new")]).advice is None
    monkeypatch.setattr("retro_ray.building.index_choice.MAX_EXACT_CHUNKS", 3)
    advice = editor.add([document("newer")]).advice
    assert advice is not None
    assert "retro_ray compact" in advice


def test_only_what_is_added_is_embedded_and_read(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The price of an addition does not grow with the database."""
    embedder = HashEmbedder()
    opened: set[str] = set()
    from retro_ray.database import commit as module

    whole = module.file_record

    def recorded(path: Path):
        opened.add(str(path.relative_to(database_directory(home))))
        return whole(path)

    monkeypatch.setattr(module, "file_record", recorded)
    report = DatabaseEditor(home, embedder=embedder).add([document("new")])
    assert embedder.num_texts == report.chunks_added
    assert opened
    assert all(path.startswith("edit-00000002/") for path in opened)


def test_an_added_segment_goes_to_the_shard_with_the_fewest_chunks(home: Path, editor: DatabaseEditor) -> None:
    for number, num_words in enumerate([300, 100, 40, 10]):
        manifest = Database.open(home).manifest
        sizes = [sum(segment.num_chunks for segment in manifest.segments_of(shard)) for shard in (0, 1)]
        editor.add([document(f"new {number}", "alpha " * num_words)])
        assert Database.open(home).manifest.segments[-1].shard == int(np.argmin(sizes))


def test_many_small_additions_leave_few_segments(home: Path, editor: DatabaseEditor) -> None:
    """Merged without any chunk or stored neighbour changing its number."""
    built = len(Database.open(home).manifest.segments)
    expected: dict[int, tuple[str, list[int]]] = {}
    for number in range(17):
        name = f"new {number}"
        editor.add([document(name, "sigma tau")])
        database = Database.open(home)
        store, row = database.find_document(name) or (None, -1)
        assert store is not None
        chunk_id = store.chunk_id_base + store.document_rows(row)[0]
        neighbours = store.neighbours.gather("chunk_ids", np.array([chunk_id - store.chunk_id_base]))[0].tolist()
        expected[chunk_id] = name, neighbours
        if number == 6:
            editor.delete(["new 3"])
            editor.update([document("new 4", "pi")])
    database = Database.open(home)
    manifest = database.manifest
    assert len(manifest.segments) - built <= 5
    assert {segment.shard for segment in manifest.segments} <= {0, 1}
    assert manifest.num_live_documents == len(NAMES) + 16
    for chunk_id, (name, neighbours) in expected.items():
        segment, row = database.locate(np.array([chunk_id]))
        if name in ("new 3", "new 4"):
            assert segment[0] == -1
            continue
        store = database.segments[segment[0]]
        assert store.document_ref(int(store.document_of(row)[0])).id == name
        assert store.neighbours.gather("chunk_ids", row)[0].tolist() == neighbours
    assert text_of(home, "new 4") == "pi"
    assert "new 3" not in live_ids(home)
    database.check_files(*manifest.files)


def test_an_update_leaves_alone_what_has_not_changed(home: Path) -> None:
    embedder = HashEmbedder()
    editor = DatabaseEditor(home, embedder=embedder)
    changed = dataclasses.replace(document("d2"), title="Another title")
    report = editor.update([document("d1"), changed, document("d3"), document("d4", "rho " * 9)])
    assert (report.documents_added, report.documents_deleted, report.documents_unchanged) == (2, 2, 2)
    assert embedder.num_texts == report.chunks_added
    before = Database.open(home), files_of(home)
    report = editor.update([document(name) for name in ("d0", "d1")])
    assert (report.generation, report.documents_added, report.documents_unchanged) == (2, 0, 2)
    assert_nothing_changed(home, before)


def test_new_chunks_get_neighbours_among_old_and_new_but_not_in_their_document(
    home: Path, editor: DatabaseEditor
) -> None:
    editor.delete(["d2"])
    editor.add([document(f"new {number}", text) for number, text in enumerate(["pi rho " * 9, "pi rho " * 9])])
    database = Database.open(home)
    store = database.segments[-1]
    assert store.partition.neighbours_generation == 3
    assert_neighbours_are_nearest(database, store)


def assert_neighbours_are_nearest(database: Database, store: ChunkStore) -> None:
    """The stored neighbours of a partition, against all distances."""
    keys = np.concatenate([segment.keys for segment in database.segments])
    ids = np.concatenate([segment.chunk_id_base + np.arange(segment.num_chunks) for segment in database.segments])
    for row in range(store.num_chunks):
        first, stop = store.document_rows(int(store.document_of(np.array([row]))[0]))
        own = (ids >= store.chunk_id_base + first) & (ids < store.chunk_id_base + stop) & (store.chunk_id_base >= 0)
        squares = ((keys - store.keys[row]).astype(np.float64) ** 2).sum(1)
        squares[own | database.is_deleted(ids)] = np.inf
        expected = np.sort(squares)[: database.manifest.num_neighbours]
        found = store.neighbours.gather("chunk_ids", np.array([row]))[0]
        np.testing.assert_allclose(squares[np.searchsorted(ids, found)], expected, rtol=1e-5)
        assert (found >= 0).all()


def test_a_deleted_document_is_nowhere(home: Path, editor: DatabaseEditor) -> None:
    database = Database.open(home)
    store, row = database.find_document("d3") or (None, -1)
    assert store is not None
    first, stop = (store.chunk_id_base + edge for edge in store.document_rows(row))
    chunk_ids = np.arange(first, stop)
    retriever = LocalRetriever.open(database)
    before = retriever.search(store.keys[first - store.chunk_id_base : stop - store.chunk_id_base], 1)
    assert before.chunk_ids[:, 0].tolist() == chunk_ids.tolist()
    report = editor.delete(["d3"])
    assert (report.documents_added, report.documents_deleted, report.chunks_added) == (0, 1, 0)
    after = Database.open(home)
    assert live_ids(home) == [name for name in live_ids_of(database) if name != "d3"]
    assert after.find_document("d3") is None
    assert after.is_deleted(chunk_ids).all()
    assert not after.neighbour_tokens(chunk_ids)[1].any()
    found = retriever.search(store.keys, 1000)
    assert not np.isin(found.chunk_ids, chunk_ids).any()
    assert not any(ref is not None and ref.id == "d3" for refs in found.documents for ref in refs)
    manifest = after.manifest
    assert (manifest.num_deleted_documents, manifest.num_deleted_chunks) == (1, len(chunk_ids))
    assert manifest.num_live_chunks == manifest.num_chunks - len(chunk_ids)
    assert manifest.num_deleted_tokens == int(store.lengths(chunk_ids - store.chunk_id_base).sum())
    assert manifest.num_deleted_bytes == len(document("d3").text)


def test_stored_neighbours_that_are_deleted_make_room_for_the_next(home: Path, editor: DatabaseEditor) -> None:
    database = Database.open(home)
    stored = database.segments[0].neighbours.column("chunk_ids")
    editor.delete(["d1", "d5"])
    after = Database.open(home)
    left = after.without_deleted(stored)
    dropped = 0
    for row, found in zip(stored, left, strict=True):
        kept = [chunk_id for chunk_id in row if chunk_id >= 0 and not after.is_deleted(chunk_id)]
        assert found.tolist() == kept + [-1] * (len(row) - len(kept))
        dropped += len(row) - len(kept)
    assert dropped > 0


def test_live_chunks_and_their_places(home: Path, editor: DatabaseEditor) -> None:
    """Over several segments, with gaps at their borders, and with chunk_ids of before a compaction."""
    editor.add([document("new")])
    editor.compact(num_shards=3)
    editor.add([document("newer"), document("newest")])
    editor.delete(["d0", "d1", "newest", "d4"])
    database = Database.open(home)
    places = {
        store.chunk_id_base + row: (number, row)
        for number, store in enumerate(database.segments)
        for row in range(store.num_chunks)
        if store.document_ref(int(store.document_of(np.array([row]))[0])).id not in ("d0", "d1", "newest", "d4")
    }
    chunk_ids = np.arange(-2, database.manifest.next_chunk_id + 3)
    segments, rows = database.locate(chunk_ids)
    expected = [places.get(int(chunk_id), (-1, -1)) for chunk_id in chunk_ids]
    assert list(zip(segments.tolist(), rows.tolist(), strict=True)) == expected
    runs = [chunk_id for first, last in database.live_runs for chunk_id in range(first, last + 1)]
    assert runs == sorted(places)
    assert len(database.live_runs) >= 3
    assert len(places) == database.manifest.num_live_chunks


def test_an_update_replaces_what_is_there_and_adds_what_is_not(home: Path, editor: DatabaseEditor) -> None:
    report = editor.update([document("d4", "omicron " * 20), document("new"), document("d0", "xi")])
    assert (report.documents_added, report.documents_deleted) == (3, 2)
    assert sorted(live_ids(home)) == sorted([*NAMES, "new"])
    assert text_of(home, "d4") == "omicron " * 20
    assert text_of(home, "d0") == "xi"
    again = editor.update([document("d4", "rho")])
    assert (again.documents_deleted, text_of(home, "d4")) == (1, "rho")
    assert Database.open(home).manifest.num_deleted_documents == 3
    editor.delete(["d4"])
    assert Database.open(home).find_document("d4") is None
    assert editor.add([document("d4")]).documents_added == 1
    assert text_of(home, "d4") == document("d4").text


@pytest.mark.parametrize("num_shards", [None, 1, 3, 50])
def test_compaction_leaves_the_same_documents_and_no_deleted_ones(
    home: Path, editor: DatabaseEditor, num_shards: int | None
) -> None:
    editor.add([document("new"), document("more")])
    editor.delete(["d0", "d7", "new"])
    before = Database.open(home)
    expected = {name: text_of(home, name) for name in live_ids(home)}
    report = editor.compact(num_shards)
    after = Database.open(home)
    manifest = after.manifest
    assert report.generation == manifest.generation == 4
    assert live_ids(home) == list(expected)
    assert {name: text_of(home, name) for name in expected} == expected
    assert (manifest.deleted, manifest.num_deleted_chunks, manifest.num_deleted_documents) == (None, 0, 0)
    assert manifest.num_chunks == before.manifest.num_live_chunks
    assert manifest.num_shards == len(manifest.segments) == min(num_shards or 2, len(manifest.segments))
    assert [segment.shard for segment in manifest.segments] == list(range(manifest.num_shards))
    assert manifest.segments[0].chunk_id_base == before.manifest.next_chunk_id
    assert after.validation is not None
    for store in [*after.segments, after.validation]:
        assert store.partition.neighbours_generation == 4
        assert_neighbours_are_nearest(after, store)
    old_ids = np.arange(before.manifest.next_chunk_id)
    assert (after.locate(old_ids)[0] == -1).all()
    assert not after.neighbour_tokens(old_ids)[1].any()
    after.check_files(*manifest.files)


def test_compaction_divides_the_chunks_about_equally(tmp_path: Path) -> None:
    write_database(tmp_path, [document(f"{number}", "alpha " * 20) for number in range(30)], num_shards=1)
    DatabaseEditor(tmp_path).compact(num_shards=3)
    sizes = [segment.num_chunks for segment in Database.open(tmp_path).manifest.segments]
    assert len(sizes) == 3
    assert max(sizes) - min(sizes) <= 3


def test_readers_of_the_generation_before_go_on_and_what_is_older_goes(home: Path, editor: DatabaseEditor) -> None:
    first = Database.open(home)
    editor.compact()
    first.check_files(*first.manifest.files)
    second = Database.open(home)
    editor.delete(["d1"])
    directory = database_directory(home)
    assert not (directory / "built" / "shard-00000").exists()
    assert (directory / "built" / "tokenizer").exists()
    second.check_files(*second.manifest.files)
    editor.compact()
    editor.compact()
    assert not (directory / second.manifest.segments[0].folder).exists()
    assert set(read_manifest(directory).files) <= set(files_of(home))


def test_a_mapped_generation_outlives_its_files(home: Path, editor: DatabaseEditor) -> None:
    old = Database.open(home)
    old.map_files()
    chunk_ids = np.arange(old.manifest.num_chunks)
    expected = old.neighbour_tokens(chunk_ids)[0]
    for _ in range(3):
        editor.compact()
    assert not (database_directory(home) / old.manifest.segments[0].chunks).exists()
    np.testing.assert_array_equal(old.neighbour_tokens(chunk_ids)[0], expected)
    assert old.segments[0].neighbours.column("chunk_ids").max() > 0
    assert old.segments[0].document_ref(0).id in NAMES
