"""Our embedder on all cores, as the index job runs it: one actor of one thread per core."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import ray
import torch

from retro_ray.allocator import FAST_ALLOCATOR_ENV
from retro_ray.building.pages import CHUNKS_PER_PAGE
from retro_ray.embedding import ChunkEmbedder
from retro_ray.ray_session import num_cluster_cpus


class _OneThreadEmbedder:
    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._embedder = ChunkEmbedder()

    def embed(self, texts: list[str]) -> np.ndarray:
        return self._embedder.embed(texts)


class EmbedderPool:
    """Embeds pages of 1,024 chunks on one actor per core."""

    def __init__(self) -> None:
        actor = ray.remote(
            num_cpus=1, runtime_env={"env_vars": {**FAST_ALLOCATOR_ENV, "TOKENIZERS_PARALLELISM": "false"}}
        )
        self._actors = [actor(_OneThreadEmbedder).remote() for _ in range(num_cluster_cpus())]
        self.embed(["warm up"] * len(self._actors) * CHUNKS_PER_PAGE)

    @property
    def num_workers(self) -> int:
        return len(self._actors)

    def embed(self, texts: list[str]) -> np.ndarray:
        """Keys of `texts`, float32 [n, D], in their order."""
        pages = [texts[start : start + CHUNKS_PER_PAGE] for start in range(0, len(texts), CHUNKS_PER_PAGE)]
        actors: list[Any] = self._actors
        pool = ray.util.ActorPool(actors)
        return np.concatenate(list(pool.map(lambda actor, page: actor.embed.remote(page), pages)))

    def chunks_per_s(self, texts: list[str]) -> float:
        start = time.perf_counter()
        self.embed(texts)
        return len(texts) / (time.perf_counter() - start)

    def close(self) -> None:
        actors: list[Any] = self._actors
        for actor in actors:
            ray.kill(actor)
