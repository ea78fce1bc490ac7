"""What a build runs as Ray tasks, beside the stages of Ray Data.

A worker imports the module of the task that it runs. This one needs neither torch nor Ray Data, which
take each worker seconds and a third of a gigabyte.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from retro_ray.building.survey import survey_unit, write_survey
from retro_ray.config import CorpusConfig, RetrievalConfig
from retro_ray.database.format import FileRecord, Manifest, Partition, file_problem, file_record
from retro_ray.database.store import ChunkStore, Database
from retro_ray.database.token_statistics import num_holding
from retro_ray.retrieval.neighbours import write_neighbours
from retro_ray.retrieval.sharded import ShardedRetriever
from retro_ray.text.corpus import ReadUnit


def survey_to_disk(unit: ReadUnit, corpus: CorpusConfig, sample_share: float, folder: Path) -> None:
    """Read a unit through and write down what is in it."""
    write_survey(survey_unit(unit, corpus, sample_share), folder)


def count_tokens(directory: Path, partition: Partition, chunk_length: int, vocab_size: int) -> np.ndarray:
    """How many chunks of a partition hold each token, int64 [V]."""
    return num_holding([ChunkStore(directory, partition, chunk_length)], vocab_size)


def named_record(directory: Path, path: str) -> tuple[str, FileRecord]:
    """A file's name and its checksum."""
    return path, file_record(directory / path)


def named_problem(path: Path, record: FileRecord) -> tuple[Path, str | None]:
    """A file's name and what is wrong with it, if anything."""
    return path, file_problem(path, record)


def search_neighbours(directory: Path, manifest: Manifest, partition: Partition, retrieval: RetrievalConfig) -> int:
    """Write the neighbours of all chunks of a partition; returns how many were missing."""
    database = Database(directory, manifest)
    store = ChunkStore(directory, partition, manifest.chunk_length)
    path = directory / partition.neighbours
    retriever = ShardedRetriever(database, retrieval, pinned=True)
    return write_neighbours(store, retriever, manifest.num_neighbours, path, database)
