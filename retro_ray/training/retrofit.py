"""RETRO-fitting: a pretrained decoder, to which an encoder and chunked cross-attentions are added.

The run starts from a checkpoint of step 0, which holds the base model's weights and the first ones of
what is added. From then on it is a run like any other, on every machine that reads its folder.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retro_ray.config import ModelConfig, RunConfig, TrainingConfig
from retro_ray.database.format import Manifest
from retro_ray.errors import ConfigError
from retro_ray.model.decoder import belongs_to_retrieval
from retro_ray.model.pretrained import decoder_config, decoder_weights, load_decoder, longest_context, require_family
from retro_ray.model.retro import RetroModel
from retro_ray.text.tokenizer import hub_problem, load_tokenizer
from retro_ray.training.checkpoint import META_NAME, CheckpointMeta, list_checkpoints, load_model, save_checkpoint
from retro_ray.training.optimizer import Optimizer
from retro_ray.training.run_folder import replaced
from retro_ray.training.windows import require_stored_neighbours

RECIPE = "retrofit"
_DEFAULT_CONTEXT = 1024


@dataclass(frozen=True)
class Base:
    """What a run is fitted to."""

    model: ModelConfig
    weights: dict[str, Tensor]
    """Of the decoder."""
    training: TrainingConfig
    """Settings that suit it."""


def load_base(name_or_path: str, manifest: Manifest, num_chunks: int | None = None) -> Base:
    """A base model for a database: a run or checkpoint of jobs/train.py, else a Hugging Face one.

    Args:
        name_or_path: folder, or name on the hub.
        manifest: of the database, which must have the base model's tokens.
        num_chunks: chunks per sequence that are asked for; None: 1,024 tokens, or fewer if the base model knows fewer.

    Raises:
        ConfigError: there is no such model, or it cannot be fitted to this database.
        CheckpointError: the run has no whole checkpoint.
        MismatchError: run and database do not belong together.
    """
    path = Path(name_or_path).expanduser()
    if (path / META_NAME).exists() or list_checkpoints(path):
        return _of_a_run(path, manifest)
    return _of_hugging_face(name_or_path, manifest, num_chunks)


def _of_a_run(path: Path, manifest: Manifest) -> Base:
    model, config, _ = load_model(path, manifest)
    weights = {name: weight for name, weight in model.state_dict().items() if not belongs_to_retrieval(name)}
    return Base(config.model, weights, config.training)


def _of_hugging_face(name_or_path: str, manifest: Manifest, num_chunks: int | None) -> Base:
    pretrained = _load_pretrained(name_or_path)
    require_family(pretrained.config)
    tokenizer = load_tokenizer(name_or_path)
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise ConfigError(
            f"--retrofit {name_or_path} has tokenizer {tokenizer.fingerprint}, the database was built with "
            f"{manifest.tokenizer_fingerprint} ({manifest.tokenizer_name}): build one with jobs/index.py --tokenizer "
            f"{name_or_path}, and name it with --home"
        )
    if pretrained.config.vocab_size < manifest.vocab_size:
        raise ConfigError(
            f"--retrofit {name_or_path} knows {pretrained.config.vocab_size} tokens, its tokenizer has "
            f"{manifest.vocab_size}: use the tokenizer that it was trained with"
        )
    most = longest_context(pretrained.config) // manifest.chunk_length
    chosen = min(most, max(1, _DEFAULT_CONTEXT // manifest.chunk_length)) if num_chunks is None else num_chunks
    if not 1 <= chosen <= most:
        raise ConfigError(
            f"--num-chunks is {chosen}, of {manifest.chunk_length} tokens each; --retrofit {name_or_path} was made for "
            f"{longest_context(pretrained.config)} tokens: use 1 to {most} chunks"
        )
    return Base(
        model=decoder_config(pretrained, manifest.chunk_length, chosen),
        weights=decoder_weights(pretrained),
        training=TrainingConfig(num_steps=2000, batch_size=16, micro_batch_size=2, num_warmup_steps=100),
    )


def fitting_config(
    name_or_path: str, base: Base, manifest: Manifest, model: dict[str, Any], training: dict[str, Any]
) -> RunConfig:
    """The config of a run that fits `base`, with some settings of `ModelConfig` and `TrainingConfig` replaced.

    Raises:
        ConfigError: settings that cannot work.
    """
    shape = dataclasses.replace(base.model, cca_layers=base.model.cca_layers or spread(base.model.num_layers), **model)
    if shape.num_neighbours < 1:
        raise ConfigError("--num-neighbours is 0, but RETRO-fitting is about neighbours: use 1 or more")
    require_stored_neighbours(manifest, shape.num_neighbours)
    path = Path(name_or_path).expanduser()
    config = RunConfig(
        recipe=RECIPE,
        model=shape,
        # A frozen decoder stays good without neighbours, whatever the others learn.
        training=dataclasses.replace(
            base.training, trained="retrieval", retrieval_dropout=0.0, final_retrieval_dropout=None
        ),
        base=str(path.absolute()) if path.exists() else name_or_path,
    )
    return replaced(config, training)


def spread(num_layers: int) -> tuple[int, ...]:
    """Decoder layers that get a chunked cross-attention: every third from the 6th, as in the paper; in a
    model of fewer than 12 layers every second from the middle.
    """
    return tuple(range(6, num_layers + 1, 3) if num_layers >= 12 else range(max(1, num_layers // 2), num_layers + 1, 2))


def write_start(run_directory: Path, config: RunConfig, weights: dict[str, Tensor], manifest: Manifest) -> None:
    """Write the checkpoint of step 0."""
    torch.manual_seed(config.training.seed)
    model = RetroModel(config.model)
    load_decoder(model, weights)
    meta = CheckpointMeta(
        step=0,
        config=config,
        tokenizer_fingerprint=manifest.tokenizer_fingerprint,
        chunking_fingerprint=manifest.chunking_fingerprint,
        database_version=manifest.version,
    )
    save_checkpoint(run_directory, meta, model, Optimizer(model, config.training), keep=0)


def _load_pretrained(name_or_path: str) -> Any:
    """A transformers model, in the precision of its file, from this machine or else from the hub."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    loaded: Any
    path = str(Path(name_or_path).expanduser())
    is_path = Path(path).exists() or name_or_path.startswith((".", "/", "~"))
    problem = None if is_path else hub_problem()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            path,
            local_files_only=is_path or problem is not None,
            use_safetensors=True,
            dtype="auto",
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        hub = f"; the hub does not answer: {problem}" if problem else ""
        raise ConfigError(
            f"cannot load --retrofit {name_or_path} ({reason}{hub}): give the folder of a Hugging Face model with "
            "safetensors, or of a run"
        ) from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise ConfigError(
            f"--retrofit {name_or_path} lacks {len(missing)} weights, {missing[0]} among them: use a whole checkpoint"
        )
    return model
