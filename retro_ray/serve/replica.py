"""One replica of the service: a run's newest checkpoint in front of one database. Knows no Ray."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from retro_ray.database.store import Database
from retro_ray.errors import OverloadedError, RetroRayError
from retro_ray.generation.engine import GenerationEngine
from retro_ray.generation.events import GenerationEvent
from retro_ray.generation.fast_model import fast_model
from retro_ray.generation.neighbours import cited_neighbours
from retro_ray.generation.request import GenerationRequest, Rerank
from retro_ray.generation.scheduler import GenerationScheduler
from retro_ray.openmp import computing_alone
from retro_ray.serve.checkpoint_watch import CheckpointWatch
from retro_ray.serve.metrics import Instruments, MeasuredSearch, Search, ServiceMetrics
from retro_ray.serve.service import RetrievedText, ServedModel
from retro_ray.serve.settings import ServeSettings
from retro_ray.training.checkpoint import load_model
from retro_ray.training.run_folder import run_directory

logger = logging.getLogger(__name__)

_MAX_RETRIEVING = 4
"""Requests of /v1/retrieve at the same time; embedding them together gains nothing."""


@dataclass(frozen=True)
class _Loaded:
    """A checkpoint, ready to generate."""

    engine: GenerationEngine
    step: int
    taken_up: int
    """Seconds since 1970."""


class Replica:
    """A GenerationService over a trained run.

    Args:
        settings: of the service.
        database: whose tokenizer and chunking the model must have; edits of it are the retriever's business.
        search: finds neighbours.
        instruments: where figures go.
        device: of the model.

    Raises:
        CheckpointError: the run has no whole checkpoint.
        MismatchError: model and database do not belong together.
    """

    def __init__(
        self,
        settings: ServeSettings,
        database: Database,
        search: Search,
        instruments: Instruments,
        device: torch.device | str = "cpu",
    ) -> None:
        self._settings = settings
        self._database = database
        self._search = search
        self._metrics = ServiceMetrics(instruments)
        self._measured_search = MeasuredSearch(search, self._metrics)
        self._device = torch.device(device)
        directory = run_directory(settings.home, settings.run)
        self._watch = CheckpointWatch(directory)
        self._loaded = self._load(directory)
        self._scheduler = GenerationScheduler(
            self._loaded.engine,
            max_batch_size=settings.max_batch_size,
            max_cached_tokens=settings.max_cached_tokens,
            max_queued=settings.max_queued,
        )
        self._num_retrieving = 0
        self._retrieving = asyncio.Semaphore(_MAX_RETRIEVING)
        self._database_version = database.manifest.version
        self._retrieval_problem: str | None = None
        self._is_closing = False
        self._background: list[asyncio.Task[None]] = []

    def model(self) -> ServedModel:
        config = self._loaded.engine.model.config
        return ServedModel(
            name=self._settings.run,
            created=self._loaded.taken_up,
            checkpoint_step=self._loaded.step,
            context_length=config.context_length,
            chunk_length=config.chunk_length,
            num_neighbours=config.num_neighbours,
            database_version=self._database_version,
        )

    def check_alive(self) -> None:
        """Raises RuntimeError if what goes on beside the requests has failed: only a new replica mends that."""
        for task in self._background:
            if task.done() and not task.cancelled():
                raise RuntimeError("a background task of the replica has ended") from task.exception()

    def problems(self) -> list[str]:
        problems = ["the replica is shutting down"] if self._is_closing else []
        return problems + ([self._retrieval_problem] if self._retrieval_problem else [])

    def check(self, request: GenerationRequest) -> None:
        self._scheduler.check(request)

    def stream(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        return self._metrics.measured(self._scheduler.stream(request))

    async def retrieve(
        self, texts: Sequence[str], num_neighbours: int | None, rerank: Rerank | None
    ) -> list[RetrievedText]:
        if self._num_retrieving >= _MAX_RETRIEVING + self._settings.max_queued:
            raise OverloadedError(f"{self._num_retrieving} retrievals run and wait already: try again")
        self._num_retrieving += 1
        try:
            async with self._retrieving:
                return await asyncio.to_thread(self._retrieve, texts, num_neighbours, rerank)
        finally:
            self._num_retrieving -= 1

    async def start(self) -> None:
        settings = self._settings
        self._background = [
            asyncio.create_task(self._watch.follow(self._load, self._take_up, settings.refresh_s)),
            asyncio.create_task(self._look_after(settings.refresh_s)),
        ]
        for task in self._background:
            task.add_done_callback(_log_failure)

    async def close(self) -> None:
        self._is_closing = True
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await asyncio.to_thread(self._scheduler.close, self._settings.drain_s)

    @computing_alone()
    def _load(self, path: Path) -> _Loaded:
        """The checkpoint at `path`, or the newest one of a run."""
        model, _, meta = load_model(path, self._database.manifest, self._device)
        engine = GenerationEngine(
            fast_model(model, int8=self._settings.int8),
            self._database.tokenizer,
            self._measured_search,
            prefetch=self._settings.prefetch,
            speculate=self._settings.speculate,
        )
        logger.info("loaded step %d of run %s", meta.step, self._settings.run)
        return _Loaded(engine, meta.step, int(time.time()))

    def _take_up(self, loaded: _Loaded) -> None:
        """Generate with it from the next request on; what runs ends with what it began with."""
        self._scheduler.replace_engine(loaded.engine)
        self._loaded = loaded

    @computing_alone()
    def _retrieve(self, texts: Sequence[str], num_neighbours: int | None, rerank: Rerank | None) -> list[RetrievedText]:
        config = self._loaded.engine.model.config
        k = num_neighbours or config.num_neighbours
        found = self._measured_search.retrieve_texts(texts, k, rerank)
        return [
            RetrievedText(
                neighbours=cited_neighbours(found, row, config.chunk_length, self._database.tokenizer),
                missing_shards=found.missing_shards,
            )
            for row in range(len(texts))
        ]

    async def _look_after(self, interval_s: float) -> None:
        """Keep the figures, the database's version and what readiness says up to date."""
        while True:
            stats = self._scheduler.stats()
            self._metrics.batch_size.set(stats.active)
            self._metrics.queued.set(stats.queued)
            self._metrics.cached_tokens.set(stats.cached_tokens)
            self._metrics.cache_size.set(stats.max_cached_tokens)
            await asyncio.to_thread(self._look_at_database)
            await asyncio.sleep(interval_s)

    @computing_alone()
    def _look_at_database(self) -> None:
        try:
            self._database_version = Database.open(self._settings.home).manifest.version
            # One short search: whether the shards answer, though nobody asks them at the moment.
            self._search.retrieve_texts(["ready"], 1)
        except RetroRayError as error:
            if self._retrieval_problem is None:
                logger.warning("not ready: %s", error)
            self._retrieval_problem = str(error)
        else:
            self._retrieval_problem = None


def _log_failure(task: asyncio.Task[None]) -> None:
    """What goes on beside the requests does so for ever: its end is a failure that nobody waits for."""
    if not task.cancelled():
        logger.error("a background task of the replica has ended", exc_info=task.exception())
