"""Pretrained decoders of the Llama family, as Hugging Face's transformers has them, in this model's terms.

Llama (SmolLM too), Mistral, Qwen2 and Qwen3 differ in a few settings, all of which `ModelConfig` has.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from retro_ray.config import ModelConfig
from retro_ray.errors import ConfigError
from retro_ray.model.decoder import belongs_to_retrieval
from retro_ray.model.retro import RetroModel

FAMILY = ("llama", "mistral", "qwen2", "qwen3")
# Of these the frequencies are the same at all lengths up to the longest that a model was made for.
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")

_BLOCKS = {
    "input_layernorm": "self_attention.norm",
    "self_attn.q_proj": "self_attention.query",
    "self_attn.k_proj": "self_attention.key",
    "self_attn.v_proj": "self_attention.value",
    "self_attn.o_proj": "self_attention.out",
    "self_attn.q_norm": "self_attention.query_norm",
    "self_attn.k_norm": "self_attention.key_norm",
    "post_attention_layernorm": "feed_forward.norm",
    "mlp.gate_proj": "feed_forward.gate",
    "mlp.up_proj": "feed_forward.up",
    "mlp.down_proj": "feed_forward.down",
}
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embedding.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "untied_read_out.weight",
}


def require_family(config: Any) -> None:
    """Check that this model has all that a pretrained one has, by its transformers config.

    Raises:
        ConfigError: it has not; the message says what is missing.
    """
    if config.model_type not in FAMILY:
        raise ConfigError(
            f"the base model is of type {config.model_type!r}; RETRO-fitting takes {', '.join(FAMILY)}: choose one"
        )
    rope_type = config.rope_parameters.get("rope_type", "default")
    for name, value, wanted in (
        ("hidden_act", config.hidden_act, ("silu",)),
        ("mlp_bias", getattr(config, "mlp_bias", False), (False,)),
        ("rope_type", rope_type, _ROPE_TYPES),
    ):
        if value not in wanted:
            allowed = ", ".join(map(str, wanted))
            raise ConfigError(f"the base model has {name} {value!r}; RETRO-fitting takes {allowed}: choose another")


def longest_context(config: Any) -> int:
    """Most tokens for which a pretrained model attends to all that came before, and knows their positions."""
    return min(
        config.max_position_embeddings, getattr(config, "sliding_window", None) or config.max_position_embeddings
    )


def decoder_config(pretrained: Any, chunk_length: int, num_chunks: int) -> ModelConfig:
    """A transformers model's shape, without retrieval. An encoder would be as wide as the decoder and
    have one layer.
    """
    config = pretrained.config
    rotary = pretrained.model.rotary_emb
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    first_layer = pretrained.model.layers[0]
    return ModelConfig(
        vocab_size=config.vocab_size,
        chunk_length=chunk_length,
        num_chunks=num_chunks,
        hidden_dim=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        ffn_dim=config.intermediate_size,
        feed_forward="swiglu",
        attention_bias=first_layer.self_attn.q_proj.bias is not None,
        qk_norm=hasattr(first_layer.self_attn, "q_norm"),
        cca_layers=(),
        encoder_dim=config.hidden_size,
        encoder_layers=1,
        encoder_heads=config.num_attention_heads,
        encoder_ffn_dim=4 * config.hidden_size,
        encoder_ca_layers=(1,),
        share_encoder_embedding=True,
        normalize_neighbour_embeddings=True,
        tie_embeddings=config.tie_word_embeddings,
        rope_frequencies=tuple(rotary.inv_freq.tolist()),
        rope_magnitude=float(rotary.attention_scaling),
        norm_eps=config.rms_norm_eps,
    )


def decoder_weights(pretrained: Any) -> dict[str, Tensor]:
    """A transformers model's weights under this model's names."""
    weights: dict[str, Tensor] = {}
    for name, weight in pretrained.state_dict().items():
        if name == "lm_head.weight" and pretrained.config.tie_word_embeddings:
            continue
        weights[_OUTSIDE.get(name) or _name_in_layer(name)] = weight
    for name in [name for name in weights if name.endswith("self_attention.query.bias")]:
        # Qwen2's output projection has no bias, as the only one of the four.
        out_bias = name.replace("query", "out")
        weights.setdefault(out_bias, torch.zeros_like(weights["norm.weight"]))
    return weights


def load_decoder(model: RetroModel, weights: dict[str, Tensor]) -> None:
    """Copy a decoder's weights; those of retrieval stay as they are.

    Raises:
        ConfigError: they are not exactly those of the model's decoder.
    """
    own = model.state_dict()
    expected = {name: tuple(weight.shape) for name, weight in own.items() if not belongs_to_retrieval(name)}
    given = {name: tuple(weight.shape) for name, weight in weights.items()}
    if given != expected:
        different = sorted(name for name in given.keys() | expected.keys() if given.get(name) != expected.get(name))
        raise ConfigError(
            f"the base model's weights do not fit its config ({len(different)} differ, {different[0]} among them): "
            "use a whole checkpoint"
        )
    for name, weight in weights.items():
        own[name].copy_(weight)


def _name_in_layer(name: str) -> str:
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None or match[2] not in _BLOCKS:
        raise ConfigError(f"the base model has the weight {name}, which RETRO-fitting does not know: choose another")
    return f"layers.{match[1]}.{_BLOCKS[match[2]]}.{match[3]}"
