"""The application builder's checks; what it builds is deployed in the integration tests."""

import importlib
from pathlib import Path

import click
import pytest
import torch
from ray.serve import Application

from retro_ray.config import ModelConfig, RunConfig
from retro_ray.database.store import Database
from retro_ray.model.retro import RetroModel
from retro_ray.serve import app
from retro_ray.training.checkpoint import CheckpointMeta, save_checkpoint
from retro_ray.training.run_folder import run_directory
from tests.fakes import write_tiny_database

# `retro_ray.serve.app` names the builder, as `serve run` wants it, and not the module around it.
app_module = importlib.import_module("retro_ray.serve.app")


class StatelessOptimizer:
    def tensors(self) -> dict[str, torch.Tensor]:
        return {"momentum": torch.zeros(1)}


def write_checkpoint(home: Path, *, run: str = "default", tokenizer_fingerprint: str | None = None) -> None:
    manifest = Database.open(home).manifest
    model = ModelConfig(
        vocab_size=manifest.vocab_size, hidden_dim=8, num_layers=1, num_heads=1, head_dim=8, ffn_dim=8, cca_layers=()
    )
    meta = CheckpointMeta(
        step=3,
        config=RunConfig(recipe="tiny", model=model),
        tokenizer_fingerprint=tokenizer_fingerprint or manifest.tokenizer_fingerprint,
        chunking_fingerprint=manifest.chunking_fingerprint,
        database_version=manifest.version,
    )
    save_checkpoint(run_directory(home, run), meta, RetroModel(model), StatelessOptimizer(), keep=1)


def refusal(arguments: dict[str, str]) -> str:
    """The one line that `serve run` prints; click prints a ClickException without a traceback."""
    with pytest.raises(click.ClickException) as caught:
        app(arguments)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_a_home_without_a_database_or_a_checkpoint_is_refused_before_anything_starts(tmp_path: Path) -> None:
    assert refusal({"home": str(tmp_path)}).startswith(f"no retrieval database in {tmp_path}")
    write_tiny_database(tmp_path)
    assert refusal({"home": str(tmp_path)}).startswith(f"no checkpoint in {tmp_path / 'runs' / 'default'}")
    write_checkpoint(tmp_path)
    assert "other" in refusal({"home": str(tmp_path), "run": "other"})


def test_a_model_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    write_tiny_database(tmp_path)
    write_checkpoint(tmp_path, tokenizer_fingerprint="feedfeedfeedfeed")
    assert "tokenizer feedfeedfeedfeed" in refusal({"home": str(tmp_path)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hoem": "x"}, "unknown argument hoem; there are home, run, num_replicas, num_cpus"),
        ({"num_replicas": "0"}, "num_replicas=0: Input should be greater than or equal to 1"),
        ({"max_batch_size": "many"}, "max_batch_size=many: Input should be a valid integer"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, str], message: str) -> None:
    assert refusal(arguments).startswith(message)


def test_text_arguments_become_an_application(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_database(tmp_path)
    write_checkpoint(tmp_path, run="mine")
    monkeypatch.setattr(app_module, "_start_ray_if_none_runs", lambda: None)
    built = app({"home": str(tmp_path), "run": "mine", "num_replicas": "2", "num_cpus": "0.5"})
    assert isinstance(built, Application)
    deployment = built._bound_deployment
    assert deployment.num_replicas == 2
    assert deployment.ray_actor_options == {"num_cpus": 0.5, "num_gpus": 0.0}
    assert deployment.init_args == (app_module.ServeSettings(home=tmp_path, run="mine", num_replicas=2, num_cpus=0.5),)


def test_the_home_is_made_absolute_for_replicas_that_run_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert app_module.ServeSettings(home="~/data").home == Path("/home/someone/data")
    monkeypatch.setenv("RETRO_RAY_HOME", "/data/mine")
    assert app_module.ServeSettings().home == Path("/data/mine")
