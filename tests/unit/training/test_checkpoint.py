import dataclasses
import json
import os
import shutil

import pytest
import torch

from retro_ray.config import TrainingConfig
from retro_ray.errors import CheckpointError, MismatchError
from retro_ray.model.retro import RetroModel
from retro_ray.training.checkpoint import (
    CheckpointMeta,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_model,
    newest_checkpoint,
    read_meta,
    require_match,
    save_checkpoint,
)
from retro_ray.training.optimizer import Optimizer
from tests.fakes import tiny_run_config, write_tiny_database


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return write_tiny_database(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def config(database):
    return tiny_run_config(database)


@pytest.fixture(scope="module")
def trained(config):
    """A model whose optimiser has a state."""
    torch.manual_seed(0)
    model = RetroModel(config.model)
    optimizer = Optimizer(model, config.training)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step(0)
    return model, optimizer


@pytest.fixture
def run(tmp_path, database, config, trained):
    """A run folder with checkpoints of steps 4, 8 and 12."""
    for step in (4, 8, 12):
        save_checkpoint(tmp_path, meta_of(database, config, step), *trained, keep=3)
    return tmp_path


def meta_of(database, config, step: int) -> CheckpointMeta:
    manifest = database.manifest
    return CheckpointMeta(
        step=step,
        config=config,
        tokenizer_fingerprint=manifest.tokenizer_fingerprint,
        chunking_fingerprint=manifest.chunking_fingerprint,
        database_version=manifest.version,
        validation={"on": 1.25, "off": 1.5},
    )


def test_what_was_saved_is_loaded(run, config, trained):
    model, optimizer = trained
    loaded, loaded_config, meta = load_model(run)
    assert loaded_config == config
    assert (meta.step, meta.validation) == (12, {"on": 1.25, "off": 1.5})
    assert not loaded.training
    for (name, a), b in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert loaded.read_out_weight is loaded.token_embedding.weight, "tied weights stay tied"

    other = RetroModel(config.model)
    other_optimizer = Optimizer(other, config.training)
    load_checkpoint(run, 12, other, other_optimizer)
    assert other_optimizer.tensors().keys() == optimizer.tensors().keys()
    assert all(torch.equal(optimizer.tensors()[name], t) for name, t in other_optimizer.tensors().items())


def test_a_checkpoint_is_found_by_its_own_folder_or_its_runs(run):
    assert find_checkpoint(run)[0].name == "step-00000012"
    assert load_model(run / "checkpoints" / "step-00000004")[2].step == 4


def test_only_the_newest_are_kept(run, database, config, trained):
    save_checkpoint(run, meta_of(database, config, 16), *trained, keep=2)
    assert [path.name for path in list_checkpoints(run)] == ["step-00000012", "step-00000016"]


def tear_weights(folder):
    os.truncate(folder / "model.safetensors", 100)


def flip_a_byte_of_the_optimizer(folder):
    path = folder / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def lose_the_weights(folder):
    (folder / "model.safetensors").unlink()


def lose_the_record(folder):
    (folder / "checkpoint.json").unlink()


def tear_the_record(folder):
    os.truncate(folder / "checkpoint.json", 50)


DAMAGES = [tear_weights, flip_a_byte_of_the_optimizer, lose_the_weights, lose_the_record, tear_the_record]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_torn_checkpoint_is_passed_over_for_an_older_whole_one(run, damage):
    damage(run / "checkpoints" / "step-00000012")
    folder, meta = newest_checkpoint(run)
    assert (folder.name, meta.step) == ("step-00000008", 8)
    with pytest.raises(CheckpointError):
        read_meta(run / "checkpoints" / "step-00000012")
    assert load_model(run)[2].step == 8


def test_a_torn_checkpoint_is_replaced_when_training_comes_by_again(run, database, config, trained):
    tear_weights(run / "checkpoints" / "step-00000012")
    save_checkpoint(run, meta_of(database, config, 12), *trained, keep=3)
    assert newest_checkpoint(run)[1].step == 12


def test_a_writer_that_fails_leaves_nothing_that_looks_like_a_checkpoint(run, database, config, trained, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("retro_ray.training.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(run, meta_of(database, config, 16), *trained, keep=3)
    assert newest_checkpoint(run)[1].step == 12
    monkeypatch.undo()
    save_checkpoint(run, meta_of(database, config, 16), *trained, keep=3)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-00000008",
        "step-00000012",
        "step-00000016",
    ]


def test_no_checkpoint_says_where_it_was_looked_for(tmp_path, run):
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*elsewhere.*jobs/train.py"):
        load_model(tmp_path / "elsewhere")
    for folder in list_checkpoints(run):
        tear_weights(folder)
    with pytest.raises(CheckpointError, match="3 torn"):
        load_model(run)


def test_another_format_version_is_named(run):
    path = run / "checkpoints" / "step-00000012" / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 7}))
    with pytest.raises(CheckpointError, match="format version 7, this program reads 1"):
        read_meta(path.parent)


def test_model_and_database_must_belong_together(run, database):
    load_model(run, database.manifest)
    for field, value, name in (("tokenizer_fingerprint", "0" * 16, "tokenizer"), ("chunk_length", 16, "chunking")):
        other = dataclasses.replace(database.manifest, **{field: value})
        with pytest.raises(MismatchError) as caught:
            load_model(run, other)
        fingerprint = getattr(other, f"{name}_fingerprint")
        own = getattr(database.manifest, f"{name}_fingerprint")
        assert own in str(caught.value)
        assert fingerprint in str(caught.value)
        assert own != fingerprint
    grown = dataclasses.replace(database.manifest, created="later")
    require_match(read_meta(find_checkpoint(run)[0]), grown)


def test_a_model_of_another_shape_is_not_resumed(run, config):
    wider = dataclasses.replace(config.model, ffn_dim=64)
    model = RetroModel(wider)
    with pytest.raises(CheckpointError, match="another shape"):
        load_checkpoint(run, 12, model, Optimizer(model, TrainingConfig()))


def test_a_moved_checkpoint_still_loads(run, tmp_path):
    moved = tmp_path / "elsewhere" / "my-model"
    shutil.copytree(run / "checkpoints" / "step-00000008", moved)
    assert load_model(moved)[2].step == 8
