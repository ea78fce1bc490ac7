"""One page on a run: what was evaluated, what retrieval gave, and how far that can be believed.

It is made of what evaluations left in RUN/evaluation/, of the run's metrics and of the database's manifest. The same
facts are in the JSON file beside it.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, get_args

from retro_ray.database.format import write_json_atomically
from retro_ray.database.store import Database
from retro_ray.evaluation.page import render
from retro_ray.evaluation.results import ResultKind, as_json, read_result
from retro_ray.index.curve import plot_curve
from retro_ray.training.checkpoint import find_checkpoint
from retro_ray.training.progress import read_metrics


def collect(run: Path, database: Database) -> dict[str, Any]:
    """All that is known of a run, as one JSON object."""
    results = {kind: read_result(run, kind) for kind in get_args(ResultKind)}
    checkpoint, meta = find_checkpoint(run)
    manifest = database.manifest
    metrics = run / "metrics.jsonl"
    return as_json(
        {
            "run": run.name,
            **results,
            "metrics": read_metrics(metrics) if metrics.exists() else [],
            "checkpoint": {"path": str(checkpoint), "step": meta.step, "trained_with_database": meta.database_version},
            "model": dataclasses.asdict(meta.config.model),
            "training": dataclasses.asdict(meta.config.training),
            "database": {
                "directory": str(database.directory),
                "version": manifest.version,
                "generation": manifest.generation,
                "documents": manifest.num_live_documents,
                "chunks": manifest.num_live_chunks,
                "index": dataclasses.asdict(manifest.index),
                "tokenizer": f"{manifest.tokenizer_name} ({manifest.tokenizer_fingerprint})",
                "embedder": f"{manifest.embedder_name} ({manifest.embedder_fingerprint})",
                "settings": manifest.settings,
                "skipped_records": manifest.skipped,
            },
            "index_curve": [dataclasses.asdict(point) for point in manifest.index_curve],
        }
    )


def write_report(facts: dict[str, Any], database: Database, path: Path) -> Path:
    """Write the page to `path`, and its facts as JSON beside it; returns the JSON file's path."""
    page = render(facts, _index_plot(database))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    beside = path.with_suffix(".json")
    write_json_atomically(beside, facts)
    return beside


def is_current(result: dict[str, Any] | None, run: Path, database: Database) -> bool:
    """Whether a result is there, and of the run's newest checkpoint and the database as it is."""
    if result is None:
        return False
    checkpoint, _ = find_checkpoint(run)
    return (result["checkpoint"], result["database_version"]) == (str(checkpoint), database.manifest.version)


def _index_plot(database: Database) -> str | None:
    manifest = database.manifest
    if not manifest.index_curve:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "curve.svg"
        target_recall = manifest.settings.get("database", {}).get("target_recall")
        plot_curve(manifest.index_curve, manifest.index, target_recall, path)
        text = path.read_text(encoding="utf-8")
    return text[text.index("<svg") :]
