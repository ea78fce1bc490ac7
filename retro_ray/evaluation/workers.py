"""Passes over a text, spread over Ray actors.

Documents are scored in groups that do not depend on the number of workers, and what a group gave is kept on the disk:
an evaluation that was killed goes on, and one that asks for a pass that another one made finds it. The sums are those
of one process, to the bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import ray
from ray.util import ActorPool

from retro_ray.allocator import FAST_ALLOCATOR_ENV
from retro_ray.database.format import fingerprint
from retro_ray.evaluation.bits_per_byte import document_groups
from retro_ray.evaluation.own_text import ScoredText
from retro_ray.evaluation.passes import Pass, PassScorer
from retro_ray.evaluation.scores import PassScores
from retro_ray.progress import progress_bar
from retro_ray.ray_session import num_cluster_gpus, num_free_cpus


def run_passes(
    passes: Mapping[str, Pass], text: ScoredText, documents: np.ndarray, cache: Path, num_workers: int | None = None
) -> dict[str, PassScores]:
    """Score documents in several passes.

    Args:
        passes: by name.
        text: that has the documents.
        documents: int64 [n].
        cache: folder of what was scored before; nodes of a cluster share it.
        num_workers: actors. Default: one per GPU, else one per CPU.
    """
    store = text.open(next(iter(passes.values())).manifest.chunk_length)
    groups = document_groups(documents, store.document_num_chunks)
    folders = {name: cache / one.identity(text) for name, one in passes.items()}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    files = {
        (name, number): folder / f"{fingerprint(group.tolist())}.npz"
        for name, folder in folders.items()
        for number, group in enumerate(groups)
    }
    # By file: passes of several names may be the same.
    todo = list({file: task for task, file in files.items() if not file.exists()}.values())
    if todo:
        num_gpus = num_cluster_gpus()
        count = min(len(todo), num_workers or num_gpus or num_free_cpus())
        actor = ray.remote(num_cpus=0 if num_gpus else 0.9, num_gpus=1 if num_gpus else 0)(_CachingScorer)
        actor = actor.options(runtime_env={"env_vars": FAST_ALLOCATOR_ENV})
        shared = ray.put((text, dict(passes)))
        pool = ActorPool([actor.remote(shared) for _ in range(count)])
        done = pool.map_unordered(
            lambda scorer, task: scorer.score.remote(task[0], groups[task[1]], files[task]),
            todo,
        )
        for _ in progress_bar(len(todo), "evaluate", iterable=done):
            pass
    return {
        name: PassScores.concatenated([PassScores.read(files[name, number]) for number in range(len(groups))])
        for name in passes
    }


def forget_other_models(folder: Path, weights: str) -> Path:
    """Folder of the scores of one model under `folder`; those of other models are removed."""
    own = folder / weights[:16]
    own.mkdir(parents=True, exist_ok=True)
    for other in folder.iterdir():
        if other != own:
            shutil.rmtree(other, ignore_errors=True)
    return own


class _CachingScorer:
    """A PassScorer that writes down what it finds."""

    def __init__(self, shared: tuple[ScoredText, dict[str, Pass]]) -> None:
        text, passes = shared
        self._scorer = PassScorer(text, passes, num_threads=1)

    def score(self, name: str, documents: np.ndarray, path: Path) -> None:
        self._scorer.score(name, documents).write(path)
