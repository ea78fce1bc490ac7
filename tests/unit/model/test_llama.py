"""The decoder with retrieval off equals transformers' own models of the Llama family, whose weights it takes over."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from retro_ray.errors import ConfigError
from retro_ray.model import RetroModel
from retro_ray.model.pretrained import decoder_config, decoder_weights, load_decoder, longest_context, require_family
from tests.unit.model.models import VOCAB_SIZE

SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}


def pretrained(kind: str) -> torch.nn.Module:
    """A model with random weights, the norms and biases too."""
    torch.manual_seed(0)
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
        "llama-3": lambda: LlamaForCausalLM(
            LlamaConfig(**SHAPE, num_key_value_heads=2, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True)
        ),
        "llama-biased": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True, head_dim=6)),
        "llama-dynamic": lambda: LlamaForCausalLM(
            LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
        ),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, num_key_value_heads=1, sliding_window=48)),
        "qwen2": lambda: Qwen2ForCausalLM(
            Qwen2Config(**SHAPE, num_key_value_heads=2, tie_word_embeddings=True, rope_parameters=YARN)
        ),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=16)),
    }[kind]()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + 1 if weight.ndim == 1 else torch.randn_like(weight) * 0.2)
    return model.eval()


KINDS = pytest.mark.parametrize(
    "kind", ["llama", "llama-3", "llama-biased", "llama-dynamic", "mistral", "qwen2", "qwen3"]
)


def decoder(base: torch.nn.Module) -> RetroModel:
    require_family(base.config)
    model = RetroModel(decoder_config(base, chunk_length=8, num_chunks=6)).eval()
    load_decoder(model, decoder_weights(base))
    return model


@KINDS
@torch.no_grad()
def test_logits_are_those_of_transformers(kind: str) -> None:
    base = pretrained(kind)
    model = decoder(base)
    tokens_BT = torch.randint(VOCAB_SIZE, (2, 48))
    expected = base(tokens_BT).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(model(tokens_BT), expected, rtol=1e-5, atol=1e-5)
    assert longest_context(base.config) == (48 if kind == "mistral" else 64)


@KINDS
@torch.no_grad()
def test_cached_decoding_gives_them_too(kind: str) -> None:
    base = pretrained(kind)
    model = decoder(base)
    tokens_BT = torch.randint(VOCAB_SIZE, (2, 40))
    expected = base(tokens_BT).logits
    cache = model.new_cache(2, 40)
    torch.testing.assert_close(
        model.prefill(tokens_BT[:, :30], torch.tensor([30, 27]), cache),
        torch.stack([expected[0, 29], expected[1, 26]]),
        rtol=1e-5,
        atol=1e-5,
    )
    for step in range(5):
        logits_BV = model.decode_step(torch.stack([tokens_BT[0, 30 + step], tokens_BT[1, 27 + step]]), cache)
        expected_BV = torch.stack([expected[0, 30 + step], expected[1, 27 + step]])
        torch.testing.assert_close(logits_BV, expected_BV, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LlamaConfig(**SHAPE, hidden_act="gelu"), "hidden_act 'gelu'"),
        (LlamaConfig(**SHAPE, mlp_bias=True), "mlp_bias True"),
        (
            LlamaConfig(
                **SHAPE,
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                    "original_max_position_embeddings": 16,
                    "factor": 4.0,
                },
            ),
            "rope_type 'longrope'",
        ),
    ],
)
def test_what_this_model_lacks_is_refused_by_name(config: LlamaConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        require_family(config)


def test_weights_of_another_shape_are_refused() -> None:
    base = pretrained("llama")
    weights = decoder_weights(base)
    weights["norm.weight"] = torch.ones(3)
    with pytest.raises(ConfigError, match=r"1 differ, norm\.weight among them"):
        load_decoder(RetroModel(decoder_config(base, 8, 6)), weights)
