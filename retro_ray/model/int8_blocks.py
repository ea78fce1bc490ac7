"""The decoder's blocks for new tokens on a CPU, with weights of eight bits.

Each does what its block's own `step` does, in four or five calls: products with weights, and between
them loops that take the rows from one to the next.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from retro_ray.model import compiled_rows
from retro_ray.model.attention import SelfAttention
from retro_ray.model.cached_rows import CachedRows
from retro_ray.model.chunked import ChunkedCrossAttention, NeighbourEncoding
from retro_ray.model.compiled_loops import as_array, use_threads_of_torch
from retro_ray.model.decoder_layer import DecoderLayer
from retro_ray.model.int8_product import Int8Product, Multiples
from retro_ray.model.layers import FeedForward, GatedFeedForward
from retro_ray.model.new_tokens import NewTokens
from retro_ray.model.rms_norm import RMSNorm


class Int8Norm:
    """RMSNorm, its rows ready for products."""

    def __init__(self, norm: RMSNorm) -> None:
        self._gain_D = as_array(norm.weight.detach().float())
        self._eps = float(norm.eps if norm.eps is not None else torch.finfo(torch.float32).eps)

    def __call__(self, h_ND: Tensor) -> Multiples:
        normed = Multiples.empty(*h_ND.shape)
        compiled_rows.round_normed(as_array(h_ND.float()), self._gain_D, self._eps, *_arrays(normed))
        return normed


class Int8SelfAttention:
    """attention.SelfAttention."""

    def __init__(self, block: SelfAttention) -> None:
        projections = block.query, block.key, block.value
        self._norm = Int8Norm(block.norm)
        self._project = Int8Product(torch.cat([linear.weight for linear in projections]))
        self._out = Int8Product(block.out.weight)
        self._head_dim = block.head_dim
        biases = [linear.bias.detach() for linear in projections if linear.bias is not None]
        self._bias = as_array(torch.cat(biases).float().view(-1, block.head_dim)) if biases else None
        self._out_bias_D = None if block.out.bias is None else block.out.bias.detach().float()
        self._gains = _gain(block.query_norm), _gain(block.key_norm)
        self._eps = float(getattr(block.key_norm, "eps", 0.0))

    def step(self, h_ND: Tensor, new: NewTokens, keys: CachedRows, values: CachedRows) -> Tensor:
        """The activations [N, D], float32, after the block; keys and values join those of a cache in eight bits."""
        projected = self._project.of(self._norm(h_ND))
        num_tokens, num_heads = len(h_ND), projected.of_NI.shape[1] // self._head_dim - 2 * keys.shape[1]
        read = Multiples.empty(num_tokens, num_heads * self._head_dim)
        of_read, read_steps = _arrays(read)
        of_projected, steps = _arrays(projected)
        use_threads_of_torch()
        compiled_rows.self_attention(
            of_projected.reshape(num_tokens, -1, self._head_dim),
            steps,
            self._bias,
            *self._gains,
            self._eps,
            as_array(new.rotation.cos),
            as_array(new.rotation.sin),
            as_array(new.slots_N),
            as_array(new.positions_N),
            *_stored(keys),
            *_stored(values),
            of_read.reshape(num_tokens, -1, self._head_dim),
            read_steps,
        )
        h_ND = self._out.of(read).added_to(h_ND)
        return h_ND if self._out_bias_D is None else h_ND.add_(self._out_bias_D)


class Int8CrossAttention:
    """chunked.ChunkedCrossAttention."""

    def __init__(self, block: ChunkedCrossAttention) -> None:
        self._norm = Int8Norm(block.norm)
        self._query, self._out = Int8Product(block.query.weight), Int8Product(block.out.weight)
        self._head_dim = block.head_dim

    def step(self, h_ND: Tensor, new: NewTokens, keys: CachedRows, values: CachedRows, refusal_BS: Tensor) -> Tensor:
        """The activations [N, D], float32, after the block; a cache's rows in eight bits are read unless refused."""
        queries = self._query.of(self._norm(h_ND))
        read = Multiples.empty(*queries.of_NI.shape)
        (of_queries, steps), (of_read, read_steps) = _arrays(queries), _arrays(read)
        use_threads_of_torch()
        compiled_rows.cross_attention(
            of_queries.reshape(len(h_ND), -1, self._head_dim),
            steps,
            as_array(new.neighbour_rotation.cos),
            as_array(new.neighbour_rotation.sin),
            as_array(new.slots_N),
            *_stored(keys),
            *_stored(values),
            as_array(refusal_BS.float()),
            of_read.reshape(len(h_ND), -1, self._head_dim),
            read_steps,
        )
        return self._out.of(read).added_to(h_ND)


class Int8FeedForward:
    """layers.FeedForward, or GatedFeedForward."""

    def __init__(self, block: FeedForward) -> None:
        self._norm = Int8Norm(block.norm)
        is_gated = isinstance(block, GatedFeedForward)
        self._activate = compiled_rows.gated_silu if is_gated else compiled_rows.gelu
        self._up = Int8Product(torch.cat([block.gate.weight, block.up.weight]) if is_gated else block.up.weight)
        self._down = Int8Product(block.down.weight)
        self._inner_dim = block.down.in_features

    def __call__(self, h_ND: Tensor) -> Tensor:
        """The activations [N, D], float32, after the block."""
        inner = Multiples.empty(len(h_ND), self._inner_dim)
        use_threads_of_torch()
        self._activate(*_arrays(self._up.of(self._norm(h_ND))), *_arrays(inner))
        return self._down.of(inner).added_to(h_ND)


class Int8Layer:
    """decoder_layer.DecoderLayer, for new tokens."""

    def __init__(self, layer: DecoderLayer) -> None:
        self.number = layer.number
        self.self_attention = Int8SelfAttention(layer.self_attention)
        self.cca = None if layer.cca is None else Int8CrossAttention(layer.cca)
        self.feed_forward = Int8FeedForward(layer.feed_forward)


class Int8ReadOut:
    """READ of normed rows."""

    def __init__(self, weight_VD: Tensor) -> None:
        self._product = Int8Product(weight_VD)

    def __call__(self, h_ND: Tensor) -> Tensor:
        """Logits [N, V], float32."""
        rounded = Multiples.empty(*h_ND.shape)
        compiled_rows.round_rows(as_array(h_ND), *_arrays(rounded))
        logits = self._product.of(rounded)
        return logits.of_NI.mul_(logits.steps_N[:, None])


class Int8Decoder:
    """All that new tokens pass through, with copies of the weights in eight bits."""

    def __init__(self, layers: Iterable[DecoderLayer], read_out_weight_VD: Tensor) -> None:
        self.layers = tuple(Int8Layer(layer) for layer in layers)
        self.read_out = Int8ReadOut(read_out_weight_VD)
        self.encoding: NeighbourEncoding | None = None
        """In place of the model's own for neighbours that come with new tokens."""


def _gain(norm: nn.Module) -> Any:
    return as_array(norm.weight.detach().float()) if isinstance(norm, RMSNorm) else None


def _stored(rows: CachedRows) -> tuple[Any, Any]:
    assert rows.steps is not None, "a cache of a model with weights of eight bits holds rows of as many"
    return as_array(rows.of), as_array(rows.steps)


def _arrays(x: Multiples) -> tuple[Any, Any]:
    return as_array(x.of_NI), as_array(x.steps_N)
