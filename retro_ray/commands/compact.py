"""`python -m retro_ray compact`: rewrite the database without what was deleted."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from retro_ray.commands.editing import edit_database
from retro_ray.config import default_home
from retro_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Compact:
    """Rewrite the database: no deleted documents, one segment per shard, a new index, all neighbours searched again.

    Nothing is embedded. Searches go on meanwhile; the files of before are removed by the edit after this one.
    """

    num_shards: int | None = None
    """Index shards. Default: as many as there are."""
    home: Path = field(default_factory=default_home)
    """Folder of the database. $RETRO_RAY_HOME, or ~/.retro_ray."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> None:
        if self.num_shards is not None and self.num_shards < 1:
            raise ConfigError(f"--num-shards is {self.num_shards}; it must be at least 1")
        edit_database(self.home, lambda editor: editor.compact(self.num_shards), as_json=self.json)
