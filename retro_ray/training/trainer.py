"""A training run as one worker sees it: from the newest checkpoint to the last step. Knows no Ray.

Workers talk through torch's process group, if there is one. Worker 0 writes what the run leaves:

    RUN/config.json       the RunConfig, and the database it was started with
    RUN/metrics.jsonl     one object per step and per validation
    RUN/loss.png          the same, drawn
    RUN/checkpoints/      see checkpoint.py
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from retro_ray.config import RunConfig
from retro_ray.database.store import ChunkStore, Database
from retro_ray.errors import CheckpointError
from retro_ray.evaluation.bits_per_byte import BitsPerByte, RetrievalMode, choose_documents, score_documents
from retro_ray.model.retro import RetroModel
from retro_ray.precision import resolve_precision
from retro_ray.training.batches import Prefetcher, TrainingBatches
from retro_ray.training.checkpoint import (
    CheckpointMeta,
    load_checkpoint,
    newest_checkpoint,
    require_match,
    save_checkpoint,
)
from retro_ray.training.flops import peak_flops, training_flops_per_token
from retro_ray.training.plot import PLOT_NAME, plot_metrics
from retro_ray.training.progress import METRICS_NAME, MetricsLog, Progress, read_metrics
from retro_ray.training.step import TrainingStep
from retro_ray.training.windows import ChunkTable, WindowReader, stored_neighbours

logger = logging.getLogger(__name__)

_TYPE_OF_PRODUCTS = {"int8": torch.int8, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """What a worker is told. Paths are absolute, and the same folder for all workers."""

    home: Path
    """Holds the database."""
    run_directory: Path
    config: RunConfig


@dataclass(frozen=True, kw_only=True)
class TrainingOutcome:
    """What a run came to."""

    steps: int
    validation: dict[str, float]
    """Bits per byte by retrieval mode, `on` and `off`; empty without validation documents."""
    tokens_per_second: float
    """Of this start of the run, all workers together, validations and checkpoints left out."""


class Trainer:
    """One worker of a training run."""

    def __init__(self, job: TrainingJob, device: torch.device, say: Callable[[str], None] = logger.info) -> None:
        """Opens the database, builds the model and continues from the run's newest whole checkpoint.

        Args:
            job: what to train.
            device: what to compute on.
            say: gets lines of progress, on worker 0 only.

        Raises:
            RetroRayError: database, settings and checkpoint do not belong together.
        """
        config = job.config.training
        self._job, self._config, self._device = job, config, device
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._world_size = dist.get_world_size() if dist.is_initialized() else 1
        self._say = say if self._rank == 0 else lambda line: None
        self._database = self._open_database()
        self._batches = self._training_batches()
        torch.manual_seed(config.seed)
        self._model = RetroModel(job.config.model)
        if config.parallel == "ddp":  # else it goes there in parts
            self._model.to(device)
        self._model.gradient_checkpointing = config.gradient_checkpointing
        if config.trained == "retrieval":
            self._model.freeze_decoder()
        self._step = TrainingStep(self._model, config, device)
        self._validation: dict[str, float] = {}
        self._steps_done = self._continue_from_checkpoint()

    def run(self, stop: Callable[[], bool] | None = None) -> TrainingOutcome:
        """Train to the last step; or until `stop`, asked behind every checkpoint, says so on all workers."""
        config, log = self._config, MetricsLog(self._job.run_directory / METRICS_NAME)
        precision = resolve_precision(config.precision, self._device, self._job.config.model.hidden_dim)
        if self._rank == 0:
            self._job.run_directory.mkdir(parents=True, exist_ok=True)
            log.keep_until(self._steps_done)
        peak = peak_flops(self._device, _TYPE_OF_PRODUCTS[precision])
        self._say(self._description(precision))
        progress = Progress(
            log,
            self._say,
            num_steps=config.num_steps,
            first_step=self._steps_done,
            flops_per_token=training_flops_per_token(self._job.config.model, config.trained),
            peak_flops=peak and peak * self._world_size,
        )
        with Prefetcher(self._batches, self._steps_done, config.num_steps) as steps:
            for share in steps:
                result = self._step.run(share)
                self._steps_done += 1
                if self._rank == 0:
                    progress.add(result, share.num_targets)
                if self._look_up_from_training(progress) and stop is not None and stop():
                    break
        return TrainingOutcome(
            steps=self._steps_done, validation=self._validation, tokens_per_second=progress.tokens_per_second
        )

    def _look_up_from_training(self, progress: Progress) -> bool:
        """Validate and write a checkpoint where they are due; returns whether there is a checkpoint now."""
        config, done = self._config, self._steps_done
        at_end = done == config.num_steps
        evaluates, saves = at_end or done % config.evaluate_every == 0, at_end or done % config.checkpoint_every == 0
        if not (evaluates or saves):
            return False
        if self._rank == 0:
            progress.flush()
        if evaluates:
            self._validation = self.validate()
            if self._rank == 0 and self._validation:
                progress.validated(done, self._validation)
        if self._rank == 0:
            rows = read_metrics(self._job.run_directory / METRICS_NAME)
            plot_metrics(rows, self._job.run_directory / PLOT_NAME)
        if saves:
            self._save()
        if self._rank == 0:
            progress.resume_clock()
        return saves

    def validate(self) -> dict[str, float]:
        """Bits per byte of validation documents by retrieval mode, over all workers; empty if there are none."""
        store = self._database.validation
        if store is None or store.num_documents == 0:
            return {}
        # The same ones whatever the seed, so that runs of several can be compared.
        documents = choose_documents(store, self._config.num_evaluation_chunks)
        modes: tuple[RetrievalMode, ...] = ("on", "off") if self._job.config.model.cca_layers else ("off",)
        with self._step.whole_weights():
            return {mode: self._score(store, documents[self._rank :: self._world_size], mode).value for mode in modes}

    def _score(self, store: ChunkStore, documents: np.ndarray, mode: RetrievalMode) -> BitsPerByte:
        score = score_documents(
            self._model,
            store,
            self._database,
            documents,
            mode=mode,
            batch_size=self._config.micro_batch_size,
            precision=self._config.precision,
        )
        if self._world_size == 1:
            return score
        sums = torch.tensor([score.nats, score.num_tokens, score.num_bytes], dtype=torch.float64, device=self._device)
        dist.all_reduce(sums)
        nats, num_tokens, num_bytes = sums.tolist()
        return BitsPerByte(nats, int(num_tokens), int(num_bytes))

    def _open_database(self) -> Database:
        """The database, of one generation on all workers, though it may be edited while they start."""
        while True:
            database = Database.open(self._job.home)
            database.map_files()
            if self._world_size == 1:
                return database
            generation = database.manifest.generation
            bounds = torch.tensor([generation, -generation], device=self._device)
            dist.all_reduce(bounds, dist.ReduceOp.MAX)
            newest, oldest = bounds.tolist()
            if newest == -oldest:
                return database

    def _training_batches(self) -> TrainingBatches:
        model, config = self._job.config.model, self._config
        table = ChunkTable(self._database.segments, self._database.deleted)
        num_neighbours = model.num_neighbours if model.cca_layers else 0
        reader = WindowReader(
            table,
            self._database,
            neighbours=stored_neighbours(table, self._database, num_neighbours),
            end_target=self._database.tokenizer.eos_id,
        )
        return TrainingBatches(
            reader,
            num_chunks=model.num_chunks,
            batch_size=config.batch_size,
            seed=config.seed,
            retrieval_dropout=config.retrieval_dropout_at,
            rank=self._rank,
            world_size=self._world_size,
        )

    def _continue_from_checkpoint(self) -> int:
        """Steps done by the newest whole checkpoint, which worker 0 chooses for all; 0 if there is none."""
        found = newest_checkpoint(self._job.run_directory) if self._rank == 0 else None
        step = torch.tensor(found[1].step if found else -1, device=self._device)
        if self._world_size > 1:
            dist.broadcast(step, src=0)
        if int(step) < 0:
            if self._job.config.base is not None:
                raise CheckpointError(
                    f"{self._job.run_directory} has no whole checkpoint, not even of its base model "
                    f"{self._job.config.base}: start it anew with --retrofit"
                )
            return 0
        meta = load_checkpoint(self._job.run_directory, int(step), self._model, self._step.optimizer)
        require_match(meta, self._database.manifest)
        self._validation = meta.validation
        version = self._database.manifest.version
        self._say(f"continuing from step {meta.step}" if meta.step else f"fitting {self._job.config.base}")
        if meta.database_version != version:
            self._say(
                f"warning: the run was trained with database version {meta.database_version}, this is {version}: "
                "from here on its batches are not those of an undisturbed run"
            )
        return meta.step

    def _save(self) -> None:
        manifest = self._database.manifest
        meta = CheckpointMeta(
            step=self._steps_done,
            config=self._job.config,
            tokenizer_fingerprint=manifest.tokenizer_fingerprint,
            chunking_fingerprint=manifest.chunking_fingerprint,
            database_version=manifest.version,
            validation=self._validation,
        )
        save_checkpoint(
            self._job.run_directory,
            meta,
            self._model,
            self._step.optimizer,
            keep=self._config.keep_checkpoints,
            writes=self._rank == 0,
        )

    def _description(self, precision: str) -> str:
        weights = self._model.count_parameters(include_embeddings=True)
        trained = sum(weight.numel() for weight in self._step.optimizer.parameters)
        share = "" if trained == weights else f"{trained / 1e6:.1f} M ({trained / weights:.1%}) of "
        where = f"{self._world_size} x {self._device.type} in {precision}"
        windows = self._batches.num_windows_per_epoch
        epochs = self._config.num_steps * self._config.batch_size / windows
        return (
            f"training {share}{weights / 1e6:.1f} M weights on {where}: "
            f"{self._config.num_steps} steps of {self._config.batch_size} x {self._job.config.model.context_length} "
            f"tokens, {epochs:.2f} epochs of {self._database.manifest.num_live_chunks} chunks"
        )
