"""`python -m retro_ray delete`: delete documents from the database."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from retro_ray.commands.editing import edit_database
from retro_ray.config import default_home


@dataclass(frozen=True, kw_only=True)
class Delete:
    """Delete documents: when this has ended, no search returns them, and no neighbour shows their text.

    Their bytes stay in the database's files until `compact`.
    """

    document: tuple[str, ...]
    """Ids of documents, as `search` prints them."""
    home: Path = field(default_factory=default_home)
    """Folder of the database. $RETRO_RAY_HOME, or ~/.retro_ray."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> None:
        edit_database(self.home, lambda editor: editor.delete(self.document), as_json=self.json)
