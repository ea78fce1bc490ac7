"""What edits refuse, and what keeps two of them, or an edit and a build, apart."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from retro_ray.building.edit import DatabaseEditor
from retro_ray.database.commit import database_lock
from retro_ray.database.format import MANIFEST_NAME, database_directory, read_manifest, write_manifest
from retro_ray.database.store import Database
from retro_ray.errors import DatabaseError, InputError, MismatchError, RetroRayError
from retro_ray.retrieval.local import LocalRetriever
from retro_ray.text.corpus import Document
from tests.unit.building.editing import NAMES, HashEmbedder, assert_nothing_changed, document, files_of, live_ids


def one_line(error: RetroRayError, *parts: str) -> None:
    assert "\n" not in str(error)
    for part in parts:
        assert part in str(error)


def test_what_cannot_be_added(home: Path, editor: DatabaseEditor) -> None:
    before = Database.open(home), files_of(home)
    with pytest.raises(InputError) as caught:
        editor.add([document("new"), document("d2")])
    one_line(caught.value, "'d2'", "update")
    with pytest.raises(InputError) as caught:
        editor.update([document("new"), document("d2"), document("new")])
    one_line(caught.value, "'new'", "unique")
    for put in (editor.add, editor.update):
        with pytest.raises(InputError, match="no documents"):
            put([])
    assert_nothing_changed(home, before)


def test_what_cannot_be_deleted(home: Path, editor: DatabaseEditor) -> None:
    editor.delete(["d5"])
    before = Database.open(home), files_of(home)
    with pytest.raises(InputError) as caught:
        editor.delete(["d1", "nowhere", "d5", "v0"])
    one_line(caught.value, "'nowhere', 'd5', 'v0'", "nothing was deleted")
    with pytest.raises(InputError, match="no documents to delete"):
        editor.delete([])
    assert_nothing_changed(home, before)
    assert editor.delete(["d1", "d1"]).documents_deleted == 1


def test_an_empty_database_can_be_filled_but_not_compacted(home: Path, editor: DatabaseEditor) -> None:
    editor.delete(NAMES)
    found = LocalRetriever.open(Database.open(home)).search(np.zeros((2, 8), np.float32), 3)
    assert (found.chunk_ids == -1).all()
    with pytest.raises(DatabaseError) as caught:
        editor.compact()
    one_line(caught.value, "every document")
    editor.add([document("d0")])
    editor.compact()
    assert live_ids(home) == ["d0"]


def test_a_home_without_database_is_left_alone(tmp_path: Path) -> None:
    for edit in (lambda e: e.delete(["a"]), lambda e: e.add([document("a")]), lambda e: e.compact()):
        with pytest.raises(DatabaseError, match=r"jobs/index\.py"):
            edit(DatabaseEditor(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


def test_another_embedder_is_refused(home: Path) -> None:
    class Other(HashEmbedder):
        fingerprint = "0123456789abcdef"

    before = Database.open(home), files_of(home)
    with pytest.raises(MismatchError) as caught:
        DatabaseEditor(home, embedder=Other()).add([document("new")])
    one_line(caught.value, "0123456789abcdef", "hash")
    assert_nothing_changed(home, before)


def test_of_two_editors_at_once_the_second_is_told_who_is_at_work(home: Path, editor: DatabaseEditor) -> None:
    def documents() -> Iterator[Document]:
        yield document("slow")
        for edit in (lambda: editor.add([document("other")]), lambda: editor.delete(["d1"]), editor.compact):
            with pytest.raises(DatabaseError) as caught:
                edit()
            one_line(caught.value, "adding documents", f"process {os.getpid()}", "wait")

    assert DatabaseEditor(home, embedder=HashEmbedder()).add(documents()).generation == 2
    assert "slow" in live_ids(home)
    assert "other" not in live_ids(home)


def test_a_build_keeps_editors_out(home: Path, editor: DatabaseEditor) -> None:
    with database_lock(database_directory(home), "building it"), pytest.raises(DatabaseError, match="building it"):
        editor.delete(["d1"])
    editor.delete(["d1"])


def test_what_no_lock_prevented_is_noticed_at_the_commit(home: Path, editor: DatabaseEditor) -> None:
    """A file system without working locks: another machine commits while this one edits."""
    directory = database_directory(home)
    theirs = dataclasses.replace(read_manifest(directory), generation=2, num_neighbours=2)

    def documents() -> Iterator[Document]:
        yield document("late")
        write_manifest(directory, theirs)

    with pytest.raises(DatabaseError, match="from generation 1 to 2 meanwhile"):
        editor.add(documents())
    assert read_manifest(directory) == theirs
    assert "late" not in live_ids(home)


def test_an_announced_commit(home: Path) -> None:
    announced: list[tuple[Path, int]] = []

    def announce(directory: Path) -> None:
        announced.append((directory, read_manifest(directory).generation))

    editor = DatabaseEditor(home, embedder=HashEmbedder(), announce=announce)
    editor.add([document("new")])
    with pytest.raises(InputError):
        editor.delete(["nowhere"])
    editor.delete(["new"])
    assert announced == [(database_directory(home), 2), (database_directory(home), 3)]


def test_new_files_are_on_the_disk_before_the_manifest(
    home: Path, editor: DatabaseEditor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut right after the manifest was replaced must find all that it lists."""
    directory = database_directory(home)
    flushed: list[str] = []
    fsync, replace = os.fsync, os.replace

    def flush(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def swap(source, target) -> None:
        if Path(target).name == MANIFEST_NAME:
            assert str(source) in flushed
            flushed.append("manifest")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", swap)
    before = read_manifest(directory)
    editor.update([document("d1", "kappa"), document("new")])
    written = [path for path in read_manifest(directory).files if path not in before.files]
    assert len(written) >= 6
    at = flushed.index("manifest")
    for path in written:
        assert flushed.index(str(directory / path)) < at
        assert flushed.index(str((directory / path).parent)) < at
    assert str(directory) in flushed[:at]
    assert str(directory) in flushed[at:]


def test_an_unfinished_build_keeps_its_work(home: Path, editor: DatabaseEditor) -> None:
    directory = database_directory(home)
    page = directory / "0123456789abcdef" / "work" / "pages" / "page"
    page.parent.mkdir(parents=True)
    page.write_text("hours of work")
    (directory / "abandoned").mkdir()
    editor.delete(["d1"])
    editor.compact()
    assert page.exists()
    assert not (directory / "abandoned").exists()
