"""What do edits cost, and does anyone ever see a wrong answer while they happen?

Clients search a database through its shard actors without a pause. Meanwhile its documents are
updated to a newer version of the same corpus, single documents are added and deleted as a service
does it, others with the commands, and the database is compacted. Every answer is checked against
what was committed when its search began.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import ray

from retro_ray.building.build import DatabaseBuilder
from retro_ray.building.edit import DatabaseEditor
from retro_ray.building.reading import CorpusReader
from retro_ray.command_line import parse, run
from retro_ray.config import CorpusConfig, DatabaseConfig
from retro_ray.database.format import database_directory
from retro_ray.database.store import Database
from retro_ray.errors import ConfigError
from retro_ray.ray_session import connect
from retro_ray.retrieval.announce import announce_commit
from retro_ray.retrieval.retriever import NeighbourSet
from retro_ray.retrieval.shard_actor import stop_shard_actors
from retro_ray.retrieval.sharded import ShardedRetriever
from retro_ray.text.corpus import Document

_K = 10
_NUM_QUERIES = 512
_CHUNK_CHARACTERS = 250


@dataclass(frozen=True, kw_only=True)
class EditsBenchmark:
    """Update a database from one version of a corpus to another, and edit it further, while clients search it."""

    before: Path
    """Corpus to build the database from; documents need ids."""
    after: Path
    """Newer version of the same corpus, to update it to."""
    home: Path | None = None
    """A home built from --before; it is edited in a copy, or with --service in place. Default: one is built."""
    service: str | None = None
    """Address of a service of --home, such as http://localhost:8000, to generate through meanwhile."""
    num_clients: int = 4
    """Threads that search, each one query at a time."""
    num_small_edits: int = 20
    """Additions and deletions of single documents."""
    quiet_s: float = 10.0
    """How long clients search before the first edit."""
    json: Path | None = None
    """Write the metrics to this file."""


@dataclass(frozen=True)
class Truth:
    """What was committed when a client asked."""

    live: np.ndarray
    """bool: which chunk_ids an answer may hold; later ones are new, and may be there as well."""

    @classmethod
    def of(cls, home: Path) -> Truth:
        database = Database.open(home)
        return cls(database.locate(np.arange(database.manifest.next_chunk_id))[0] >= 0)

    def num_wrong(self, chunk_ids: np.ndarray) -> int:
        """How many of the chunks may not be seen any longer."""
        known = chunk_ids[(chunk_ids >= 0) & (chunk_ids < len(self.live))]
        return int((~self.live[known]).sum())


Ask = Callable[[Truth], int]
"""Makes one request, and returns how much of the answer was deleted before it."""


@dataclass
class Observations:
    """What clients saw, in one phase."""

    latencies_s: list[float] = field(default_factory=list)
    deleted_seen: int = 0
    errors: list[str] = field(default_factory=list)

    def milliseconds(self, percentile: float) -> float:
        return float(np.percentile(self.latencies_s, percentile)) * 1e3 if self.latencies_s else float("nan")


class Clients:
    """Threads that ask until they are stopped; `truth` and `seen` may be replaced meanwhile."""

    def __init__(self, truth: Truth) -> None:
        self.truth = truth
        self.seen = Observations()
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, ask: Ask, count: int) -> None:
        """Begin to ask, in `count` threads."""
        for _ in range(count):
            thread = threading.Thread(target=self._work, args=(ask,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self, ask: Ask) -> None:
        while not self._stopping.is_set():
            truth, seen, start = self.truth, self.seen, time.perf_counter()
            try:
                seen.deleted_seen += ask(truth)
                seen.latencies_s.append(time.perf_counter() - start)
            except Exception as error:  # what a client sees is what is measured
                seen.errors.append(repr(error)[:300])

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()


def searches(retriever: ShardedRetriever, queries: np.ndarray) -> Ask:
    """What a searching client does."""
    turn = itertools.count()

    def ask(truth: Truth) -> int:
        row = next(turn) % len(queries)
        return truth.num_wrong(retriever.search(queries[row : row + 1], _K).chunk_ids)

    return ask


def completions(address: str, prompts: list[str]) -> Ask:
    """What a client of the service does: a completion, and a look at what it cites."""
    url, turn = urlsplit(address), itertools.count()

    def ask(truth: Truth) -> int:
        with contextlib.closing(http.client.HTTPConnection(url.hostname or "", url.port, timeout=120)) as connection:
            body = {"prompt": prompts[next(turn) % len(prompts)], "max_tokens": 96, "temperature": 0}
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            reply = connection.getresponse()
            content = json.loads(reply.read())
        if reply.status != 200:
            raise RuntimeError(f"status {reply.status}: {content}")
        citations = [citation for choice in content["choices"] for citation in choice["citations"]]
        return truth.num_wrong(np.array([one["chunk_id"] for c in citations for one in c["neighbours"]], np.int64))

    return ask


class Edits:
    """Makes the edits, and after each of them tells the clients what holds from now on."""

    def __init__(self, home: Path, clients: Sequence[Clients], retriever: ShardedRetriever) -> None:
        self._home, self._clients, self._retriever = home, clients, retriever
        self._editor = DatabaseEditor(home, announce=announce_commit)
        self.added_missing = 0

    def command(self, *arguments: str) -> dict[str, Any]:
        """Run `python -m retro_ray ARGUMENTS`; what it reports, with its wall time."""
        start = time.perf_counter()
        environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        done = subprocess.run(
            [sys.executable, "-m", "retro_ray", *arguments, "--home", str(self._home), "--json"],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return {**json.loads(done.stdout), "wall_s": time.perf_counter() - start}

    def returned(self, *, added: bool = False) -> None:
        """An edit has returned: from now on, nothing else may be seen; what it added must be."""
        if added:
            self.added_missing += self._num_missing()
        truth = Truth.of(self._home)
        for clients in self._clients:
            clients.truth = truth

    def _num_missing(self) -> int:
        """Live chunks of the newest segment that a search by their own key does not find."""
        database = Database.open(self._home)
        store = database.segments[-1]
        rows = np.flatnonzero(~database.deleted.rows(store.chunk_id_base, store.num_chunks))
        own = store.chunk_id_base + rows
        found: NeighbourSet = self._retriever.search(store.keys[rows], _K)
        # Where the text stands in _K places and more, all of them are at distance 0, and this one may be behind.
        crowded_out = found.distances[:, -1] <= found.distances[:, 0]
        return int((~(found.chunk_ids == own[:, None]).any(1) & ~crowded_out).sum())

    def one_by_one(self, documents: list[Document]) -> tuple[list[float], list[float]]:
        """Add each document alone, then delete each alone, as a service would; seconds of each."""
        add_s = []
        for document in documents:
            add_s.append(self._editor.add([document]).seconds)
            self.returned(added=True)
        delete_s = []
        for document in documents:
            delete_s.append(self._editor.delete([document.id]).seconds)
            self.returned()
        return add_s, delete_s


def measure(benchmark: EditsBenchmark) -> dict[str, Any]:
    """The metrics."""
    connect()
    with tempfile.TemporaryDirectory() as folder:
        home, build = _prepare(benchmark, Path(folder))
        database = Database.open(home)
        retriever = ShardedRetriever(database)
        retriever.wait_until_ready()
        clients = Clients(Truth.of(home))
        clients.start(searches(retriever, _sample_keys(database)), benchmark.num_clients)
        generating = Clients(clients.truth)
        if benchmark.service is not None:
            generating.start(completions(benchmark.service, _prompts(benchmark.before)), 1)
        time.sleep(benchmark.quiet_s)
        quiet, clients.seen = clients.seen, Observations()
        metrics = _edit(benchmark, Edits(home, (clients, generating), retriever), Path(folder))
        clients.stop()
        generating.stop()
        stop_shard_actors(database_directory(home))
    during = clients.seen
    errors = quiet.errors + during.errors + generating.seen.errors
    for error in errors[:3]:
        print(f"error: {error}", file=sys.stderr)
    return {
        "errors": len(errors),
        "deleted_seen": quiet.deleted_seen + during.deleted_seen + generating.seen.deleted_seen,
        "num_searches": len(quiet.latencies_s) + len(during.latencies_s),
        "num_completions": len(generating.seen.latencies_s),
        "p50_ms_before": quiet.milliseconds(50),
        "p99_ms_before": quiet.milliseconds(99),
        "p50_ms_during": during.milliseconds(50),
        "p99_ms_during": during.milliseconds(99),
        **build,
        **metrics,
    }


def _edit(benchmark: EditsBenchmark, edits: Edits, folder: Path) -> dict[str, Any]:
    """All edits, one after another; what each cost."""
    newer = list(CorpusReader(CorpusConfig(input=(str(benchmark.after),))))
    new = [_renamed(document, number) for number, document in enumerate(newer[: benchmark.num_small_edits])]
    add_s, delete_s = edits.one_by_one(new)
    update = edits.command("update", str(benchmark.after))
    edits.returned(added=True)
    bulk = [_renamed(document, len(new) + number) for number, document in enumerate(newer[: benchmark.num_small_edits])]
    path = folder / "bulk.jsonl"
    path.write_text("".join(json.dumps(vars(document)) + "\n" for document in bulk), encoding="utf-8")
    added = edits.command("add", str(path))
    edits.returned(added=True)
    deleted = edits.command("delete", "--document", *(document.id for document in bulk))
    edits.returned()
    compacted = edits.command("compact")
    edits.returned()
    return {
        "added_missing": edits.added_missing,
        "add_one_s": float(np.median(add_s)),
        "delete_one_s": float(np.median(delete_s)),
        "update_s": update["seconds"],
        "update_documents": update["documents_added"],
        "update_ms_per_chunk": update["seconds"] * 1e3 / update["chunks_added"],
        "update_command_s": update["wall_s"],
        "add_command_s": added["wall_s"],
        "delete_command_s": deleted["wall_s"],
        "compact_s": compacted["seconds"],
    }


def _renamed(document: Document, number: int) -> Document:
    """A document of an id of its own, and of text of its own: half a document, so that it is no copy."""
    return Document(f"new/{number}", document.title, document.source, document.text[: len(document.text) // 2 + number])


def _prepare(benchmark: EditsBenchmark, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The home to edit, and what its build cost."""
    if benchmark.home is None:
        start = time.perf_counter()
        corpus = CorpusConfig(input=(str(benchmark.before),))
        manifest = DatabaseBuilder(folder / "home", corpus, DatabaseConfig(validation_share=0.0)).run()
        seconds = time.perf_counter() - start
        costs = {"build_s": seconds, "build_ms_per_chunk": seconds * 1e3 / manifest.num_chunks}
        return folder / "home", {"chunks": manifest.num_chunks, **costs}
    home = benchmark.home.expanduser().absolute()
    if benchmark.service is None:
        # Files of a database are never written to again: links are copies. The lock is another matter.
        shutil.copytree(home / "database", folder / "home" / "database", copy_function=_link, dirs_exist_ok=True)
        (folder / "home" / "database" / ".lock").unlink(missing_ok=True)
        home = folder / "home"
    return home, {"chunks": Database.open(home).manifest.num_live_chunks}


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # on another file system
        shutil.copy2(source, target)


def _sample_keys(database: Database) -> np.ndarray:
    """Keys of random chunks, float32 [n, D]."""
    keys = np.concatenate([store.keys for store in database.segments])
    return keys[np.random.default_rng(0).integers(0, len(keys), _NUM_QUERIES)]


def _prompts(corpus: Path) -> list[str]:
    documents: Iterator[Document] = iter(CorpusReader(CorpusConfig(input=(str(corpus),))))
    return [document.text[: 2 * _CHUNK_CHARACTERS] for document in itertools.islice(documents, 64)]


def main(benchmark: EditsBenchmark) -> None:
    """Measure and report."""
    if benchmark.service is not None and benchmark.home is None:
        raise ConfigError("--service needs --home: the home that the service serves")
    metrics = measure(benchmark)
    for name, value in metrics.items():
        print(f"{name:>22}  {value:,.5g}")
    if benchmark.json is not None:
        benchmark.json.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parsed = parse(EditsBenchmark, "python -m benchmarks.edits")
    run(lambda: main(parsed))
