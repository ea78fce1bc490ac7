"""Folders of training runs, HOME/runs/NAME: one run each, started anew or resumed."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retro_ray.config import RunConfig
from retro_ray.database.format import Manifest, write_json_atomically
from retro_ray.errors import CheckpointError, ConfigError
from retro_ray.file_lock import file_lock
from retro_ray.recipes import get_recipe
from retro_ray.training.windows import require_stored_neighbours

CONFIG_NAME = "config.json"


def run_directory(home: Path, name: str) -> Path:
    """Where the run `name` of a home lives.

    Raises:
        ConfigError: the name is no plain folder name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(f"--run is {name!r}; it must be letters, digits, '.', '_' and '-', a letter or digit first")
    return Path(home).absolute() / "runs" / name


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds a run for this process; a process that dies lets go.

    Raises:
        ConfigError: another process has it.
    """

    def refuse(holder: str) -> ConfigError:
        return ConfigError(f"run {directory.name} is busy ({holder}): wait for it, or use another --run")

    directory.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(directory.parent / f".{directory.name}.lock", "training it", refuse):
        yield


def move_aside(directory: Path, say: Callable[[str], None]) -> None:
    """Keep an older run of the same name under the next free name NAME-<n>."""
    if not directory.exists():
        return
    number = 1
    while (kept := directory.with_name(f"{directory.name}-{number}")).exists():
        number += 1
    directory.rename(kept)
    say(f"an older run {directory.name} was there: kept as {kept} (--resume would have continued it)")


def new_config(recipe: str, manifest: Manifest, model: dict[str, Any], training: dict[str, Any]) -> RunConfig:
    """A recipe for a database, with some settings of `ModelConfig` and `TrainingConfig` replaced.

    Raises:
        ConfigError: no such recipe, or settings that cannot work.
    """
    config = get_recipe(recipe)(manifest.vocab_size, manifest.chunk_length)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **model))
    if config.model.cca_layers:
        require_stored_neighbours(manifest, config.model.num_neighbours)
    return replaced(config, training)


def resumed_config(
    directory: Path,
    recipe: str | None,
    model: dict[str, Any],
    training: dict[str, Any],
    retrofit: str | None = None,
) -> RunConfig:
    """The config a run was started with, with some settings of `TrainingConfig` replaced.

    Raises:
        CheckpointError: the run's config cannot be read.
        ConfigError: what is asked for would be another model.
    """
    path = directory / CONFIG_NAME
    try:
        config = RunConfig.from_dict(json.loads(path.read_text(encoding="utf-8"))["config"])
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot resume: {path} cannot be read ({error}); start anew without --resume") from error
    wanted: dict[str, tuple[Any, Any]] = {"recipe": (recipe or config.recipe, config.recipe)}
    if retrofit is not None:
        path = Path(retrofit).expanduser()
        wanted["retrofit"] = str(path.absolute()) if path.exists() else retrofit, config.base
    wanted |= {name: (value, getattr(config.model, name)) for name, value in model.items()}
    for name, (asked, started_with) in wanted.items():
        if asked != started_with:
            raise ConfigError(
                f"--{name.replace('_', '-')} is {asked}, the run was started with {started_with}: leave it out to "
                "resume, or start another --run"
            )
    return replaced(config, training)


def replaced(config: RunConfig, training: dict[str, Any]) -> RunConfig:
    """`config` with some training settings replaced; fewer steps shorten the warm-up to a tenth of them, and a
    retrieval dropout that is given alone stays the same to the last step.
    """
    changed = dict(training)
    if "retrieval_dropout" in training:
        changed.setdefault("final_retrieval_dropout", None)
    if "num_steps" in training:
        changed["num_warmup_steps"] = min(config.training.num_warmup_steps, training["num_steps"] // 10)
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **changed))


def write_config(directory: Path, config: RunConfig, database_version: str) -> None:
    """Record what a run was started with."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json_atomically(directory / CONFIG_NAME, {"config": config.to_dict(), "database_version": database_version})
