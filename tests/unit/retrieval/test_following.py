"""A commit is noticed by whoever looks next; nothing else is read again."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from retro_ray.database.format import MANIFEST_NAME, write_manifest
from retro_ray.errors import DatabaseError
from retro_ray.retrieval import following
from retro_ray.retrieval.following import FollowedManifest
from tests.unit.retrieval.homes import Home, write_home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return write_home(tmp_path, [[1, 2], [3, 4]], np.eye(2, 3, dtype=np.float32), [1], [0, 1])


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where manifests were read."""
    read: list[Path] = []
    original = following.read_manifest
    monkeypatch.setattr(following, "read_manifest", lambda directory: read.append(directory) or original(directory))
    return read


def test_a_manifest_is_read_once_per_commit(home: Home, reads: list[Path]) -> None:
    follow = FollowedManifest(home.directory)
    first = follow.current()
    assert first.manifest == home.manifest
    assert follow.current() is first
    home.show(1)
    second = follow.current()
    assert second.manifest == home.manifest
    assert second.id > first.id
    assert follow.current() is second
    assert len(reads) == 2


def test_a_file_of_the_same_size_and_time_is_noticed(home: Home) -> None:
    """As two commits within one tick of the file system's clock leave it: the inode tells."""
    follow = FollowedManifest(home.directory)
    path = home.directory / MANIFEST_NAME
    before, first = path.stat(), follow.current()
    write_manifest(home.directory, replace(home.manifest, generation=2))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert follow.current().manifest.generation == first.manifest.generation + 1


def test_a_late_file_system_is_asked_again(home: Home, reads: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What another process has seen is read, though the file looks unchanged here."""
    follow = FollowedManifest(home.directory)
    follow.current()
    home.show(1)
    stale = follow._identity
    monkeypatch.setattr(follow, "_look", lambda: stale)
    assert follow.current().manifest.generation == 1
    assert follow.current(at_least=2).manifest.generation == 2
    assert len(reads) == 2


def test_a_home_that_was_deleted_and_built_anew_has_another_id(home: Home) -> None:
    follow = FollowedManifest(home.directory)
    before = follow.current()
    write_manifest(home.directory, replace(home.manifest, segments=home.manifest.segments[:1]))
    assert follow.current().id.generation == before.id.generation
    assert follow.current().id != before.id


def test_a_pinned_manifest_is_not_followed(home: Home, reads: list[Path]) -> None:
    pinned = replace(home.manifest, generation=7)
    follow = FollowedManifest(home.directory, pinned)
    (home.directory / MANIFEST_NAME).unlink()
    assert follow.current(at_least=9).manifest is pinned
    assert reads == []


def test_a_database_that_is_gone_is_an_error_until_it_is_back(home: Home) -> None:
    follow = FollowedManifest(home.directory)
    follow.current()
    (home.directory / MANIFEST_NAME).unlink()
    with pytest.raises(DatabaseError, match="no retrieval database"):
        follow.current()
    write_manifest(home.directory, home.manifest)
    assert follow.current().manifest == home.manifest
