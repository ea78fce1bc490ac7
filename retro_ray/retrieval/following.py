"""The manifest of a home as it is now: a commit is noticed by whoever looks next."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from retro_ray.database.format import MANIFEST_NAME, Manifest, read_manifest


@dataclass(frozen=True, order=True)
class CommitId:
    """Which state of a database: two of the same home with equal ids hold the same."""

    generation: int
    version: str
    """Tells a home that was deleted and built anew, whose generations begin again, from what it was."""


@dataclass(frozen=True)
class Commit:
    """A manifest and its id."""

    manifest: Manifest

    @cached_property
    def id(self) -> CommitId:
        return CommitId(self.manifest.generation, self.manifest.version)


class FollowedManifest:
    """The newest commit of a database, at the price of an os.stat. Any number of threads may use it.

    Args:
        directory: of the database.
        pinned: this manifest and no other, for a build that is not committed yet.
    """

    def __init__(self, directory: Path, pinned: Manifest | None = None) -> None:
        self.directory = Path(directory)
        self.is_pinned = pinned is not None
        self._commit = None if pinned is None else Commit(pinned)
        self._identity: tuple[int, ...] | None = None
        self._lock = threading.Lock()

    def current(self, at_least: int = 0) -> Commit:
        """The commit that is on disk now.

        Args:
            at_least: read the manifest even if it looks unchanged, when it was of an earlier generation:
                a network file system may be late to show that it changed.

        Raises:
            DatabaseError: there is no database any longer, or its manifest is damaged.
        """
        commit = self._commit
        if commit is not None and (self.is_pinned or self._is_current(commit, at_least)):
            return commit
        with self._lock:
            if self._commit is None or not self._is_current(self._commit, at_least):
                # Looked at before reading: what is replaced in between is read once more, not overlooked.
                identity = self._look()
                self._commit = Commit(read_manifest(self.directory))
                self._identity = identity
            return self._commit

    def _is_current(self, commit: Commit, at_least: int) -> bool:
        return commit.manifest.generation >= at_least and self._identity == self._look()

    def _look(self) -> tuple[int, ...] | None:
        """What tells one manifest file from another; None where there is none."""
        try:
            found = (self.directory / MANIFEST_NAME).stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size
