"""`python -m retro_ray update`: replace documents of the database by new versions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from retro_ray.commands.editing import edit_database
from retro_ray.config import CorpusConfig, RecordConfig, default_home


@dataclass(frozen=True, kw_only=True)
class Update:
    """Put documents in place of those with the same ids, and add those whose ids are new, in one step.

    Ids that are made from files' names begin at the folder or file that is given: give what was given
    when the documents were put in.
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
        edit_database(self.home, lambda editor: editor.update(reader), as_json=self.json, skipped=reader.skipped)
