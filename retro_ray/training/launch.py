"""Starting or continuing a training run of a home, as jobs and the demo do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from retro_ray.database.store import Database
from retro_ray.errors import ConfigError
from retro_ray.ray_session import connect, num_cluster_gpus
from retro_ray.training.checkpoint import find_checkpoint
from retro_ray.training.loop import choose_workers, fit
from retro_ray.training.retrofit import fitting_config, load_base, write_start
from retro_ray.training.run_folder import locked, move_aside, new_config, resumed_config, run_directory, write_config
from retro_ray.training.trainer import TrainingJob, TrainingOutcome

_DEFAULT_RECIPE = "tiny"


def launch(
    home: Path,
    *,
    run: str = "default",
    recipe: str | None = None,
    retrofit: str | None = None,
    resume: bool = False,
    num_workers: int | None = None,
    use_gpu: Literal["auto", "yes", "no"] = "auto",
    model: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train on the Ray cluster, starting one if none runs.

    Args:
        home: of the database and the runs; absolute.
        run: name of the run.
        recipe: name of the recipe; with `resume`, the run's own.
        retrofit: in place of a recipe, the base model that is fitted: the folder of a run, or the folder or
            name of a Hugging Face model.
        resume: continue from the newest checkpoint, if there is one.
        num_workers: data-parallel workers; None: as many as suit the cluster.
        use_gpu: a GPU for each of them; `auto`: if the cluster has any.
        model: fields of `ModelConfig` that replace the recipe's.
        training: fields of `TrainingConfig` that replace the recipe's.
        say: gets lines of progress.

    Returns:
        What `jobs/train.py --json` prints.

    Raises:
        RetroRayError: there is no database, the settings cannot work, or training failed.
    """
    if recipe is not None and retrofit is not None:
        raise ConfigError(f"--recipe is {recipe} and --retrofit {retrofit}: a run has one of them, leave the other out")
    directory = run_directory(home, run)
    database = Database.open(home)
    with locked(directory):
        resuming = resume and directory.exists()
        if resume and not resuming:
            say(f"nothing to resume: {directory} is started anew")
        model, training, base = model or {}, training or {}, None
        if resuming:
            config = resumed_config(directory, recipe, model, training, retrofit)
        elif retrofit is not None:
            base = load_base(retrofit, database.manifest, model.get("num_chunks"))
            config = fitting_config(retrofit, base, database.manifest, model, training)
        else:
            config = new_config(recipe or _DEFAULT_RECIPE, database.manifest, model, training)
        connect()
        on_gpu = num_cluster_gpus() > 0 if use_gpu == "auto" else use_gpu == "yes"
        chosen_workers = choose_workers(num_workers, on_gpu, config.training.batch_size)
        if not resuming:
            move_aside(directory, say)
        if base is not None:  # before the config, without which a run is not resumed
            write_start(directory, config, base.weights, database.manifest)
        write_config(directory, config, database.manifest.version)
        job = TrainingJob(home=home, run_directory=directory, config=config)
        outcome = fit(job, num_workers=chosen_workers, use_gpu=on_gpu, say=say)
    say(_summary(outcome, directory))
    return {
        "run": str(directory),
        "checkpoint": str(find_checkpoint(directory)[0]),
        "steps": outcome.steps,
        "validation_bpb_on": outcome.validation.get("on"),
        "validation_bpb_off": outcome.validation.get("off"),
        "tokens_per_second": round(outcome.tokens_per_second, 1),
        "num_workers": chosen_workers,
    }


def _summary(outcome: TrainingOutcome, directory: Path) -> str:
    figures = ", ".join(f"{value:.4f} with retrieval {mode}" for mode, value in outcome.validation.items())
    quality = f"; validation bits per byte {figures}" if figures else "; no validation documents"
    return f"trained {outcome.steps} steps{quality}; in {directory}"
