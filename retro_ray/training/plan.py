"""What a training run would take, by arithmetic: parameters, memory of each worker, time.

Weights and gradients are fp32, products bf16 (autocast), attention is a fused kernel that keeps no
scores, as on a GPU. What torch and its allocator take besides, 10 to 20 %, is not counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from retro_ray.config import ModelConfig, Parallel, RunConfig, TrainingConfig
from retro_ray.training.flops import training_flops_per_token

_FP32, _BF16, _INT64 = 4, 2, 8
_SECONDS_PER_DAY = 86_400


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Weights of a model, by what they belong to."""

    decoder: int
    """Without what follows."""
    cross_attention: int
    """The chunked cross-attentions, and the pointer."""
    encoder: int
    embeddings: int
    """Of tokens and neighbours, and an untied read-out."""
    largest_block: int
    """The most that one block has: an attention, a feed-forward block, or the encoder."""

    @property
    def total(self) -> int:
        return self.decoder + self.cross_attention + self.encoder + self.embeddings


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that a worker needs."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True, kw_only=True)
class Duration:
    """How long a run takes."""

    tokens: int
    tokens_per_second: float
    """Of all workers."""

    @property
    def days(self) -> float:
        return self.tokens / self.tokens_per_second / _SECONDS_PER_DAY


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """The weights of `RetroModel(config)`, without making one."""
    d, attended, grouped = config.hidden_dim, config.num_heads * config.head_dim, config.kv_heads * config.head_dim
    attention = d + 2 * d * (attended + grouped)
    attention += (attended + 2 * grouped + d) * config.attention_bias + 2 * config.head_dim * config.qk_norm
    feed_forward = d + d * config.ffn_dim * (3 if config.feed_forward == "swiglu" else 2)

    e, encoder_attended = config.encoder_dim, config.encoder_heads * config.head_dim
    cross_attention = d + 2 * attended * (d + e) + 2 * e * (config.cca_start == "copy")
    encoder_layers = config.encoder_layers * (2 * e + 4 * e * encoder_attended + 2 * e * config.encoder_ffn_dim)
    conditioning = len(config.encoder_ca_layers) * (e + 2 * encoder_attended * (e + d))
    encoder = encoder_layers + conditioning + d + e if config.cca_layers else 0

    of_scalars = (1 + config.pointer_max_ngram) * (d + 1)  # the sentinel, and what matches are worth
    pointer = d * (d + 2 * e) + of_scalars if config.cca_layers and config.pointer else 0
    own_embedding = bool(config.cca_layers) and not config.share_encoder_embedding
    columns = d * (1 if config.tie_embeddings else 2) + e * own_embedding
    return ParameterCounts(
        decoder=config.num_layers * (attention + feed_forward) + d,
        cross_attention=len(config.cca_layers) * cross_attention + pointer,
        encoder=encoder,
        embeddings=config.vocab_size * columns,
        largest_block=max(attention, feed_forward, encoder, cross_attention if config.cca_layers else 0),
    )


def memory_per_worker(config: RunConfig, num_workers: int, parallel: Parallel) -> Memory:
    """The most that a worker needs at once.

    With fsdp, weights, gradients and the optimiser's state are divided among the workers, and a worker
    holds embeddings and two blocks whole besides.
    """
    counts, training = count_parameters(config.model), config.training
    micro_batch = min(training.micro_batch_size, math.ceil(training.batch_size / num_workers))
    activations = micro_batch * activation_bytes(config.model, training.gradient_checkpointing)
    optimizer = optimizer_bytes(counts, training)
    autocast = counts.total * _BF16  # copies, kept until the step ends
    if parallel == "ddp":
        return Memory(
            weights=counts.total * _FP32 + autocast,
            gradients=counts.total * _FP32,
            optimizer=optimizer,
            activations=activations,
        )
    share = math.ceil(counts.total / num_workers)
    return Memory(
        weights=(share + counts.embeddings + 2 * counts.largest_block) * _FP32 + autocast,
        gradients=(share + counts.embeddings + counts.largest_block) * _FP32,
        optimizer=math.ceil(optimizer / num_workers),
        activations=activations,
    )


def optimizer_bytes(counts: ParameterCounts, training: TrainingConfig) -> int:
    """AdamW keeps two numbers for each weight, Muon one; vectors are too few to tell apart."""
    by_muon = counts.total - counts.embeddings if training.optimizer == "muon" else 0
    return _FP32 * (2 * counts.total - by_muon)


def activation_bytes(config: ModelConfig, gradient_checkpointing: bool) -> int:
    """What one sequence leaves for the backward pass.

    Each block keeps its input in fp32 and, normalised, in bf16, and what its products took, in bf16.
    """
    tokens = config.context_length
    decoder_layer, retrieval = _of_decoder_layer(config), _of_encoder(config)
    of_cca = _of_cross_attention(config)
    ending = _block_input(config.hidden_dim) + _of_pointer(config)
    if not gradient_checkpointing:
        everything = config.num_layers * decoder_layer + retrieval + len(config.cca_layers) * of_cca + ending
        return tokens * everything
    # The inputs of all layers, the encoder's output, and all of one layer at a time.
    encoded = _BF16 * config.encoder_dim * _neighbour_tokens(config)
    return tokens * (
        config.num_layers * _FP32 * config.hidden_dim + encoded + decoder_layer + retrieval + of_cca + ending
    )


def duration(config: RunConfig, num_workers: int, flops_per_worker: float) -> Duration:
    """At a rate that each worker reaches in training, in FLOP/s."""
    training = config.training
    return Duration(
        tokens=training.num_steps * training.batch_size * config.model.context_length,
        tokens_per_second=num_workers * flops_per_worker / training_flops_per_token(config.model),
    )


# Bytes per decoder token.


def _of_decoder_layer(config: ModelConfig) -> int:
    queries, keys = config.num_heads * config.head_dim, config.kv_heads * config.head_dim
    attention = _block_input(config.hidden_dim) + _BF16 * (2 * queries + 2 * keys)
    # Inside: before and after the activation; with a gate, both factors and their product too.
    inside = (4 if config.feed_forward == "swiglu" else 2) * config.ffn_dim
    return attention + _block_input(config.hidden_dim) + _BF16 * inside


def _of_encoder(config: ModelConfig) -> int:
    if not config.cca_layers:
        return 0
    attended = _BF16 * config.encoder_heads * config.head_dim
    block = _block_input(config.encoder_dim)
    layer = 2 * block + 4 * attended + _BF16 * 2 * config.encoder_ffn_dim
    num_cross = len(config.encoder_ca_layers)
    predecessors = _BF16 * config.encoder_dim if config.cca_start == "copy" or config.pointer else 0
    of_neighbours = config.encoder_layers * layer + num_cross * (block + 2 * attended) + block + predecessors
    of_chunk = _block_input(config.hidden_dim) + num_cross * 2 * attended
    return _neighbour_tokens(config) * of_neighbours + of_chunk


def _of_cross_attention(config: ModelConfig) -> int:
    if not config.cca_layers:
        return 0
    attended = _BF16 * config.num_heads * config.head_dim
    return _block_input(config.hidden_dim) + 2 * attended + _neighbour_tokens(config) * 2 * attended


def _of_pointer(config: ModelConfig) -> int:
    """Queries, before and after they are scaled, and keys; and what no kernel computes anew: scores, shares, how long
    the matches are.
    """
    if not (config.pointer and config.cca_layers):
        return 0
    of_row = 3 * _FP32 + _INT64 * bool(config.pointer_max_ngram)
    return (
        _BF16 * config.hidden_dim * (2 + _neighbour_tokens(config))
        + of_row * config.num_neighbours * config.neighbour_length
    )


def _block_input(dim: int) -> int:
    return (_FP32 + _BF16) * dim


def _neighbour_tokens(config: ModelConfig) -> int:
    """For each token of the decoder."""
    return config.num_neighbours * config.neighbour_length // config.chunk_length
