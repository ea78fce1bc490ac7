"""Checkpoints: folders that are whole or not there, without pickle.

    RUN/checkpoints/step-00000500/
      model.safetensors       the weights
      optimizer.safetensors   the optimiser's state, `<parameter>/<kind>`
      checkpoint.json         step, RunConfig, fingerprints, validation metrics, SHA-256 of the files

No random states are kept: batches and retrieval dropout are functions of (seed, step), and the
model draws no random numbers.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from safetensors.torch import load_model as load_weights

from retro_ray.config import RunConfig
from retro_ray.database.format import FileRecord, Manifest, file_record, write_json_atomically
from retro_ray.errors import CheckpointError, MismatchError
from retro_ray.model.retro import RetroModel
from retro_ray.training.optimizer import Optimizer
from retro_ray.training.parallel import gathered, own_part

FORMAT_VERSION = 1
META_NAME = "checkpoint.json"
MODEL_NAME = "model.safetensors"
OPTIMIZER_NAME = "optimizer.safetensors"
_FOLDER = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, kw_only=True)
class CheckpointMeta:
    """What checkpoint.json records."""

    step: int
    """Steps done."""
    config: RunConfig
    tokenizer_fingerprint: str
    chunking_fingerprint: str
    database_version: str
    """Of the database trained with; evaluation and serving may use another one."""
    validation: dict[str, float] = field(default_factory=dict)
    """The latest validation's figures."""
    files: dict[str, FileRecord] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "config": self.config.to_dict()}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> CheckpointMeta:
        content = dict(content)
        content["config"] = RunConfig.from_dict(content["config"])
        content["files"] = {name: FileRecord(**record) for name, record in content["files"].items()}
        return cls(**content)


def checkpoints_directory(run_directory: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(run_directory) / "checkpoints"


def save_checkpoint(
    run_directory: Path,
    meta: CheckpointMeta,
    model: RetroModel,
    optimizer: Optimizer,
    *,
    keep: int,
    writes: bool = True,
) -> Path:
    """Write a checkpoint, and remove all but the newest `keep`; returns its folder.

    All workers of a group call it, since each may have but a part of the model; one of them `writes`. The
    folder gets its name when every file in it is on the disk: a killed writer leaves nothing that a
    reader would take for a checkpoint.
    """
    weights, state = gathered(model.state_dict(), keep=writes), gathered(optimizer.tensors(), keep=writes)
    parent = checkpoints_directory(run_directory)
    folder = parent / _folder_name(meta.step)
    if not writes:
        return folder
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob(".tmp-*"):
        shutil.rmtree(leftover)
    temporary = parent / f".tmp-{os.getpid()}-{meta.step:08d}"
    temporary.mkdir()
    save_file(weights, temporary / MODEL_NAME)
    save_file(state, temporary / OPTIMIZER_NAME)
    for name in (MODEL_NAME, OPTIMIZER_NAME):
        _sync(temporary / name)
    files = {name: file_record(temporary / name) for name in (MODEL_NAME, OPTIMIZER_NAME)}
    write_json_atomically(temporary / META_NAME, dataclasses.replace(meta, files=files).to_dict())
    _sync(temporary)
    if folder.exists():  # a torn one, else training would have continued from it
        shutil.rmtree(folder)
    os.rename(temporary, folder)
    _sync(parent)
    for old in list_checkpoints(run_directory)[:-keep] if keep else []:
        shutil.rmtree(old)
    return folder


def list_checkpoints(run_directory: Path) -> list[Path]:
    """Folders of a run's checkpoints, oldest first, valid or not."""
    parent = checkpoints_directory(run_directory)
    found = [path for path in parent.iterdir() if _FOLDER.fullmatch(path.name)] if parent.is_dir() else []
    return sorted(found, key=_step_of)


def read_meta(folder: Path) -> CheckpointMeta:
    """What a checkpoint records, its files checked against their SHA-256.

    Raises:
        CheckpointError: it is torn, or of another format version.
    """
    path = Path(folder) / META_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content["format_version"]
        if found != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {found}, this program reads {FORMAT_VERSION}: train anew with jobs/train.py"
            )
        meta = CheckpointMeta.from_dict(content)
        for name, record in meta.files.items():
            if file_record(path.parent / name) != record:
                raise CheckpointError(f"{path.parent / name} is damaged (its SHA-256 differs): use another checkpoint")
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is not a whole checkpoint ({error}): use another one") from error
    return meta


def newest_checkpoint(run_directory: Path) -> tuple[Path, CheckpointMeta] | None:
    """The newest whole checkpoint of a run; torn ones are passed over."""
    for folder in reversed(list_checkpoints(run_directory)):
        try:
            return folder, read_meta(folder)
        except CheckpointError:
            continue  # an older one may be whole; if none is, the caller says so
    return None


def find_checkpoint(path: Path | str) -> tuple[Path, CheckpointMeta]:
    """The checkpoint at `path`: a checkpoint's own folder, or a run's, of which the newest is taken.

    Raises:
        CheckpointError: there is none, or it is torn.
    """
    path = Path(path)
    if (path / META_NAME).exists():
        return path, read_meta(path)
    found = newest_checkpoint(path)
    if found is None:
        torn = f" ({len(list_checkpoints(path))} torn)" if list_checkpoints(path) else ""
        raise CheckpointError(
            f"no checkpoint in {path}{torn}: train with jobs/train.py, or name another run with --run"
        )
    return found


def load_model(
    path: Path | str, manifest: Manifest | None = None, device: torch.device | str = "cpu"
) -> tuple[RetroModel, RunConfig, CheckpointMeta]:
    """The trained model at `path` (see `find_checkpoint`), for evaluation, generation and serving.

    Args:
        path: folder of a run or of a checkpoint.
        manifest: of the database the model is to be used with; checked if given.
        device: where the weights go.

    Raises:
        CheckpointError: there is no whole checkpoint.
        MismatchError: model and database do not belong together.
    """
    folder, meta = find_checkpoint(path)
    if manifest is not None:
        require_match(meta, manifest)
    model = RetroModel(meta.config.model)
    load_weights(model, folder / MODEL_NAME)
    return model.to(device).eval(), meta.config, meta


def load_checkpoint(run_directory: Path, step: int, model: RetroModel, optimizer: Optimizer) -> CheckpointMeta:
    """Put a checkpoint's weights and optimiser state into `model` and `optimizer`.

    Raises:
        CheckpointError: it is torn, or of a model of another shape.
    """
    folder = checkpoints_directory(run_directory) / _folder_name(step)
    meta = read_meta(folder)
    if meta.config.model != model.config:
        raise CheckpointError(f"{folder} holds a model of another shape: resume with the settings of the run")
    weights = load_file(folder / MODEL_NAME)
    with torch.no_grad():
        for name, own in model.state_dict().items():
            own.copy_(own_part(weights[name], own))
    optimizer.load_tensors(load_file(folder / OPTIMIZER_NAME))
    return meta


def require_match(meta: CheckpointMeta, manifest: Manifest) -> None:
    """Check that a model can read a database: the same tokens, cut in the same way.

    Raises:
        MismatchError: it cannot.
    """
    pairs = (
        ("tokenizer", meta.tokenizer_fingerprint, manifest.tokenizer_fingerprint),
        ("chunking", meta.chunking_fingerprint, manifest.chunking_fingerprint),
    )
    for name, of_model, of_database in pairs:
        if of_model != of_database:
            raise MismatchError(
                f"the model was trained with {name} {of_model}, the database has {of_database}: use the database "
                "the model was trained with (--home), or train anew with jobs/train.py"
            )


def _folder_name(step: int) -> str:
    return f"step-{step:08d}"


def _step_of(folder: Path) -> int:
    match = _FOLDER.fullmatch(folder.name)
    return int(match.group(1)) if match else -1


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
