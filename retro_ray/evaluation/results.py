"""What evaluations of a run found, kept as JSON in RUN/evaluation/ for the report: one file per kind, the newest."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

from retro_ray.database.format import write_json_atomically

ResultKind = Literal["scores", "near_duplicates", "sweep", "update", "examples"]
"""In the order in which the report shows them."""


def as_json(value: Any) -> Any:
    """A value as JSON has it: NaN is null, tuples are lists."""
    if isinstance(value, dict):
        return {key: as_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_result(run: Path, kind: ResultKind, content: dict[str, Any]) -> None:
    """Keep a result in place of an older one of its kind."""
    folder = run / "evaluation"
    folder.mkdir(exist_ok=True)
    write_json_atomically(folder / f"{kind}.json", as_json(content))


def read_result(run: Path, kind: ResultKind) -> dict[str, Any] | None:
    """The newest result of a kind; None where there is none."""
    path = run / "evaluation" / f"{kind}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
