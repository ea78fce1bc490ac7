"""How much arithmetic a trained token takes, and how much a device can do."""

from __future__ import annotations

import time
from typing import Literal

import torch

from retro_ray.config import ModelConfig
from retro_ray.model.int8_training import multiply_int8

# Dense bf16 FLOP/s of the makers' data sheets; the longest name that the device's name contains counts.
_GPU_PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "A100": 312e12,
    "A10G": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


def training_flops_per_token(config: ModelConfig, trained: Literal["all", "retrieval"] = "all") -> float:
    """Floating-point operations of forward and backward pass per decoder token, padding included.

    Counts products alone: twice the weights a token meets, and the two products of each attention.
    Recomputation (gradient checkpointing) is not counted, as usual. Of a frozen decoder (`trained`
    "retrieval") the layers from the first with retrieval on pass gradients through, and no weight
    gets any.
    """
    attended = config.num_heads * config.head_dim
    projections = 2 * config.hidden_dim * (attended + config.kv_heads * config.head_dim)
    feed_forward = (3 if config.feed_forward == "swiglu" else 2) * config.hidden_dim * config.ffn_dim
    read_out = config.vocab_size * config.hidden_dim
    attention = 2 * attended * config.context_length / 2  # causal: half of the pairs
    forward = config.num_layers * (projections + feed_forward + attention) + read_out
    of_retrieval = sum(_retrieval_products(config)) if config.cca_layers else 0.0
    if trained == "all":
        return 3 * 2 * (forward + of_retrieval)
    layers_behind = config.num_layers - min(config.cca_layers)
    backward = layers_behind * (projections + feed_forward + 2 * attention) + feed_forward + read_out
    return 2 * (forward + backward) + 3 * 2 * of_retrieval


def _retrieval_products(config: ModelConfig) -> tuple[float, float]:
    """Weights met, and attention products, per decoder token: of encoder, chunked cross-attentions and pointer."""
    # Each chunk of m tokens brings K neighbours of 2m tokens.
    per_token = config.num_neighbours * config.neighbour_length / config.chunk_length
    attended, encoder_attended = config.num_heads * config.head_dim, config.encoder_heads * config.head_dim
    layer = 4 * config.encoder_dim * encoder_attended + 2 * config.encoder_dim * config.encoder_ffn_dim
    weights = per_token * config.encoder_layers * layer
    products = per_token * config.encoder_layers * 2 * encoder_attended * config.neighbour_length
    # The encoder's cross-attention: queries and output of neighbour tokens, keys and values of decoder tokens.
    num_cross = len(config.encoder_ca_layers)
    weights += num_cross * 2 * encoder_attended * (per_token * config.encoder_dim + config.hidden_dim)
    products += num_cross * per_token * 2 * encoder_attended * config.chunk_length
    # Chunked cross-attention: the other way round.
    num_cca = len(config.cca_layers)
    # Keys that copy come from two tokens each.
    of_neighbours = 3 if config.cca_start == "copy" else 2
    weights += num_cca * attended * (2 * config.hidden_dim + of_neighbours * per_token * config.encoder_dim)
    products += num_cca * 2 * attended * config.num_neighbours * config.neighbour_length
    if config.pointer:
        of_position = config.hidden_dim + config.pointer_max_ngram
        weights += config.hidden_dim * (of_position + 2 * per_token * config.encoder_dim)
        products += config.hidden_dim * config.num_neighbours * config.neighbour_length
    return weights, products


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of a type that `device` can reach: from a table for GPUs, measured for a CPU; None if not known."""
    if device.type == "cpu":
        return _measured_flops(dtype)
    name = torch.cuda.get_device_name(device)
    known = [key for key in _GPU_PEAK_FLOPS if all(word in name for word in key.split())]
    return _GPU_PEAK_FLOPS[max(known, key=len)] if known and dtype == torch.bfloat16 else None


def _measured_flops(dtype: torch.dtype, size: int = 768, repetitions: int = 10) -> float:
    """Best rate of a few square matrix products on this process's threads; takes some hundredths of a second."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    multiply = multiply_int8 if dtype == torch.int8 else torch.mm
    best = 0.0
    for _ in range(repetitions):
        start = time.perf_counter()
        multiply(a, b)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best
