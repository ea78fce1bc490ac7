"""`python -m retro_ray verify`: every checksum of a home's database and checkpoints."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from retro_ray.config import default_home
from retro_ray.progress import progress_bar


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check every file of the database and of all checkpoints against its recorded SHA-256.

    Exit status 1 when one byte is off or a file is missing.
    """

    home: Path = field(default_factory=default_home)
    """Folder of the database and the runs. $RETRO_RAY_HOME, or ~/.retro_ray."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> None:
        num_files, damaged = verify(self.home)
        if self.json:
            print(json.dumps({"ok": not damaged, "files": num_files, "damaged": damaged}, indent=2))
        else:
            for entry in damaged:
                print(f"{entry['file']}: {entry['reason']}")
            print(f"{num_files} files checked, {len(damaged)} damaged")
        if damaged:
            sys.exit(1)


def verify(home: Path) -> tuple[int, list[dict[str, str]]]:
    """Number of files checked, and for each damaged one its path and what is wrong.

    Raises:
        DatabaseError: there is no database, or its manifest is damaged.
    """
    from retro_ray.database.format import FileRecord, database_directory, file_problem, read_manifest
    from retro_ray.errors import CheckpointError
    from retro_ray.training.checkpoint import list_checkpoints, read_meta

    directory = database_directory(home)
    expected: list[tuple[Path, FileRecord]] = [
        (directory / path, record) for path, record in read_manifest(directory).files.items()
    ]
    damaged: list[dict[str, str]] = []
    num_files = len(expected)
    for run in sorted((home / "runs").glob("*")):
        for folder in list_checkpoints(run):
            try:
                num_files += len(read_meta(folder).files)
            except CheckpointError as error:
                num_files += 1
                damaged.append({"file": str(folder), "reason": str(error)})
    for path, record in progress_bar(len(expected), "verify", " files", iterable=expected):
        if (reason := file_problem(path, record)) is not None:
            damaged.append({"file": str(path), "reason": reason})
    return num_files, damaged
