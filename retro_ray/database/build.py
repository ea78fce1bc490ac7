"""Building a retrieval database on Ray, from documents to the committed manifest.

    plan -> survey -> tokenizer -> chunk and embed (Ray Data) -> assemble shards -> index -> neighbours -> commit

Every stage leaves files that appear whole or not at all, under a folder named by what was asked for;
a run that finds them goes on from there. So a job killed at any moment is continued by starting it
again, and nothing is a database before its manifest is written.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import os
import platform
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
import transformers
from fsspec.core import url_to_fs

from retro_ray.allocator import FAST_ALLOCATOR_ENV
from retro_ray.config import CorpusConfig, DatabaseConfig
from retro_ray.database import survey as surveys
from retro_ray.database.assemble import assemble_partition
from retro_ray.database.embed_pages import PageEmbedder, chunk_units, unit_is_finished
from retro_ray.database.format import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    FileRecord,
    IndexSpec,
    Manifest,
    Partition,
    database_directory,
    fingerprint,
    read_manifest,
    write_manifest,
)
from retro_ray.database.keys import sample_keys
from retro_ray.database.pages import CHUNKS_PER_PAGE
from retro_ray.database.split import VALIDATION, Split
from retro_ray.database.tasks import fill_shard, named_problem, named_record, search_neighbours, survey_to_disk
from retro_ray.embedding import ChunkEmbedder
from retro_ray.errors import ConfigError, DatabaseError
from retro_ray.index.build import choose_index, num_training_keys, train_index, write_index
from retro_ray.progress import progress_bar
from retro_ray.ray_session import num_cluster_gpus, num_free_cpus, run_tasks
from retro_ray.retrieval.shard_actor import stop_shard_actors
from retro_ray.text import python_docs
from retro_ray.text.corpus import ReadUnit, SkippedRecord, plan_units
from retro_ray.text.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer

logger = logging.getLogger(__name__)

_BYTES_PER_SHARD = 16 << 30
_MIN_SHARDS = 2
# Ray Data cuts blocks at this size. A page is larger, so every page is a block and all embedders get some.
_BLOCK_BYTES = 1 << 15
# An embedder actor and a chunking task that feeds it share a CPU, so that both run where there is only one.
_CPUS_PER_EMBEDDER = 0.75
_CPUS_PER_CHUNKER = 0.25


class DatabaseBuilder:
    """Builds the database of a home, or goes on with an interrupted build of the same.

    Args:
        home: folder that all nodes of the cluster share.
        corpus: what to read.
        config: what to make of it.
    """

    def __init__(self, home: Path, corpus: CorpusConfig, config: DatabaseConfig) -> None:
        self._home = home
        self._directory = database_directory(home)
        self._corpus = corpus
        self._config = config
        self._stage_seconds: dict[str, float] = {}

    def run(self) -> Manifest:
        """Build and commit.

        Raises:
            RetroRayError: the input, a setting or the disk is not as needed. The database that was
                there before is untouched, and finished work is kept for the next run.
        """
        with self._lock():
            with self._stage("plan"):
                units = self._plan()
            self._remove_torn_files()
            if (manifest := self._existing()) is not None:
                logger.info("the database in %s is up to date (version %s)", self._directory, manifest.version)
                self._clear_work(manifest)
                return manifest
            with self._stage("survey"):
                hashes, skipped = self._survey(units)
            split = Split.of(hashes, self._num_shards(units), self._config.validation_share, self._config.seed)
            with self._stage("tokenizer"):
                tokenizer = self._prepare_tokenizer(units)
            with self._stage("embed"):
                self._chunk_and_embed(units, split, tokenizer)
            with self._stage("assemble"):
                partitions = self._assemble(units, split, tokenizer)
            with self._stage("index"):
                manifest = self._index(partitions, tokenizer, skipped)
            with self._stage("neighbours"):
                manifest = self._find_neighbours(manifest)
            return self._commit(manifest, skipped)

    @property
    def _build(self) -> Path:
        return self._directory / self._build_id

    @property
    def _work(self) -> Path:
        return self._build / "work"

    @property
    def _pages(self) -> Path:
        return self._work / "pages"

    @property
    def _tokenizer_folder(self) -> Path:
        return self._build / "tokenizer"

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        logger.info("%s ...", name)
        start = time.perf_counter()
        yield
        self._stage_seconds[name] = round(time.perf_counter() - start, 3)
        logger.info("%s: %.1f s", name, self._stage_seconds[name])

    @contextmanager
    def _lock(self) -> Iterator[None]:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            lock = (self._directory / ".lock").open("w")
        except OSError as error:
            raise ConfigError(
                f"cannot write to --home {self._home} ({os.strerror(error.errno or 0)}): pass a folder that can be "
                "written to"
            ) from error
        with lock as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DatabaseError(
                    f"another job is building the database in {self._directory}: wait for it, or pass another --home"
                ) from None
            yield

    def _plan(self) -> list[ReadUnit]:
        """Divide the input into units; what is asked for names the build."""
        units = plan_units(self._corpus)
        embedder = ChunkEmbedder(self._config.embedder, device="cpu", bf16=False)
        self._embedder_fingerprint, self._key_dim = embedder.fingerprint, embedder.dim
        self._build_id = fingerprint(
            {
                "format_version": FORMAT_VERSION,
                "chunks_per_page": CHUNKS_PER_PAGE,
                "corpus": dataclasses.asdict(self._corpus),
                "config": dataclasses.asdict(self._config),
                "embedder": self._embedder_fingerprint,
                "units": [unit.to_dict() for unit in units],
                "files": [_file_identities(unit) for unit in units],
            }
        )
        self._pages.mkdir(parents=True, exist_ok=True)
        return units

    def _existing(self) -> Manifest | None:
        """The committed manifest, if it is of this very build."""
        try:
            manifest = read_manifest(self._directory)
        except DatabaseError as error:
            logger.debug("no usable database yet: %s", error)
            return None
        if manifest.build != self._build_id:
            return None
        if damaged := self._damaged_files(manifest):
            logger.warning("%s %s: the database is built again", *damaged[0])
            shutil.rmtree(self._build, ignore_errors=True)
            (self._directory / MANIFEST_NAME).unlink()  # last: until then the next run sees the damage, too
            self._pages.mkdir(parents=True)
            return None
        return manifest

    def _damaged_files(self, manifest: Manifest) -> list[tuple[Path, str]]:
        """Files that are not what the manifest says, and what is wrong with each."""
        arguments = [(self._directory / path, record) for path, record in manifest.files.items()]
        found = run_tasks(ray.remote(named_problem), arguments, "verify")
        return sorted((path, problem) for path, problem in found if problem is not None)

    def _remove_torn_files(self) -> None:
        """What a killed run had not written to its end."""
        for torn in [*self._directory.glob(f"{MANIFEST_NAME}.tmp-*"), *self._build.rglob("*.tmp-*")]:
            torn.unlink(missing_ok=True)

    def _num_shards(self, units: list[ReadUnit]) -> int:
        if self._config.num_shards is not None:
            return self._config.num_shards
        return _MIN_SHARDS + sum(unit.size_bytes for unit in units) // _BYTES_PER_SHARD

    def _survey(self, units: list[ReadUnit]) -> tuple[np.ndarray, list[SkippedRecord]]:
        """Hashes of all document ids, uint64 [n], and what cannot be read."""
        folder = self._work / "survey"
        folder.mkdir(exist_ok=True)
        num_bytes = sum(unit.size_bytes for unit in units)
        share = min(1.0, surveys.MAX_SAMPLE_BYTES / max(1, num_bytes))
        todo = [unit for unit in units if not surveys.survey_path(folder, unit.index).exists()]
        task = ray.remote(survey_to_disk)
        for _ in run_tasks(task, [(unit, self._corpus, share, folder) for unit in todo], "read"):
            pass
        summaries = [json.loads(surveys.survey_path(folder, unit.index).read_text()) for unit in units]
        skipped = [SkippedRecord(**record) for summary in summaries for record in summary["skipped"]]
        num_documents = sum(summary["num_documents"] for summary in summaries)
        surveys.refuse_empty_corpus(skipped, num_documents, self._corpus)
        hashes = [surveys.read_hashes(folder, unit.index) for unit in units]
        surveys.refuse_doubled_ids(hashes, units, self._corpus)
        self._num_text_bytes = sum(summary["num_bytes"] for summary in summaries)
        logger.info("%d documents, %.1f MB, %d skipped", num_documents, self._num_text_bytes / 1e6, len(skipped))
        return np.concatenate(hashes), skipped

    def _prepare_tokenizer(self, units: list[ReadUnit]) -> TextTokenizer:
        if self._tokenizer_folder.exists():
            return TextTokenizer.load(self._tokenizer_folder)
        name = self._config.tokenizer
        if name.startswith("train:"):
            tokenizer = train_tokenizer(self._sample(units), int(name.removeprefix("train:")), name)
        else:
            tokenizer = load_tokenizer(name)
        unfinished = self._work / "tokenizer"
        tokenizer.save(unfinished)
        unfinished.rename(self._tokenizer_folder)
        return tokenizer

    def _sample(self, units: list[ReadUnit]) -> Iterator[str]:
        num_bytes = 0
        for unit in units:
            for text in surveys.read_sample(self._work / "survey", unit.index):
                num_bytes += len(text.encode())
                if num_bytes > surveys.MAX_SAMPLE_BYTES:
                    return
                yield text

    def _chunk_and_embed(self, units: list[ReadUnit], split: Split, tokenizer: TextTokenizer) -> None:
        todo = [unit for unit in units if not unit_is_finished(self._pages, unit.index)]
        if not todo:
            return
        context = ray.data.DataContext.get_current()
        context.target_max_block_size = _BLOCK_BYTES
        # One bar of ours, in chunks, in place of Ray Data's bars and its lines about each stage.
        context.enable_progress_bars = False
        context.raise_original_map_exception = True  # Ray Data's own hides what failed: a full disk, say
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        num_cpus, num_gpus = num_free_cpus(), num_cluster_gpus()
        num_embedders = num_gpus or num_cpus
        embedder_resources: dict[str, Any] = {"num_gpus": 1} if num_gpus else {"num_cpus": _CPUS_PER_EMBEDDER}
        receipts = (
            ray.data.from_items([{"unit": json.dumps(unit.to_dict())} for unit in todo], override_num_blocks=len(todo))
            .map_batches(
                chunk_units,  # pyright: ignore[reportArgumentType] (generators are accepted, but not declared)
                fn_kwargs={
                    "pages": self._pages,
                    "corpus": self._corpus,
                    "split": split,
                    "tokenizer_folder": self._tokenizer_folder,
                    "chunk_length": self._config.chunk_length,
                },
                batch_size=1,
                compute=ray.data.TaskPoolStrategy(size=max(1, num_cpus // 4)),
                num_cpus=_CPUS_PER_CHUNKER,
                runtime_env={"env_vars": {"TOKENIZERS_PARALLELISM": "false"}},
            )
            .map_batches(
                PageEmbedder,
                fn_constructor_args=(self._pages, self._tokenizer_folder, self._config.embedder, 1),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=num_embedders),
                runtime_env={"env_vars": {**FAST_ALLOCATOR_ENV, "TOKENIZERS_PARALLELISM": "false"}},
                **embedder_resources,
            )
        )
        bytes_per_chunk = self._config.chunk_length * self._bytes_per_token(units, tokenizer)
        estimate = int(self._num_text_bytes / bytes_per_chunk)
        with progress_bar(estimate, "embed", " chunks") as bar, warnings.catch_warnings():
            # A small corpus has fewer pages than there are embedders.
            warnings.filterwarnings("ignore", message="The minimum number of concurrent actors")
            for batch in receipts.iter_batches(batch_size=None):
                bar.update(int(np.sum(batch["num_chunks"])))
            bar.total = bar.n
        unfinished = [unit.index for unit in units if not unit_is_finished(self._pages, unit.index)]
        if unfinished:
            raise DatabaseError(f"units {unfinished[:10]} were not embedded completely: start the job again to go on")

    def _bytes_per_token(self, units: list[ReadUnit], tokenizer: TextTokenizer) -> float:
        """From a little of the text, for the length of the progress bar."""
        text = next(self._sample(units), "")[:100_000]
        return len(text.encode()) / max(1, len(tokenizer.encode(text))) if text else 4.0

    def _assemble(self, units: list[ReadUnit], split: Split, tokenizer: TextTokenizer) -> list[Partition]:
        """Partitions with chunks, the shards first and numbered by chunk_id_base."""
        indices = [unit.index for unit in units]
        shape = (self._config.chunk_length, tokenizer.vocab_size, self._key_dim)
        arguments = [(self._pages, indices, name, self._build / name, *shape) for name in split.partitions]
        done = [
            partition for partition in run_tasks(ray.remote(assemble_partition), arguments, "assemble") if partition
        ]
        partitions, base = [], 0
        for partition in sorted(done, key=lambda partition: (partition.name == VALIDATION, partition.name)):
            if partition.name == VALIDATION:
                partitions.append(partition)
                continue
            partitions.append(dataclasses.replace(partition, shard=len(partitions), chunk_id_base=base))
            base += partition.num_chunks
        return partitions

    def _index(self, partitions: list[Partition], tokenizer: TextTokenizer, skipped: list[SkippedRecord]) -> Manifest:
        """Train the codec once, fill every shard's index; returns the manifest, but for the neighbours."""
        shards = tuple(partition for partition in partitions if partition.name != VALIDATION)
        validation = next((partition for partition in partitions if partition.name == VALIDATION), None)
        num_chunks = sum(shard.num_chunks for shard in shards)
        spec = choose_index(num_chunks, self._key_dim)
        codec = self._build / "codec.faiss"
        if not spec.is_exact:
            self._build_indexes(spec, codec, shards)
        manifest = Manifest(
            build=self._build_id,
            chunk_length=self._config.chunk_length,
            tokenizer_name=tokenizer.name,
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            embedder_name=self._config.embedder,
            embedder_fingerprint=self._embedder_fingerprint,
            key_dim=self._key_dim,
            index=spec,
            num_neighbours=self._config.num_neighbours,
            num_shards=len(shards),
            segments=shards,
            next_chunk_id=num_chunks,
            codec=None if spec.is_exact else f"{self._build_id}/codec.faiss",
            validation=validation,
            files={},
            settings={"corpus": dataclasses.asdict(self._corpus), "database": dataclasses.asdict(self._config)},
            skipped=dict(Counter(record.category for record in skipped)),
        )
        paths = [f"{self._build_id}/tokenizer/{path.name}" for path in sorted(self._tokenizer_folder.iterdir())]
        for partition in partitions:
            paths += [partition.chunks, partition.documents, partition.ids, partition.keys]
        if manifest.codec:
            paths += [manifest.codec, *(shard.index for shard in shards)]
        return dataclasses.replace(manifest, files=self._checksums(paths))

    def _build_indexes(self, spec: IndexSpec, codec: Path, shards: tuple[Partition, ...]) -> None:
        """Train the codec on keys of all shards, and encode each shard's keys."""
        if not codec.exists():
            num_keys = num_training_keys(spec, sum(shard.num_chunks for shard in shards))
            sample = sample_keys([self._directory / shard.keys for shard in shards], num_keys, self._config.seed)
            write_index(train_index(spec, self._key_dim, sample), codec)
        todo = [(codec, self._directory / shard.keys, self._directory / shard.index) for shard in shards]
        todo = [paths for paths in todo if not paths[-1].exists()]
        for _ in run_tasks(ray.remote(fill_shard), todo, "index"):
            pass

    def _checksums(self, paths: list[str]) -> dict[str, FileRecord]:
        records = run_tasks(ray.remote(named_record), [(self._directory, path) for path in paths], "checksums")
        return dict(sorted(records))

    def _find_neighbours(self, manifest: Manifest) -> Manifest:
        """Search the neighbours of every chunk through the shard actors of this version."""
        partitions = [*manifest.segments, *([manifest.validation] if manifest.validation else [])]
        todo = [(self._directory, manifest, part) for part in partitions if not self._neighbours_of(part).exists()]
        # The shards do the work; two tasks in flight keep them busy while one of them merges and writes.
        search = ray.remote(num_cpus=0)(search_neighbours)
        for _ in run_tasks(search, todo, "neighbours", max_in_flight=2):
            pass
        records = self._checksums([partition.neighbours for partition in partitions])
        return dataclasses.replace(manifest, files={**manifest.files, **records})

    def _neighbours_of(self, partition: Partition) -> Path:
        return self._directory / partition.neighbours

    def _commit(self, manifest: Manifest, skipped: list[SkippedRecord]) -> Manifest:
        """Write the manifest; then clear away what it makes superfluous."""
        with (self._build / "skipped.jsonl").open("w", encoding="utf-8") as file:
            for record in skipped:
                file.write(json.dumps(dataclasses.asdict(record), ensure_ascii=False) + "\n")
        previous, generation = _committed(self._directory)
        partitions = [*manifest.segments, *([manifest.validation] if manifest.validation else [])]
        searched = [dataclasses.replace(part, neighbours_generation=generation + 1) for part in partitions]
        manifest = dataclasses.replace(
            manifest,
            generation=generation + 1,
            segments=tuple(searched[: len(manifest.segments)]),
            validation=searched[-1] if manifest.validation else None,
            stage_seconds=self._stage_seconds,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        write_manifest(self._directory, manifest)
        manifest = read_manifest(self._directory)
        # A service may still read the version before this one; older ones and abandoned builds go.
        for folder in self._directory.iterdir():
            if folder.is_dir() and folder.name not in (self._build_id, previous):
                shutil.rmtree(folder)
        self._clear_work(manifest)
        return manifest

    def _clear_work(self, manifest: Manifest) -> None:
        """What a committed build needs no longer; also after a run that was killed before it came to that."""
        shutil.rmtree(self._work)
        for summary in self._build.glob("*/partition.json"):
            summary.unlink()
        stop_shard_actors(self._directory, except_version=manifest.version)


def _file_identities(unit: ReadUnit) -> list[list[str]]:
    """Name, size and time of change of a unit's files, so that changed input is another build."""
    if unit.format == python_docs.NAME:
        return [[transformers.__version__, platform.python_version()]]  # where its modules come from
    identities = []
    for file in unit.files:
        storage, path = url_to_fs(file)
        details = storage.info(path)
        changed = details.get("ETag") or details.get("mtime") or details.get("LastModified")
        identities.append([file, str(details.get("size")), str(changed)])
    return identities


def _committed(directory: Path) -> tuple[str | None, int]:
    """Build and generation of the database that is there; None and 0 where none is."""
    try:
        manifest = read_manifest(directory)
    except DatabaseError:
        return None, 0
    return manifest.build, manifest.generation
