"""Scoring a checkpoint on the validation split, spread over Ray actors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import ray
import torch
from ray.util import ActorPool

from retro_ray.allocator import FAST_ALLOCATOR_ENV
from retro_ray.database.format import Manifest
from retro_ray.database.store import Database
from retro_ray.errors import DatabaseError
from retro_ray.evaluation.bits_per_byte import BitsPerByte, RetrievalMode, choose_documents, score_documents
from retro_ray.evaluation.current_neighbours import current_neighbours, neighbours_in
from retro_ray.progress import progress_bar
from retro_ray.ray_session import num_cluster_gpus, num_free_cpus
from retro_ray.training.checkpoint import find_checkpoint, load_model, require_match
from retro_ray.training.run_folder import run_directory

MODES: tuple[RetrievalMode, ...] = get_args(RetrievalMode)
_CHUNKS_PER_TASK = 512


@dataclass(frozen=True)
class Evaluation:
    """Bits per byte of one checkpoint on held-out documents, by retrieval mode."""

    checkpoint: Path
    step: int
    database_version: str
    database_generation: int
    num_neighbours: int
    num_documents: int
    num_chunks: int
    scores: dict[RetrievalMode, BitsPerByte]

    def to_dict(self) -> dict[str, Any]:
        """What --json writes."""
        some = self.scores["on"]
        bits = {mode: score.value for mode, score in self.scores.items()}
        return {
            "checkpoint": str(self.checkpoint),
            "step": self.step,
            "database_version": self.database_version,
            "database_generation": self.database_generation,
            "num_neighbours": self.num_neighbours,
            "documents": self.num_documents,
            "chunks": self.num_chunks,
            "tokens": some.num_tokens,
            "text_bytes": some.num_bytes,
            "bits_per_byte": bits,
            "gain_on_over_off": 1 - bits["on"] / bits["off"],
            "gain_random_over_off": 1 - bits["random"] / bits["off"],
        }


class Scorer:
    """Holds a checkpoint and scores documents of the validation split.

    Args:
        directory: of the database.
        manifest: the generation to evaluate in, whatever is committed meanwhile.
        neighbours: file of the neighbours of the validation split.
        checkpoint: of the model.
        num_neighbours: per chunk; None: as many as in training.
        num_threads: for torch.
    """

    def __init__(
        self,
        directory: Path,
        manifest: dict[str, Any],
        neighbours: Path,
        checkpoint: Path,
        num_neighbours: int | None,
        num_threads: int,
    ) -> None:
        torch.set_num_threads(num_threads)
        self._database = Database(directory, Manifest.from_dict(manifest))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model, _, _ = load_model(checkpoint, self._database.manifest, device)
        count = self._model.config.num_neighbours if num_neighbours is None else num_neighbours
        self._num_neighbours = count
        self._neighbours = neighbours_in(neighbours, self._database, count)

    def score(self, mode: RetrievalMode, documents: Sequence[int]) -> tuple[RetrievalMode, BitsPerByte]:
        store = self._database.validation
        if store is None:
            raise DatabaseError("the database has no validation split")
        score = score_documents(
            self._model,
            store,
            self._database,
            documents,
            mode=mode,
            num_neighbours=self._num_neighbours,
            neighbours=self._neighbours,
        )
        return mode, score


def evaluate(
    home: Path,
    run: str = "default",
    *,
    num_neighbours: int | None = None,
    max_chunks: int | None = None,
    num_workers: int | None = None,
) -> Evaluation:
    """Score the newest checkpoint of a run with retrieval on, off, and with random neighbours.

    Neighbours are those in the database as it is now: after edits they are searched again first.

    Args:
        home: of the database and the run.
        run: its name.
        num_neighbours: per chunk. Default: as many as in training.
        max_chunks: score about so many chunks, of documents chosen at random. Default: all.
        num_workers: actors. Default: one per GPU, else one per CPU.

    Raises:
        DatabaseError: the database has no validation split.
        CheckpointError: the run has no checkpoint.
        MismatchError: checkpoint and database do not belong together.
    """
    database = Database.open(home)
    folder, meta = find_checkpoint(run_directory(home, run))
    require_match(meta, database.manifest)
    store = database.validation
    if store is None:
        raise DatabaseError(
            f"the database in {database.directory} has no validation split: build it with a larger --validation-share, "
            "or from more documents"
        )
    documents = choose_documents(store, max_chunks if max_chunks is not None else store.num_chunks)
    num_gpus = num_cluster_gpus()
    num_workers = num_workers or num_gpus or num_free_cpus()
    actor = ray.remote(num_cpus=0 if num_gpus else 0.9, num_gpus=1 if num_gpus else 0)(Scorer)
    actor = actor.options(runtime_env={"env_vars": FAST_ALLOCATOR_ENV})
    manifest = database.manifest.to_dict()
    settings = (database.directory, manifest, current_neighbours(database, store), folder, num_neighbours, 1)
    pool = ActorPool([actor.remote(*settings) for _ in range(num_workers)])
    tasks = [(mode, part) for part in _parts(documents, store.document_num_chunks) for mode in MODES]
    sums: dict[RetrievalMode, list[BitsPerByte]] = {mode: [] for mode in MODES}
    results = pool.map_unordered(lambda scorer, task: scorer.score.remote(*task), tasks)
    for mode, score in progress_bar(len(tasks), "evaluate", iterable=results):
        sums[mode].append(score)
    return Evaluation(
        checkpoint=folder,
        step=meta.step,
        database_version=database.manifest.version,
        database_generation=database.manifest.generation,
        num_neighbours=num_neighbours if num_neighbours is not None else meta.config.model.num_neighbours,
        num_documents=len(documents),
        num_chunks=int(store.document_num_chunks[documents].sum()),
        scores={mode: _total(parts) for mode, parts in sums.items()},
    )


def _parts(documents: np.ndarray, num_chunks: np.ndarray) -> list[np.ndarray]:
    """Documents in groups of about 512 chunks."""
    group = np.cumsum(num_chunks[documents]) // _CHUNKS_PER_TASK
    return [documents[group == number] for number in np.unique(group)]


def _total(parts: Sequence[BitsPerByte]) -> BitsPerByte:
    """The sum, exact whatever the order in which workers answered."""
    return BitsPerByte(
        math.fsum(part.nats for part in parts),
        sum(part.num_tokens for part in parts),
        sum(part.num_bytes for part in parts),
    )
