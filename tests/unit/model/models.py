"""Small models and batches for the tests of the model."""

from dataclasses import dataclass

import torch
from torch import Tensor

from retro_ray.config import ModelConfig
from retro_ray.model import RetroModel
from retro_ray.model.new_tokens import NewTokens, plan_pass

VOCAB_SIZE = 37


LLAMA_BLOCKS = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "feed_forward": "swiglu",
    "attention_bias": True,
    "qk_norm": True,
    "rope_frequencies": (1.0, 0.3, 0.05, 0.01),
    "rope_magnitude": 1.1,
    "normalize_neighbour_embeddings": True,
}
"""All that pretrained decoders of that family have."""

RETRIEVAL = {
    "paper": {"cca_start": "paper"},
    "copy": {"cca_start": "copy"},
    "pointer": {"cca_start": "copy", "pointer": True},
    "paper and pointer": {"cca_start": "paper", "pointer": True},
}
"""Kinds of what reads neighbours."""


def small_config(**changes: object) -> ModelConfig:
    """Chunks of 4 tokens, 3 layers with CCA in 2 and 3."""
    settings: dict = {
        "vocab_size": VOCAB_SIZE,
        "chunk_length": 4,
        "num_chunks": 4,
        "hidden_dim": 16,
        "num_layers": 3,
        "num_heads": 2,
        "head_dim": 8,
        "ffn_dim": 24,
        "cca_layers": (2, 3),
        "encoder_dim": 16,
        "encoder_layers": 2,
        "encoder_heads": 2,
        "encoder_ffn_dim": 20,
        "encoder_ca_layers": (1,),
    }
    return ModelConfig(**{**settings, **changes})


def random_model(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> RetroModel:
    """All weights random and large, those that start at zero or one too: every path matters."""
    torch.manual_seed(seed)
    model = RetroModel(config).to(dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.copy_(torch.randn_like(weight) * 0.5 + 1)
            else:
                std = 0.5 if "embedding" in name else weight.shape[1] ** -0.5
                weight.copy_(torch.randn_like(weight) * 1.5 * std)
    return model


@dataclass(frozen=True)
class Batch:
    """Random input of a model."""

    tokens_BT: Tensor
    neighbours_BLKR: Tensor
    mask_BLKR: Tensor

    @property
    def retrieval(self) -> dict[str, Tensor]:
        return {"neighbours_BLKR": self.neighbours_BLKR, "neighbour_mask_BLKR": self.mask_BLKR}


def random_batch(
    config: ModelConfig,
    *,
    batch_size: int = 2,
    num_tokens: int = 18,
    num_chunks: int | None = None,
    num_neighbours: int = 2,
    masked_share: float = 0.2,
    seed: int = 0,
) -> Batch:
    """By default all complete chunks have neighbours, with some of their tokens masked."""
    generator = torch.Generator().manual_seed(seed)
    if num_chunks is None:
        num_chunks = num_tokens // config.chunk_length
    shape = (batch_size, num_chunks, num_neighbours, config.neighbour_length)
    return Batch(
        tokens_BT=torch.randint(config.vocab_size, (batch_size, num_tokens), generator=generator),
        neighbours_BLKR=torch.randint(config.vocab_size, shape, generator=generator),
        mask_BLKR=torch.rand(shape, generator=generator) >= masked_share,
    )


def place_new_tokens(
    config: ModelConfig,
    lengths: list[int],
    num_new: list[int],
    held_rows: int | None,
    device: torch.device,
    dtype: torch.dtype,
) -> NewTokens:
    """Some new tokens, whichever, of slots of these lengths in a cache that holds so many rows; None: read alone."""
    shape, numbers = plan_pass([0] * sum(num_new), lengths, num_new, held_rows)
    return shape.place(config, torch.tensor(numbers, device=device), dtype)
