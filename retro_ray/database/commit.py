"""Committing a build or an edit: durable, and whole or not at all.

What a new generation adds lies in files that nothing refers to yet. They are flushed to the disk
first; then the manifest is replaced, in one step; then what nobody needs any longer is removed. A
process killed anywhere on this way leaves the old generation or the new one.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

from retro_ray.database.format import MANIFEST_NAME, FileRecord, Manifest, file_record, read_manifest, write_manifest
from retro_ray.errors import BusyError, ConfigError, DatabaseError
from retro_ray.file_lock import file_lock

_LOCK_NAME = ".lock"
WORK_NAME = "work"
"""Folder of a build that is not finished; what is in it is kept for the next run."""


@contextmanager
def database_lock(directory: Path, purpose: str) -> Iterator[None]:
    """Held by whatever changes the database in `directory`, which is created where it is missing.

    Raises:
        BusyError: something else changes it.
        ConfigError: nothing can be written there.
    """

    def refuse(holder: str) -> BusyError:
        return BusyError(
            f"the database in {directory} is being changed ({holder}): wait for it and try again, or pass another "
            "--home"
        )

    with ExitStack() as held:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            held.enter_context(file_lock(directory / _LOCK_NAME, purpose, refuse))
        except OSError as error:
            raise ConfigError(
                f"cannot write to --home {directory.parent} ({os.strerror(error.errno or 0)}): pass a folder that can "
                "be written to"
            ) from error
        yield


def committed(directory: Path) -> Manifest | None:
    """The manifest that is committed; None where there is none that can be read."""
    try:
        return read_manifest(directory)
    except DatabaseError:
        return None


def next_generation(base: Manifest | None) -> int:
    """The generation that follows `base`; 1 where there is none."""
    return 1 if base is None else base.generation + 1


def commit(directory: Path, manifest: Manifest, base: Manifest | None, written: Iterable[str]) -> Manifest:
    """Make `manifest` the database in `directory`.

    Args:
        directory: of the database.
        manifest: the new generation.
        base: the manifest that was committed when the work on it began.
        written: the files that were written for it, as the manifest names them.

    Returns:
        The manifest as it was written.

    Raises:
        DatabaseError: meanwhile another generation was committed, which no lock prevented; nothing is changed.
    """
    manifest = dataclasses.replace(manifest, created=datetime.now(UTC).isoformat(timespec="seconds"))
    make_durable(directory, written)
    now = committed(directory)
    if next_generation(now) != next_generation(base):
        raise DatabaseError(
            f"the database in {directory} went from generation {next_generation(base) - 1} to "
            f"{next_generation(now) - 1} meanwhile: another machine has changed it; nothing was done, start again"
        )
    write_manifest(directory, manifest)
    _flush_folder(directory)
    return read_manifest(directory)


def make_durable(directory: Path, paths: Iterable[str]) -> None:
    """Flush files, and the folders from theirs up to `directory`, to the disk."""
    folders: set[PurePosixPath] = set()
    for path in paths:
        with (directory / path).open("rb") as file:
            os.fsync(file.fileno())
        folders.update(PurePosixPath(path).parents)
    for folder in sorted(folders, reverse=True):
        _flush_folder(directory / folder)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(directory: Path, manifests: Iterable[Manifest], *, keep_unfinished: bool) -> None:
    """Remove the folders, and the parts of a build or an edit, that no manifest refers to, and torn manifests.

    Readers that have mapped a removed file keep it; those that come to open it one generation too
    late do not.

    Args:
        directory: of the database.
        manifests: the committed one, and the one before, which some still read.
        keep_unfinished: leave alone what interrupted builds have finished of themselves.
    """
    needed: set[Path] = set()
    for manifest in manifests:
        for path in [*manifest.files, f"{manifest.build}/skipped.jsonl"]:
            needed.update(directory / parent for parent in PurePosixPath(path).parents)
    for folder in (entry for entry in directory.iterdir() if entry.is_dir()):
        if folder not in needed:
            if not (keep_unfinished and (folder / WORK_NAME).is_dir()):
                shutil.rmtree(folder)
            continue
        for part in (entry for entry in folder.iterdir() if entry.is_dir() and entry not in needed):
            shutil.rmtree(part)
    for torn in directory.glob(f"{MANIFEST_NAME}.tmp-*"):
        torn.unlink()


def checksums(directory: Path, paths: Iterable[str]) -> dict[str, FileRecord]:
    """Records of files, computed in this process."""
    return {path: file_record(directory / path) for path in sorted(paths)}
