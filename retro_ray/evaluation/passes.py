"""A pass: one reading of a text by one model, with neighbours of one kind. What an evaluation shows is computed from
passes over the same documents; this is what a worker needs to make them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from retro_ray.database.format import Manifest, fingerprint
from retro_ray.database.store import Database
from retro_ray.evaluation.bits_per_byte import NeighbourParts, RetrievalMode, ScoringOptions, score_pass, score_tokens
from retro_ray.evaluation.own_text import ScoredText, first_neighbours
from retro_ray.evaluation.scores import PassScores, TokenScores
from retro_ray.model.retro import RetroModel
from retro_ray.training.checkpoint import load_model

_SCORING = 2
"""To be raised when the same pass gives other scores than before, so that those that were kept are not taken."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One reading of a text."""

    checkpoint: Path
    """Folder of the model's checkpoint."""
    weights: str
    """SHA-256 of its weights."""
    directory: Path
    """Of the database."""
    manifest: Manifest
    """Its generation, whatever is committed meanwhile."""
    mode: RetrievalMode
    num_neighbours: int = 0
    """Per chunk."""
    neighbours: Path | None = None
    """File of the text's neighbours in that database, for "on"."""
    parts: NeighbourParts = "NF"

    def identity(self, text: ScoredText) -> str:
        """16 hex digits: equal for passes over `text` that give the same scores."""
        chosen = None
        if self.mode == "on" and self.neighbours is not None:
            ids = first_neighbours(self.neighbours, self.num_neighbours)(np.arange(text.partition.num_chunks))
            chosen = hashlib.sha256(np.ascontiguousarray(ids).tobytes()).hexdigest()
        retrieved = (self.manifest.version, self.num_neighbours, self.parts) if self.mode != "off" else None
        return fingerprint([_SCORING, self.weights, text.identity, self.mode, retrieved, chosen])


class PassScorer:
    """Reads one text in several passes, each checkpoint and database opened once.

    Args:
        text: the documents.
        passes: that may be asked for, by name.
        num_threads: for torch; None: as they are.
    """

    def __init__(self, text: ScoredText, passes: dict[str, Pass], num_threads: int | None = None) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self._passes = passes
        self._models: dict[Path, RetroModel] = {}
        self._databases: dict[str, Database] = {}
        self._store = text.open(next(iter(passes.values())).manifest.chunk_length)

    def score(self, name: str, documents: Sequence[int] | np.ndarray) -> PassScores:
        """The pass `name` over some documents."""
        one = self._passes[name]
        return score_pass(self._model(one), self._store, self._database(one), documents, **_options(one))

    def score_tokens(self, name: str, documents: Sequence[int] | np.ndarray) -> TokenScores:
        """The same, token by token."""
        one = self._passes[name]
        return score_tokens(self._model(one), self._store, self._database(one), documents, **_options(one))

    def _model(self, one: Pass) -> RetroModel:
        if one.checkpoint not in self._models:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._models[one.checkpoint], _, _ = load_model(one.checkpoint, one.manifest, device)
        return self._models[one.checkpoint]

    def _database(self, one: Pass) -> Database:
        key = f"{one.directory}:{one.manifest.version}"
        if key not in self._databases:
            self._databases[key] = Database(one.directory, one.manifest)
        return self._databases[key]


def _options(one: Pass) -> ScoringOptions:
    source = None if one.neighbours is None else first_neighbours(one.neighbours, one.num_neighbours)
    return {"mode": one.mode, "num_neighbours": one.num_neighbours, "neighbours": source, "parts": one.parts}
