"""A real replica, of a model that a test can afford; over a socket if need be."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI

from retro_ray.config import RunConfig
from retro_ray.database.store import Database
from retro_ray.model.retro import RetroModel
from retro_ray.retrieval.retriever import NeighbourSet
from retro_ray.serve.replica import Replica
from retro_ray.serve.settings import ServeSettings
from retro_ray.training.checkpoint import CheckpointMeta, save_checkpoint
from retro_ray.training.run_folder import run_directory
from tests.fakes import write_tiny_database
from tests.unit.generation.fakes import CHUNK_LENGTH, HashSearch, make_model


class TextHashSearch(HashSearch):
    """Neighbours that are a function of the text alone."""

    error: Exception | None = None

    def retrieve_texts(self, texts: Sequence[str], k: int, rerank: str | None = None) -> NeighbourSet:
        if self.error is not None:
            raise self.error
        return self.retrieve_chunks([list(text.encode()) for text in texts], k, rerank)

    def retrieve_chunks(self, chunks: Sequence[Sequence[int]], k: int, rerank: str | None = None) -> NeighbourSet:
        """Reranked, they are others."""
        return super().retrieve_chunks([[*chunk, 7] for chunk in chunks] if rerank == "overlap" else chunks, k)


class Instrument:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.tags: list[dict[str, str] | None] = []

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        self.values.append(value)
        self.tags.append(tags)

    observe = set

    def inc(self, value: float = 1.0, tags: dict[str, str] | None = None) -> None:
        assert value > 0, "Ray's counters refuse it"
        self.set(value, tags)


class Instruments:
    """Instruments by name, as ray.util.metrics makes them."""

    def __init__(self) -> None:
        self.made: dict[str, Instrument] = {}

    def __getitem__(self, name: str) -> Instrument:
        return self.made[f"retro_ray_{name}"]

    def _make(self, name: str, description: str, *_: object) -> Instrument:
        assert description
        assert name not in self.made
        return self.made.setdefault(name, Instrument())

    Counter = Gauge = Histogram = _make


class StatelessOptimizer:
    def tensors(self) -> dict[str, torch.Tensor]:
        return {"momentum": torch.zeros(1)}


def write_run(home: Path, model: RetroModel, step: int, *, tokenizer_fingerprint: str | None = None) -> None:
    """A checkpoint of the run `default`."""
    manifest = Database.open(home).manifest
    meta = CheckpointMeta(
        step=step,
        config=RunConfig(recipe="tiny", model=model.config),
        tokenizer_fingerprint=tokenizer_fingerprint or manifest.tokenizer_fingerprint,
        chunking_fingerprint=manifest.chunking_fingerprint,
        database_version=manifest.version,
    )
    save_checkpoint(run_directory(home, "default"), meta, model, StatelessOptimizer(), keep=0)


def write_home(home: Path, num_chunks: int = 10) -> Database:
    """A database, and a run with a checkpoint of step 3 whose context holds so many chunks."""
    database = write_tiny_database(home, chunk_length=CHUNK_LENGTH)
    write_run(home, make_model(database.manifest.vocab_size, num_chunks=num_chunks), 3)
    return database


def new_replica(home: Path, instruments: Instruments | None = None, **settings) -> Replica:
    """A replica of what `write_home` has written; whoever starts it ends it with `close`."""
    database = Database.open(home)
    search = TextHashSearch(database.manifest.vocab_size, missing_shards=(1,))
    return Replica(
        ServeSettings(home=home, **{"drain_s": 0, **settings}), database, search, instruments or Instruments()
    )


@contextmanager
def listening(api: FastAPI) -> Iterator[int]:
    """The API behind uvicorn on the loopback; yields its port."""
    server = uvicorn.Server(uvicorn.Config(api, port=0, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def wait_until(is_so: Callable[[], bool]) -> None:
    """Returns once `is_so`; a test that waits for what never comes fails."""
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)
