"""What the commands that change a database share."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retro_ray.building.edit import DatabaseEditor, EditReport
    from retro_ray.text.corpus import SkippedRecord

_SKIPPED_SHOWN = 3


def edit_database(
    home: Path,
    edit: Callable[[DatabaseEditor], EditReport],
    *,
    as_json: bool,
    skipped: Sequence[SkippedRecord] = (),
) -> None:
    """Edit the database of a home, tell the actors that serve it, and print what was done.

    Args:
        home: of the database.
        edit: what to do.
        as_json: print one JSON object.
        skipped: records that could not be read, once `edit` has read them.
    """
    from retro_ray.building.edit import DatabaseEditor
    from retro_ray.retrieval.announce import announce_commit

    report = edit(DatabaseEditor(home.expanduser().absolute(), announce=announce_commit))
    if as_json:
        result: dict[str, Any] = dataclasses.asdict(report)
        result["skipped_records"] = dict(Counter(record.category for record in skipped))
        print(json.dumps(result, indent=2))
        return
    for record in skipped[:_SKIPPED_SHOWN]:
        place = record.source if record.line is None else f"{record.source}:{record.line}"
        print(f"skipped {place}: {record.reason}")
    if len(skipped) > _SKIPPED_SHOWN:
        print(f"and {len(skipped) - _SKIPPED_SHOWN} more skipped")
    unchanged = f", {report.documents_unchanged} unchanged" if report.documents_unchanged else ""
    print(
        f"generation {report.generation}: {report.documents_added} documents added ({report.chunks_added} chunks), "
        f"{report.documents_deleted} deleted{unchanged}, in {report.seconds:.1f} s"
    )
    if report.advice:
        print(report.advice)
