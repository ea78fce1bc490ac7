"""Building a retrieval database on Ray, from documents to the committed manifest.

    plan -> survey -> tokenizer -> chunk and embed (Ray Data) -> assemble shards -> index -> neighbours -> commit

Every stage leaves files that appear whole or not at all, under a folder named by what was asked for;
a run that finds them goes on from there. So a job killed at any moment is continued by starting it
again, and nothing is a database before its manifest is written.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import ray

from retro_ray.building.assemble import assemble_partition
from retro_ray.building.build_plan import excluded_corpus, plan_build
from retro_ray.building.chunk_units import unit_is_finished
from retro_ray.building.embed_units import embed_units
from retro_ray.building.exclusion import read_excluded, read_left_out
from retro_ray.building.index_choice import (
    IndexAims,
    IndexChoice,
    choose_search,
    is_searched_exactly,
    train_codec,
)
from retro_ray.building.survey import MAX_SAMPLE_BYTES, CorpusSurvey, survey_path
from retro_ray.building.tasks import (
    count_tokens,
    named_problem,
    named_record,
    search_neighbours,
    survey_to_disk,
)
from retro_ray.config import CorpusConfig, DatabaseConfig, RetrievalConfig
from retro_ray.database.commit import (
    WORK_NAME,
    commit,
    committed,
    database_lock,
    next_generation,
    remove_leftovers,
)
from retro_ray.database.format import MANIFEST_NAME, FileRecord, Manifest, Partition, database_directory
from retro_ray.database.split import VALIDATION, Split
from retro_ray.database.token_statistics import write_token_statistics
from retro_ray.errors import DatabaseError, InputError
from retro_ray.index.build import index_segment
from retro_ray.index.spec import IndexSpec
from retro_ray.ray_session import run_tasks
from retro_ray.retrieval.shard_actor import refresh_shard_actors, stop_shard_actors
from retro_ray.text.corpus import ReadUnit, SkippedRecord
from retro_ray.text.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer

logger = logging.getLogger(__name__)

_BYTES_PER_SHARD = 16 << 30
_MIN_SHARDS = 2


class DatabaseBuilder:
    """Builds the database of a home, or goes on with an interrupted build of the same.

    Args:
        home: folder that all nodes of the cluster share.
        corpus: what to read.
        config: what to make of it.
        discard_edits: build anew a database that was edited since it was built.
        retrieval: how its neighbours are searched.
    """

    def __init__(
        self,
        home: Path,
        corpus: CorpusConfig,
        config: DatabaseConfig,
        *,
        discard_edits: bool = False,
        retrieval: RetrievalConfig | None = None,
    ) -> None:
        self._retrieval = retrieval or RetrievalConfig()
        self._discard_edits = discard_edits
        self._directory = database_directory(home)
        self._corpus = corpus
        self._config = config
        self._stage_seconds: dict[str, float] = {}

    def run(self) -> Manifest:
        """Build and commit.

        Raises:
            RetroRayError: the input, a setting or the disk is not as needed, or the database was edited. What
                was there before is untouched, and finished work is kept for the next run.
        """
        with database_lock(self._directory, "building it"):
            with self._stage("plan"):
                units = self._plan()
            self._remove_torn_files()
            if (manifest := self._existing()) is not None:
                edits = f", with {manifest.num_edits} edits, which --discard-edits undoes" if manifest.num_edits else ""
                logger.info("the database in %s is up to date (version %s%s)", self._directory, manifest.version, edits)
                self._clear_work(manifest)
                return manifest
            base = committed(self._directory)
            with self._stage("survey"):
                survey = self._survey(units)
            num_shards = self._num_shards(units)
            split = Split.of(survey.hashes, num_shards, self._config.validation_share, self._config.seed)
            with self._stage("tokenizer"):
                tokenizer = self._prepare_tokenizer(survey)
            with self._stage("embed"):
                survey.skipped += self._chunk_and_embed(units, survey, split, tokenizer)
            with self._stage("assemble"):
                partitions = self._assemble(units, split, tokenizer)
            with self._stage("index"):
                manifest = self._index(partitions, tokenizer, survey.skipped)
            with self._stage("neighbours"):
                manifest = self._find_neighbours(manifest)
            return self._commit(manifest, base, survey.skipped)

    @property
    def _build(self) -> Path:
        return self._directory / self._build_id

    @property
    def _work(self) -> Path:
        return self._build / WORK_NAME

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

    def _plan(self) -> list[ReadUnit]:
        """Decide what to read; what is asked for names the build."""
        plan = plan_build(self._corpus, self._config)
        self._build_id = plan.build_id
        self._embedder_fingerprint, self._key_dim = plan.embedder_fingerprint, plan.key_dim
        self._pages.mkdir(parents=True, exist_ok=True)
        return plan.units

    def _existing(self) -> Manifest | None:
        """The committed manifest, if it is of this very build.

        Raises:
            DatabaseError: it must be built anew, and was edited.
        """
        base, damaged = committed(self._directory), []
        if base is not None and base.build == self._build_id:
            damaged = self._damaged_files(base)
            if not damaged and not (base.num_edits and self._discard_edits):
                return base
        if base is not None and base.num_edits and not self._discard_edits:
            what = f"is damaged ({damaged[0][0]} {damaged[0][1]})" if damaged else "is not of this input and settings"
            raise DatabaseError(
                f"the database in {self._directory} {what}, and was edited {base.num_edits} times since it was built: "
                "pass --discard-edits to build it anew without what was added, deleted and updated, or another --home"
            )
        if damaged:
            logger.warning("%s %s: the database is built again", *damaged[0])
            shutil.rmtree(self._build, ignore_errors=True)
            (self._directory / MANIFEST_NAME).unlink()  # last: until then the next run sees the damage, too
            self._pages.mkdir(parents=True)
        return None

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

    def _survey(self, units: list[ReadUnit]) -> CorpusSurvey:
        """Read all of the input once, before anything costly is done."""
        folder = self._work / "survey"
        folder.mkdir(exist_ok=True)
        share = min(1.0, MAX_SAMPLE_BYTES / max(1, sum(unit.size_bytes for unit in units)))
        todo = [unit for unit in units if not survey_path(folder, unit.index).exists()]
        task = ray.remote(survey_to_disk)
        for _ in run_tasks(task, [(unit, self._corpus, share, folder) for unit in todo], "read"):
            pass
        survey = CorpusSurvey.read(folder, units, self._corpus)
        logger.info(
            "%d documents, %.1f MB, %d skipped", survey.num_documents, survey.num_bytes / 1e6, len(survey.skipped)
        )
        return survey

    def _prepare_tokenizer(self, survey: CorpusSurvey) -> TextTokenizer:
        if self._tokenizer_folder.exists():
            return TextTokenizer.load(self._tokenizer_folder)
        name = self._config.tokenizer
        if name.startswith("train:"):
            tokenizer = train_tokenizer(survey.sample(), int(name.removeprefix("train:")), name)
        else:
            tokenizer = load_tokenizer(name)
        unfinished = self._work / "tokenizer"
        tokenizer.save(unfinished)
        unfinished.rename(self._tokenizer_folder)
        return tokenizer

    def _chunk_and_embed(
        self, units: list[ReadUnit], survey: CorpusSurvey, split: Split, tokenizer: TextTokenizer
    ) -> list[SkippedRecord]:
        """Pages of all units; returns the documents that were left out, as near to those of --exclude-near."""
        todo = [unit for unit in units if not unit_is_finished(self._pages, unit.index)]
        if todo:
            exclude = self._config.exclude_near
            embed_units(
                todo,
                self._corpus,
                self._config,
                split,
                pages=self._pages,
                tokenizer_folder=self._tokenizer_folder,
                num_chunks=survey.estimate_chunks(tokenizer, self._config.chunk_length),
                excluded=read_excluded(excluded_corpus(self._corpus, self._config), tokenizer) if exclude else None,
            )
        unfinished = [unit.index for unit in units if not unit_is_finished(self._pages, unit.index)]
        if unfinished:
            raise DatabaseError(f"units {unfinished[:10]} were not embedded completely: start the job again to go on")
        left_out = read_left_out(self._pages, [unit.index for unit in units])
        if left_out:
            logger.info("%d documents are near to those of --exclude-near, and left out", len(left_out))
        if len(left_out) == survey.num_documents:
            raise InputError(
                f"all {len(left_out)} documents are near to those of --exclude-near: there is nothing left"
            )
        return left_out

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
        """Choose and fill every shard's index; returns the manifest, but for the neighbours."""
        shards = tuple(partition for partition in partitions if partition.name != VALIDATION)
        validation = next((partition for partition in partitions if partition.name == VALIDATION), None)
        num_chunks = sum(shard.num_chunks for shard in shards)
        choice = self._build_indexes(shards, validation)
        manifest = Manifest(
            build=self._build_id,
            chunk_length=self._config.chunk_length,
            tokenizer_name=tokenizer.name,
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            embedder_name=self._config.embedder,
            embedder_fingerprint=self._embedder_fingerprint,
            key_dim=self._key_dim,
            index=choice.spec,
            index_curve=choice.curve,
            num_neighbours=self._config.num_neighbours,
            rerank=self._config.rerank,
            num_rerank_candidates=self._config.num_rerank_candidates,
            token_statistics=self._count_tokens(shards, tokenizer),
            num_shards=len(shards),
            segments=shards,
            next_chunk_id=num_chunks,
            codec=f"{self._build_id}/codec.faiss" if choice.spec.has_codec else None,
            validation=validation,
            files={},
            settings={"corpus": dataclasses.asdict(self._corpus), "database": dataclasses.asdict(self._config)},
            skipped=dict(Counter(record.category for record in skipped)),
        )
        paths = [f"{self._build_id}/tokenizer/{path.name}" for path in sorted(self._tokenizer_folder.iterdir())]
        for partition in partitions:
            paths += [partition.chunks, partition.documents, partition.ids, partition.keys]
        indexes = [shard.index(choice.spec) for shard in shards]
        paths += [path for path in indexes if (self._directory / path).exists()]
        if manifest.codec:
            paths.append(manifest.codec)
        if manifest.token_statistics:
            paths.append(manifest.token_statistics)
        return dataclasses.replace(manifest, files=self._checksums(paths))

    def _build_indexes(self, shards: tuple[Partition, ...], validation: Partition | None) -> IndexChoice:
        """Choose the index, train its codec on keys of all shards, index each shard's keys, tune the search."""
        aims = IndexAims(self._config.target_recall, self._config.bytes_per_chunk, self._config.seed)
        if is_searched_exactly(sum(shard.num_chunks for shard in shards), self._key_dim, aims.target_recall):
            return IndexChoice(IndexSpec(factory="Flat"))
        codec, family, tuned = self._build / "codec.faiss", self._work / "family.json", self._work / "index.json"
        common = (self._directory, shards, validation, aims, codec)
        if not family.exists():
            for choice in run_tasks(ray.remote(train_codec), [common], "choose index"):
                choice.write(family)
        spec = IndexChoice.read(family).spec
        trained = codec if spec.has_codec else None
        paths = [(self._directory / shard.keys, self._directory / shard.index(spec)) for shard in shards]
        todo = [(spec, trained, keys, index) for keys, index in paths if not index.exists()]
        for _ in run_tasks(ray.remote(index_segment), todo, "index"):
            pass
        if not tuned.exists():
            for choice in run_tasks(ray.remote(choose_search), [(*common, IndexChoice.read(family))], "tune index"):
                choice.write(tuned)
        return IndexChoice.read(tuned)

    def _count_tokens(self, shards: tuple[Partition, ...], tokenizer: TextTokenizer) -> str:
        """Write in how many chunks each token occurs; returns the file's name."""
        shape = (self._config.chunk_length, tokenizer.vocab_size)
        counts = list(
            run_tasks(ray.remote(count_tokens), [(self._directory, shard, *shape) for shard in shards], "count")
        )
        path = f"{self._build_id}/token_statistics.npy"
        num_chunks = sum(shard.num_chunks for shard in shards)
        write_token_statistics(self._directory / path, np.sum(counts, axis=0), num_chunks)
        return path

    def _checksums(self, paths: list[str]) -> dict[str, FileRecord]:
        records = run_tasks(ray.remote(named_record), [(self._directory, path) for path in paths], "checksums")
        return dict(sorted(records))

    def _find_neighbours(self, manifest: Manifest) -> Manifest:
        """Search the neighbours of every chunk through shard actors of this build."""
        partitions = [*manifest.segments, *([manifest.validation] if manifest.validation else [])]
        todo = [part for part in partitions if not self._neighbours_of(part).exists()]
        todo = [(self._directory, manifest, part, self._retrieval) for part in todo]
        # The shards do the work; two tasks in flight keep them busy while one of them merges and writes.
        search = ray.remote(num_cpus=0)(search_neighbours)
        for _ in run_tasks(search, todo, "neighbours", max_in_flight=2):
            pass
        records = self._checksums([partition.neighbours for partition in partitions])
        return dataclasses.replace(manifest, files={**manifest.files, **records})

    def _neighbours_of(self, partition: Partition) -> Path:
        return self._directory / partition.neighbours

    def _commit(self, manifest: Manifest, base: Manifest | None, skipped: list[SkippedRecord]) -> Manifest:
        """Write the manifest; then clear away what it makes superfluous."""
        with (self._build / "skipped.jsonl").open("w", encoding="utf-8") as file:
            for record in skipped:
                file.write(json.dumps(dataclasses.asdict(record), ensure_ascii=False) + "\n")
        generation = next_generation(base)
        partitions = [*manifest.segments, *([manifest.validation] if manifest.validation else [])]
        searched = [dataclasses.replace(part, neighbours_generation=generation) for part in partitions]
        manifest = dataclasses.replace(
            manifest,
            generation=generation,
            built_generation=generation,
            segments=tuple(searched[: len(manifest.segments)]),
            validation=searched[-1] if manifest.validation else None,
            stage_seconds=self._stage_seconds,
        )
        manifest = commit(self._directory, manifest, base, manifest.files)
        # A service may still read the generation before this one; older ones and abandoned builds go.
        remove_leftovers(self._directory, [manifest, *([base] if base else [])], keep_unfinished=False)
        self._clear_work(manifest)
        return manifest

    def _clear_work(self, manifest: Manifest) -> None:
        """What a committed build needs no longer; also after a run that was killed before it came to that."""
        shutil.rmtree(self._work, ignore_errors=True)
        for summary in self._build.glob("*/partition.json"):
            summary.unlink()
        stop_shard_actors(self._directory, pinned_only=True)
        refresh_shard_actors(self._directory)
