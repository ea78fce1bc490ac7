"""`python -m retro_ray add`: add documents to the database."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from retro_ray.commands.editing import edit_database
from retro_ray.config import CorpusConfig, RecordConfig, default_home


@dataclass(frozen=True, kw_only=True)
class Add:
    """Add documents to the database: found by every search that begins after this has ended.

    What is added is embedded on this machine; nothing is trained or built again.
    """

    paths: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders and globs of documents; see jobs/index.py --input."""
    home: Path = field(default_factory=default_home)
    """Folder of the database. $RETRO_RAY_HOME, or ~/.retro_ray."""
    records: RecordConfig = field(default_factory=RecordConfig)
    json: bool = False
    """Print one JSON object."""

    def run(self) -> None:
        from retro_ray.building.reading import CorpusReader

        reader = CorpusReader(CorpusConfig(input=self.paths, **dataclasses.asdict(self.records)))
        edit_database(self.home, lambda editor: editor.add(reader), as_json=self.json, skipped=reader.skipped)
