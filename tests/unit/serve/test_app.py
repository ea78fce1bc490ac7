"""The application builder's checks; what it builds is deployed in the integration tests."""

import importlib
import re
from pathlib import Path

import click
import pytest
import torch
from ray.serve import Application, Deployment

from retro_ray.config import ModelConfig, RunConfig
from retro_ray.database.store import Database
from retro_ray.model.retro import RetroModel
from retro_ray.serve import app
from retro_ray.serve.keys import KEYS_VARIABLE, parse_keys
from retro_ray.serve.settings import ServeSettings
from retro_ray.training.checkpoint import CheckpointMeta, save_checkpoint
from retro_ray.training.run_folder import run_directory
from tests.fakes import write_tiny_database

ROOT = Path(__file__).parents[3]

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
        ({"hoem": "x"}, "unknown argument hoem; there are home, run, num_replicas, autoscaling_config"),
        ({"num_replicas": "0"}, "num_replicas=0: Input should be greater than or equal to 1"),
        ({"max_batch_size": "many"}, "max_batch_size=many: Input should be a valid integer"),
        ({"autoscaling_config": "{"}, "autoscaling_config={: not valid JSON"),
        ({"autoscaling_config": '{"max_replicas": 0}'}, "max_replicas=0: Input should be greater than 0"),
        (
            {"autoscaling_config": '{"min_replicas": 3, "max_replicas": 2}'},
            "AutoscalingConfig: max_replicas",
        ),
        ({"retrieval": '{"policy": "never"}'}, "retrieval.policy=never: Input should be 'wait', 'partial' or 'fail'"),
        ({"retrieval": '{"timeout_s": 0}'}, "retrieval={'timeout_s': 0}: timeout_s is 0.0; it must be above 0"),
        ({"retrieval": '{"shards": 2}'}, "unknown argument retrieval.shards"),
        ({"api_keys_file": "/nowhere/keys"}, "the API keys in /nowhere/keys cannot be read"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, str], message: str) -> None:
    assert refusal(arguments).startswith(message)


def built_with(home: Path, monkeypatch: pytest.MonkeyPatch, **arguments: str) -> Deployment:
    monkeypatch.setattr(app_module, "_start_ray_if_none_runs", lambda: None)
    application = app({"home": str(home), **arguments})
    assert isinstance(application, Application)
    return application._bound_deployment


@pytest.fixture
def trained_home(tmp_path: Path) -> Path:
    write_tiny_database(tmp_path)
    write_checkpoint(tmp_path)
    return tmp_path


def test_text_arguments_become_an_application(trained_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(trained_home, run="mine")
    arguments = {"run": "mine", "num_replicas": "2", "num_cpus": "0.5", "max_queued": "10", "drain_s": "7"}
    deployment = built_with(trained_home, monkeypatch, **arguments)
    assert deployment.num_replicas == 2
    assert deployment.ray_actor_options == {"num_cpus": 0.5, "num_gpus": 0.0}
    assert deployment.max_queued_requests == 10
    assert deployment.backpressure_config.retry_after_s == 1
    assert deployment._deployment_config.graceful_shutdown_timeout_s > 7  # the replica ends its requests itself
    settings = ServeSettings(home=trained_home, run="mine", num_replicas=2, num_cpus=0.5, max_queued=10, drain_s=7)
    assert deployment.init_args == (settings, ())


def test_autoscaling_is_serves_own(trained_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = '{"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 6}'
    deployment = built_with(trained_home, monkeypatch, autoscaling_config=text)
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 4, 6)


def test_keys_reach_the_replicas_as_digests_alone(trained_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "k" * 40
    monkeypatch.setenv(KEYS_VARIABLE, f"{key} generate,edit")
    deployment = built_with(trained_home, monkeypatch)
    assert deployment.init_args[1] == parse_keys(f"{key} generate,edit", "")
    assert key not in repr(deployment.init_args)


def test_the_home_is_made_absolute_for_replicas_that_run_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert ServeSettings(home="~/data").home == Path("/home/someone/data")
    monkeypatch.setenv("RETRO_RAY_HOME", "/data/mine")
    assert ServeSettings().home == Path("/data/mine")


def test_the_readme_names_settings_that_there_are() -> None:
    commands = re.findall(r"serve run retro_ray\.serve:app (\S.*=.*)", (ROOT / "README.md").read_text())
    names = {name for command in commands for name in re.findall(r"(?:^| )(\w+)=", command)}
    assert {"home", "api_keys_file", "autoscaling_config"} <= names <= set(ServeSettings.model_fields)
