"""Scoring a checkpoint on the validation split or on text of one's own, spread over Ray actors."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import ray
import torch
from ray.util import ActorPool

from retro_ray.allocator import FAST_ALLOCATOR_ENV
from retro_ray.config import CorpusConfig
from retro_ray.database.format import Manifest
from retro_ray.database.reading import CorpusReader
from retro_ray.database.store import Database
from retro_ray.evaluation.bits_per_byte import RetrievalMode, choose_documents, document_groups, score_documents
from retro_ray.evaluation.current_neighbours import validation_text
from retro_ray.evaluation.own_text import (
    NeighbourSearch,
    ScoredText,
    count_document_words,
    first_neighbours,
    write_own_text,
)
from retro_ray.evaluation.scores import BitsPerByte
from retro_ray.progress import progress_bar
from retro_ray.ray_session import num_cluster_gpus, num_free_cpus
from retro_ray.retrieval.retriever import open_embedder
from retro_ray.text.chunking import chunk_document
from retro_ray.training.checkpoint import find_checkpoint, load_model, require_match
from retro_ray.training.run_folder import run_directory

logger = logging.getLogger(__name__)

MODES: tuple[RetrievalMode, ...] = get_args(RetrievalMode)


@dataclass(frozen=True)
class Evaluation:
    """Bits per byte of one checkpoint on some documents, by retrieval mode."""

    input: tuple[str, ...] | None
    """What the documents were read from; None: the validation split."""
    checkpoint: Path
    step: int
    database_version: str
    database_generation: int
    num_neighbours: int
    num_documents: int
    num_chunks: int
    num_words: int
    scores: dict[RetrievalMode, BitsPerByte]

    def to_dict(self) -> dict[str, Any]:
        """What --json writes."""
        some = self.scores["on"]
        bits = {mode: score.value for mode, score in self.scores.items()}
        return {
            "input": None if self.input is None else list(self.input),
            "checkpoint": str(self.checkpoint),
            "step": self.step,
            "database_version": self.database_version,
            "database_generation": self.database_generation,
            "num_neighbours": self.num_neighbours,
            "documents": self.num_documents,
            "chunks": self.num_chunks,
            "tokens": some.num_tokens,
            "words": self.num_words,
            "text_bytes": some.num_bytes,
            "bits_per_byte": bits,
            "token_perplexity": {mode: score.token_perplexity for mode, score in self.scores.items()},
            "word_perplexity": {mode: score.word_perplexity(self.num_words) for mode, score in self.scores.items()},
            "last_token_accuracy": {mode: score.last_token_accuracy for mode, score in self.scores.items()},
            "gain_on_over_off": 1 - bits["on"] / bits["off"],
            "gain_random_over_off": 1 - bits["random"] / bits["off"],
        }


class Scorer:
    """Holds a checkpoint and scores documents.

    Args:
        directory: of the database.
        manifest: the generation to evaluate in, whatever is committed meanwhile.
        text: the documents, with at least as many neighbours per chunk as are used.
        checkpoint: of the model.
        num_neighbours: per chunk.
        num_threads: for torch.
    """

    def __init__(
        self,
        directory: Path,
        manifest: dict[str, Any],
        text: ScoredText,
        checkpoint: Path,
        num_neighbours: int,
        num_threads: int,
    ) -> None:
        torch.set_num_threads(num_threads)
        self._database = Database(directory, Manifest.from_dict(manifest))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model, _, _ = load_model(checkpoint, self._database.manifest, device)
        self._num_neighbours = num_neighbours
        self._store = text.open(self._database.chunk_length)
        self._neighbours = None if text.neighbours is None else first_neighbours(text.neighbours, num_neighbours)

    def score(self, mode: RetrievalMode, documents: Sequence[int]) -> tuple[RetrievalMode, BitsPerByte]:
        score = score_documents(
            self._model,
            self._store,
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
    corpus: CorpusConfig | None = None,
    num_neighbours: int | None = None,
    max_chunks: int | None = None,
    num_workers: int | None = None,
) -> Evaluation:
    """Score the newest checkpoint of a run with retrieval on, off, and with random neighbours.

    Neighbours are those in the database as it is now: after edits they are searched again first.

    Args:
        home: of the database and the run.
        run: its name.
        corpus: documents to score, which need not be in any database. Default: the validation split.
        num_neighbours: per chunk. Default: as many as in training.
        max_chunks: score about so many chunks, of documents chosen at random. Default: all.
        num_workers: actors. Default: one per GPU, else one per CPU.

    Raises:
        DatabaseError: the database has no validation split.
        InputError: the corpus does not exist, or holds no document.
        CheckpointError: the run has no checkpoint.
        ConfigError: fewer neighbours are stored with the validation split.
        MismatchError: checkpoint and database, or embedder and database, do not belong together.
    """
    database = Database.open(home)
    folder, meta = find_checkpoint(run_directory(home, run))
    require_match(meta, database.manifest)
    count = meta.config.model.num_neighbours if num_neighbours is None else num_neighbours
    with _scored_text(home, database, corpus, count) as text:
        store = text.open(database.chunk_length)
        documents = choose_documents(store, max_chunks if max_chunks is not None else store.num_chunks)
        tasks = [(mode, part) for part in document_groups(documents, store.document_num_chunks) for mode in MODES]
        settings = (database.directory, database.manifest.to_dict(), text, folder, count, 1)
        sums: dict[RetrievalMode, list[BitsPerByte]] = {mode: [] for mode in MODES}
        results = _pool(settings, num_workers).map_unordered(lambda scorer, task: scorer.score.remote(*task), tasks)
        for mode, score in progress_bar(len(tasks), "evaluate", iterable=results):
            sums[mode].append(score)
        return Evaluation(
            input=None if corpus is None else corpus.input,
            checkpoint=folder,
            step=meta.step,
            database_version=database.manifest.version,
            database_generation=database.manifest.generation,
            num_neighbours=count,
            num_documents=len(documents),
            num_chunks=int(store.document_num_chunks[documents].sum()),
            num_words=count_document_words(database, store, documents),
            scores={mode: _total(parts) for mode, parts in sums.items()},
        )


def _pool(settings: tuple[Any, ...], num_workers: int | None) -> ActorPool:
    """Actors that are each a Scorer."""
    num_gpus = num_cluster_gpus()
    num_workers = num_workers or num_gpus or num_free_cpus()
    actor = ray.remote(num_cpus=0 if num_gpus else 0.9, num_gpus=1 if num_gpus else 0)(Scorer)
    actor = actor.options(runtime_env={"env_vars": FAST_ALLOCATOR_ENV})
    return ActorPool([actor.remote(*settings) for _ in range(num_workers)])


@contextmanager
def _scored_text(
    home: Path, database: Database, corpus: CorpusConfig | None, num_neighbours: int
) -> Iterator[ScoredText]:
    """The documents to score, where every worker can read them."""
    if corpus is None:
        yield validation_text(database, num_neighbours)
        return
    reader = CorpusReader(corpus)
    chunked = (chunk_document(document, database.tokenizer, database.chunk_length) for document in reader)
    (home / "cache").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="evaluation-input-", dir=home / "cache") as folder:
        search = NeighbourSearch(database, open_embedder(database))
        text = write_own_text(Path(folder), chunked, database, search, num_neighbours)
        if reader.skipped:
            first = reader.skipped[0]
            logger.warning("%d records skipped; first: %s: %s", len(reader.skipped), first.source, first.reason)
        yield text


def _total(parts: Sequence[BitsPerByte]) -> BitsPerByte:
    """The sum, exact whatever the order in which workers answered."""
    return BitsPerByte(
        math.fsum(part.nats for part in parts),
        sum(part.num_tokens for part in parts),
        sum(part.num_bytes for part in parts),
        sum(part.num_last_tokens for part in parts),
        sum(part.num_last_right for part in parts),
    )
