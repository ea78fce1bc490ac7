"""`python -m retro_ray inspect`: what the database of a home holds."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from retro_ray.config import default_home
from retro_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Print documents, chunks, tokens, shards, index, sizes and fingerprints of the database."""

    home: Path = field(default_factory=default_home)
    """Folder of the database. $RETRO_RAY_HOME, or ~/.retro_ray."""
    json: bool = False
    """Print one JSON object."""
    plot: Path | None = None
    """Draw recall against throughput of all indexes that were measured into this image file."""

    def run(self) -> None:
        from retro_ray.database.format import database_directory, read_manifest
        from retro_ray.database.summary import as_lines, describe
        from retro_ray.index.curve import curve_table, plot_curve

        manifest = read_manifest(database_directory(self.home))
        target_recall = manifest.settings.get("database", {}).get("target_recall")
        if self.plot is not None:
            if not manifest.index_curve:
                raise ConfigError(
                    f"the database in {self.home} is searched exactly, so nothing was measured that --plot could draw"
                )
            plot_curve(manifest.index_curve, manifest.index, target_recall, self.plot)
        description = describe(self.home, manifest)
        description["skipped_records"] = manifest.skipped
        description["stage_seconds"] = manifest.stage_seconds
        description["settings"] = manifest.settings
        if self.json:
            description["index_curve"] = [dataclasses.asdict(point) for point in manifest.index_curve]
            print(json.dumps(description, indent=2))
            return
        print(as_lines(description))
        if manifest.index_curve:
            print(curve_table(manifest.index_curve, manifest.index))
