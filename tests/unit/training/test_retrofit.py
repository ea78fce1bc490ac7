"""Pretrained decoders learn to read neighbours, and without them stay what they were."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from retro_ray.database.store import Database
from retro_ray.errors import CheckpointError, ConfigError
from retro_ray.model import RetroModel
from retro_ray.model.decoder import belongs_to_retrieval
from retro_ray.text.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from retro_ray.training.checkpoint import load_checkpoint, load_model
from retro_ray.training.optimizer import Optimizer
from retro_ray.training.progress import read_metrics
from retro_ray.training.retrofit import fitting_config, load_base, spread, write_start
from retro_ray.training.run_folder import resumed_config, write_config
from retro_ray.training.trainer import Trainer, TrainingJob
from tests.fakes import tiny_run_config, tiny_texts, write_tiny_database

CPU = torch.device("cpu")
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# Vocabularies are often padded to a round number.
FAMILY = {
    "llama": lambda size: LlamaConfig(**SHAPE, vocab_size=size, tie_word_embeddings=True),
    "mistral": lambda size: MistralConfig(**SHAPE, vocab_size=size + 9, sliding_window=32),
    "qwen2": lambda size: Qwen2Config(**SHAPE, vocab_size=size + 20, tie_word_embeddings=True),
    "qwen3": lambda size: Qwen3Config(**SHAPE, vocab_size=size, head_dim=8),
}
QUICK = {
    "num_steps": 8,
    "batch_size": 4,
    "micro_batch_size": 2,
    "learning_rate": 1e-2,
    "precision": "fp32",
    "checkpoint_every": 4,
    "evaluate_every": 8,
    "num_evaluation_chunks": 30,
}


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_tokenizer(tiny_texts(24, 0), 300, "train:300")


def save_base(folder: Path, config: PreTrainedConfig, tokenizer: TextTokenizer, dtype=torch.float32) -> str:
    """A model with large random weights, beside its tokenizer."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + (weight.ndim == 1))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def of_kind(tmp_path_factory, tokenizer):
    """A base model of a kind, and a home whose database has its tokenizer, as transformers reads that kind's."""

    @functools.cache
    def made(kind: str, dtype=torch.float32) -> tuple[str, Path]:
        name = save_base(tmp_path_factory.mktemp("base"), FAMILY[kind](tokenizer.vocab_size), tokenizer, dtype)
        home = tmp_path_factory.mktemp("home")
        write_tiny_database(home, tokenizer=load_tokenizer(name))
        return name, home

    return made


def start(home: Path, run: Path, name: str, **training) -> TrainingJob:
    """A run that fits the model `name`, at step 0."""
    manifest = Database.open(home).manifest
    base = load_base(name, manifest)
    config = fitting_config(name, base, manifest, {}, {**QUICK, **training})
    write_start(run, config, base.weights, manifest)
    write_config(run, config, manifest.version)
    return TrainingJob(home=home, run_directory=run, config=config)


def train(job: TrainingJob) -> list[str]:
    lines: list[str] = []
    Trainer(job, CPU, lines.append).run()
    return lines


@torch.no_grad()
def logits(run: Path, tokens_BT: torch.Tensor, on: bool = False) -> torch.Tensor:
    model, config, _ = load_model(run)
    length = config.model.neighbour_length
    neighbours = torch.randint(300, (2, 3, 2, length), generator=torch.Generator().manual_seed(0))
    return model(tokens_BT, neighbours_BLKR=neighbours if on else None)


@pytest.mark.parametrize("kind", list(FAMILY))
def test_a_base_model_is_fitted_and_without_neighbours_stays_what_it_was(of_kind, tmp_path, kind):
    name, home = of_kind(kind)
    job = start(home, tmp_path / "run", name)
    tokens_BT = torch.randint(300, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(name)(tokens_BT).logits
    before = logits(job.run_directory, tokens_BT)
    torch.testing.assert_close(before, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(job.run_directory, tokens_BT, on=True), before), "nothing is read yet"

    weights = load_model(job.run_directory)[0].state_dict()
    lines = train(job)
    assert torch.equal(logits(job.run_directory, tokens_BT), before), "to the bit"
    assert not torch.allclose(logits(job.run_directory, tokens_BT, on=True), before, atol=1e-3)
    trained = load_model(job.run_directory)[0].state_dict()
    changed = {key for key, weight in weights.items() if not torch.equal(trained[key], weight)}
    assert changed == {key for key in weights if belongs_to_retrieval(key)}
    off = [row["validation_bpb_off"] for row in read_metrics(job.run_directory / "metrics.jsonl") if len(row) < 4]
    assert len(off) == 1
    num_trained, total = (
        sum(trained[key].numel() for key in keys) for keys in (changed, [k for k in weights if "lm_head" not in k])
    )
    assert lines[0] == f"fitting {name}"
    assert f"({num_trained / total:.1%}) of" in lines[1]


def test_of_a_longer_context_and_of_half_precision(of_kind, tmp_path):
    name, home = of_kind("mistral", torch.bfloat16)
    manifest = Database.open(home).manifest
    base = load_base(name, manifest)
    assert base.model.num_chunks == 4, "as much as its sliding window shows it"
    with pytest.raises(ConfigError, match=r"--num-chunks is 5, .* made for 32 tokens: use 1 to 4 chunks"):
        load_base(name, manifest, num_chunks=5)
    config = fitting_config(name, base, manifest, {}, QUICK)
    write_start(tmp_path / "run", config, base.weights, manifest)
    assert load_model(tmp_path / "run")[0].token_embedding.weight.dtype == torch.float32


def test_unfrozen_all_is_trained(of_kind, tmp_path):
    name, home = of_kind("llama")
    job = start(home, tmp_path / "run", name, trained="all")
    before = load_model(job.run_directory)[0].state_dict()
    lines = train(job)
    after = load_model(job.run_directory)[0].state_dict()
    assert all(not torch.equal(weight, after[key]) for key, weight in before.items())
    assert "%" not in lines[1]


def test_a_killed_fitting_goes_on_as_if_nothing_had_happened(of_kind, tmp_path):
    name, home = of_kind("qwen3")
    job = start(home, tmp_path / "undisturbed", name)
    train(job)
    killed = start(home, tmp_path / "killed", name)
    manifest = Database.open(home).manifest
    write_start(killed.run_directory, killed.config, load_base(name, manifest).weights, manifest)
    for path in (job.run_directory / "checkpoints").glob("step-00000004/*"):
        target = killed.run_directory / "checkpoints" / "step-00000004" / path.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    resumed = resumed_config(killed.run_directory, None, {}, {}, name)
    assert resumed == killed.config
    assert "continuing from step 4" in train(dataclasses.replace(killed, config=resumed))
    a, b = (load_model(run.run_directory)[0] for run in (job, killed))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    with pytest.raises(ConfigError, match="--retrofit is other, the run was started with"):
        resumed_config(killed.run_directory, None, {}, {}, "other")


def test_without_its_first_checkpoint_a_fitting_is_not_started_from_nothing(of_kind, tmp_path):
    name, home = of_kind("llama")
    job = start(home, tmp_path / "run", name)
    (job.run_directory / "checkpoints" / "step-00000000" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="no whole checkpoint, not even of its base model"):
        train(job)


@pytest.mark.parametrize("cca_layers", [(), (2,)])
def test_a_run_of_ours_is_a_base_too(of_kind, tmp_path, cca_layers):
    """With or without retrieval of its own, of which nothing is taken over."""
    _, home = of_kind("llama")
    database = Database.open(home)
    config = tiny_run_config(database)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, cca_layers=cca_layers))
    base = TrainingJob(home=home, run_directory=tmp_path / "base", config=config)
    Trainer(base, CPU, say=lambda line: None).run()
    job = start(home, tmp_path / "run", str(base.run_directory))
    assert job.config.model.cca_layers == (cca_layers or (1,))
    assert job.config.training.trained == "retrieval"
    tokens_BT = torch.randint(300, (2, 30), generator=torch.Generator().manual_seed(0))
    expected = logits(base.run_directory, tokens_BT)
    train(job)
    assert torch.equal(logits(job.run_directory, tokens_BT), expected)


def test_layers_with_cca_are_the_papers_or_the_upper_half():
    assert spread(12) == (6, 9, 12)
    assert spread(32) == (6, 9, 12, 15, 18, 21, 24, 27, 30)
    assert [spread(n) for n in (1, 2, 4, 8)] == [(1,), (1,), (2, 4), (4, 6, 8)]


class TestRefused:
    def test_another_tokenizer(self, of_kind, tmp_path):
        name, home = of_kind("llama")
        own, other = Database.open(home).manifest, write_tiny_database(tmp_path / "other", seed=1).manifest
        words = f"{own.tokenizer_fingerprint}, the database was built with {other.tokenizer_fingerprint} .train:300."
        with pytest.raises(ConfigError, match=words):
            load_base(name, other)

    def test_a_vocabulary_smaller_than_the_tokenizers(self, of_kind, tokenizer, tmp_path):
        _, home = of_kind("llama")
        name = save_base(tmp_path / "base", FAMILY["llama"](tokenizer.vocab_size - 1), tokenizer)
        with pytest.raises(ConfigError, match="its tokenizer has"):
            load_base(name, Database.open(home).manifest)

    def test_a_folder_without_a_model(self, of_kind, tmp_path):
        _, home = of_kind("llama")
        with pytest.raises(ConfigError, match=f"cannot load --retrofit {tmp_path}") as caught:
            load_base(str(tmp_path), Database.open(home).manifest)
        assert "\n" not in str(caught.value)

    def test_a_model_of_another_family(self, of_kind, tokenizer, tmp_path):
        _, home = of_kind("llama")
        name = save_base(tmp_path / "base", GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=300), tokenizer)
        with pytest.raises(ConfigError, match="of type 'gpt2'; RETRO-fitting takes llama, mistral, qwen2, qwen3"):
            load_base(name, Database.open(home).manifest)

    def test_a_checkpoint_with_weights_missing(self, of_kind, tokenizer, tmp_path):
        _, home = of_kind("llama")
        name = save_base(tmp_path / "base", FAMILY["llama"](tokenizer.vocab_size), tokenizer)
        config = json.loads((tmp_path / "base" / "config.json").read_text())
        (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
        with pytest.raises(ConfigError, match=r"lacks 9 weights, model\.layers\.3"):
            load_base(name, Database.open(home).manifest)

    def test_no_neighbours(self, of_kind):
        name, home = of_kind("llama")
        manifest = Database.open(home).manifest
        with pytest.raises(ConfigError, match="--num-neighbours is 0"):
            fitting_config(name, load_base(name, manifest), manifest, {"num_neighbours": 0}, {})


def test_the_start_is_a_checkpoint_like_any_other(of_kind, tmp_path):
    name, home = of_kind("qwen2")
    job = start(home, tmp_path / "run", name)
    model = RetroModel(job.config.model)
    meta = load_checkpoint(job.run_directory, 0, model, Optimizer(model, job.config.training))
    assert (meta.step, meta.config) == (0, job.config)
