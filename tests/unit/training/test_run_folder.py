import dataclasses
import os

import pytest

from retro_ray.errors import CheckpointError, ConfigError
from retro_ray.recipes import get_recipe
from retro_ray.training.run_folder import (
    locked,
    move_aside,
    new_config,
    replaced,
    resumed_config,
    run_directory,
    write_config,
)
from tests.fakes import write_tiny_database


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_tiny_database(tmp_path_factory.mktemp("home")).manifest


def test_a_run_lives_under_its_name(tmp_path):
    assert run_directory(tmp_path, "default") == tmp_path / "runs" / "default"
    for name in ("", "../elsewhere", "a/b", ".hidden", "a b"):
        with pytest.raises(ConfigError, match="--run"):
            run_directory(tmp_path, name)


def test_older_runs_are_kept_under_the_next_free_name(tmp_path):
    directory, lines = tmp_path / "default", []
    move_aside(directory, lines.append)
    assert lines == []
    for content in ("first", "second"):
        directory.mkdir()
        (directory / "what").write_text(content)
        move_aside(directory, lines.append)
    assert not directory.exists()
    assert (tmp_path / "default-1" / "what").read_text() == "first"
    assert (tmp_path / "default-2" / "what").read_text() == "second"
    assert str(tmp_path / "default-2") in lines[1]


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path):
    directory = tmp_path / "runs" / "default"
    with locked(directory):
        with (
            pytest.raises(ConfigError, match=rf"run default is busy .training it, process {os.getpid()} on"),
            locked(directory),
        ):
            pass
        with locked(tmp_path / "runs" / "other"):
            pass
    with locked(directory):
        pass


def test_flags_replace_settings_of_the_recipe(manifest):
    config = new_config("tiny", manifest, {"num_neighbours": 1}, {"num_steps": 50, "batch_size": 7})
    recipe = get_recipe("tiny")(manifest.vocab_size, manifest.chunk_length)
    assert config.model == dataclasses.replace(recipe.model, num_neighbours=1)
    assert config.training == dataclasses.replace(recipe.training, num_steps=50, num_warmup_steps=5, batch_size=7)


def test_warmup_is_a_tenth_of_the_steps_at_most(manifest):
    recipe = get_recipe("tiny")(manifest.vocab_size, manifest.chunk_length)
    assert replaced(recipe, {"num_steps": 30}).training.num_warmup_steps == 3
    assert replaced(recipe, {"num_steps": 10**6}).training.num_warmup_steps == recipe.training.num_warmup_steps
    assert replaced(recipe, {}).training == recipe.training


def test_retrieval_dropout_changes_evenly_and_one_that_is_given_stays(manifest):
    training = {"num_steps": 5, "retrieval_dropout": 0.2, "final_retrieval_dropout": 0.6}
    changing = new_config("tiny", manifest, {}, training).training
    assert [changing.retrieval_dropout_at(step) for step in range(5)] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6])
    given = replaced(new_config("tiny", manifest, {}, {}), {"retrieval_dropout": 0.1}).training
    assert {given.retrieval_dropout_at(step) for step in (0, given.num_steps - 1)} == {0.1}
    with pytest.raises(ConfigError, match="final_retrieval_dropout is"):
        new_config("tiny", manifest, {}, {"final_retrieval_dropout": 1.5})


def test_more_neighbours_than_stored_are_refused_before_anything_starts(manifest):
    with pytest.raises(ConfigError, match="--num-neighbours is 5, the database stores 4"):
        new_config("tiny", manifest, {"num_neighbours": 5}, {})


def test_resuming_takes_the_settings_of_the_run(tmp_path, manifest):
    config = new_config("tiny", manifest, {"num_neighbours": 1}, {"seed": 5, "num_steps": 40})
    write_config(tmp_path, config, manifest.version)
    assert resumed_config(tmp_path, None, {}, {}) == config
    assert resumed_config(tmp_path, "tiny", {"num_neighbours": 1}, {}) == config
    longer = resumed_config(tmp_path, None, {}, {"num_steps": 80})
    assert longer == dataclasses.replace(config, training=dataclasses.replace(config.training, num_steps=80))


def test_resuming_as_another_model_is_refused_with_both_values(tmp_path, manifest):
    write_config(tmp_path, new_config("tiny", manifest, {}, {}), manifest.version)
    with pytest.raises(ConfigError, match="--recipe is small, the run was started with tiny"):
        resumed_config(tmp_path, "small", {}, {})
    with pytest.raises(ConfigError, match="--num-neighbours is 4, the run was started with 2"):
        resumed_config(tmp_path, None, {"num_neighbours": 4}, {})


@pytest.mark.parametrize("content", [None, "{", "{}", '{"config": {"recipe": "tiny"}}'])
def test_a_run_without_a_readable_config_is_not_resumed(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="cannot resume"):
        resumed_config(tmp_path, None, {}, {})
