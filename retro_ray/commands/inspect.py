"""`python -m retro_ray inspect`: what the database of a home holds."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from retro_ray.config import default_home


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Print documents, chunks, tokens, shards, index, sizes and fingerprints of the database."""

    home: Path = field(default_factory=default_home)
    """Folder of the database. $RETRO_RAY_HOME, or ~/.retro_ray."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> None:
        from retro_ray.database.format import database_directory, read_manifest
        from retro_ray.database.summary import as_lines, describe

        manifest = read_manifest(database_directory(self.home))
        description = describe(self.home, manifest)
        description["skipped_records"] = manifest.skipped
        description["stage_seconds"] = manifest.stage_seconds
        description["settings"] = manifest.settings
        print(json.dumps(description, indent=2) if self.json else as_lines(description))
