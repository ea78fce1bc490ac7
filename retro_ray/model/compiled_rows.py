"""Loops over the few rows of new tokens on a CPU, compiled by Numba when they are first called.

A step of decoding is short work on much memory. Keys and values are read here at the speed of memory,
where torch's product of one row takes two to three times as long; and what torch does in a dozen
operations of some microseconds each takes one. Every row is computed alone and in one order: it gives
the same to the bit whatever rows are beside it.

"Multiples" are what int8_product.py multiplies: rows, float32, in units of a step, float32, of their own.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

from retro_ray.model.compiled_loops import (
    LARGEST_MULTIPLE,
    SMALLEST_STEP,
    compiled,
    exp,
    part_of_loops,
    share_below,
    to_bf16,
    wide,
)

_LEAST = -1e30
"""Below every score."""


@part_of_loops
def _read_head(
    query: Any, key: Any, key_steps: Any, value: Any, value_steps: Any, num_rows: Any, refusal: Any, read: Any
) -> None:
    """One head of one token: softmax(q k^T / sqrt(E)) v; with `refusal`, over the rows where it is not negative.

    Keys and values are in units of steps, row by row, unless these are None.
    """
    head_dim = len(query)
    scale = query.dtype.type(1 / math.sqrt(head_dim))
    weights = np.empty(num_rows, query.dtype)
    largest = query.dtype.type(_LEAST)
    for row in range(num_rows):
        if refusal is not None and refusal[row] < 0:
            weights[row] = query.dtype.type(2 * _LEAST)
            continue
        score = query.dtype.type(0)
        for e in range(head_dim):
            score += query[e] * wide(key[row, e])
        score *= scale
        if key_steps is not None:
            score *= key_steps[row]
        weights[row] = score
        largest = max(largest, score)
    total = query.dtype.type(0)
    for row in range(num_rows):
        weight = exp(weights[row] - largest)
        if weights[row] < _LEAST:
            weight = query.dtype.type(0)
        weights[row] = weight
        total += weight
    for e in range(head_dim):
        read[e] = 0
    for row in range(num_rows):
        if refusal is not None and refusal[row] < 0:
            continue
        weight = weights[row] / total
        if value_steps is not None:
            weight *= value_steps[row]
        for e in range(head_dim):
            read[e] += weight * wide(value[row, e])


@part_of_loops
def _round_head(x: Any, rounded: Any) -> Any:
    """A row in whole units of the step that is returned."""
    largest = np.float32(0)
    for e in range(len(x)):
        largest = max(largest, abs(x[e]))
    step = max(largest * np.float32(1 / LARGEST_MULTIPLE), np.float32(SMALLEST_STEP))
    for e in range(len(x)):
        rounded[e] = np.int8(np.rint(x[e] / step))
    return step


@compiled(parallel=True)
def read_past(q: Any, keys: Any, values: Any, slots: Any, positions: Any, read: Any) -> None:
    """What tokens read in the rows of their slots up to their own positions.

    Args:
        q: [N, H, E].
        keys: [B, G, S, E], each of the G heads for H / G consecutive heads of queries.
        values: [B, G, S, E].
        slots: int64 [N], of the tokens among the B.
        positions: int64 [N].
        read: [N, H, E], written.
    """
    num_tokens, num_heads, _ = q.shape
    for item in numba.prange(num_tokens * num_heads):
        token, head = item // num_heads, item % num_heads
        slot, shared = slots[token], head * keys.shape[1] // num_heads
        num_rows = positions[token] + 1
        _read_head(
            q[token, head], keys[slot, shared], None, values[slot, shared], None, num_rows, None, read[token, head]
        )


@compiled(parallel=True)
def read_allowed(q: Any, keys: Any, values: Any, slots: Any, refusal: Any, read: Any) -> None:
    """What tokens read in those of the first rows of their slots where `refusal`, [B or fewer, S or fewer], is not
    negative; the rest as `read_past`.
    """
    num_tokens, num_heads, _ = q.shape
    for item in numba.prange(num_tokens * num_heads):
        token, head = item // num_heads, item % num_heads
        slot, shared = slots[token], head * keys.shape[1] // num_heads
        row_refusal = refusal[slot]
        key, value = keys[slot, shared], values[slot, shared]
        _read_head(q[token, head], key, None, value, None, len(row_refusal), row_refusal, read[token, head])


@part_of_loops
def _to_multiples(row: Any, multiples: Any) -> Any:
    """A row in units of the step that is returned."""
    largest = np.float32(0)
    for i in range(len(row)):
        largest = max(largest, abs(row[i]))
    step = np.float32(SMALLEST_STEP) + largest * np.float32(1 / LARGEST_MULTIPLE)
    for i in range(len(row)):
        multiples[i] = row[i] / step
    return step


@compiled(parallel=False)
def round_rows(x: Any, multiples: Any, steps: Any) -> None:
    """Rows [N, I] as multiples float32 [N, I] and steps float32 [N], both written."""
    for token in range(len(x)):
        for i in range(x.shape[1]):
            multiples[token, i] = wide(x[token, i])
        steps[token] = _to_multiples(multiples[token], multiples[token])


@compiled(parallel=True)
def round_to_bytes(x: Any, rounded: Any, steps: Any) -> None:
    """Rows [N, I] as whole multiples, each with 128 added, uint8 [N, I], of steps float32 [N]; both written."""
    for token in numba.prange(len(x)):
        largest = np.float32(0)
        for i in range(x.shape[1]):
            largest = max(largest, abs(wide(x[token, i])))
        step = np.float32(SMALLEST_STEP) + largest * np.float32(1 / LARGEST_MULTIPLE)
        for i in range(x.shape[1]):
            rounded[token, i] = np.uint8(np.rint(wide(x[token, i]) / step) + np.float32(128))
        steps[token] = step


@compiled(parallel=True)
def scale_rows(x: Any, steps: Any, scaled: Any) -> None:
    """Rows float32 [N, O] times steps float32 [N], as bfloat16 [N, O], written."""
    for token in numba.prange(len(x)):
        for i in range(x.shape[1]):
            scaled[token, i] = to_bf16(x[token, i] * steps[token])


@part_of_loops
def _norm(x: Any, gain: Any, eps: Any, normed: Any) -> None:
    """RMSNorm of one row."""
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * x[i]
    scale = np.float32(1) / np.sqrt(total / np.float32(len(x)) + np.float32(eps))
    for i in range(len(x)):
        normed[i] = x[i] * scale * gain[i]


@compiled(parallel=False)
def round_normed(x: Any, gain: Any, eps: Any, multiples: Any, steps: Any) -> None:
    """RMSNorm of rows float32 [N, D] with `gain` float32 [D], as multiples and steps, both written."""
    for token in range(len(x)):
        _norm(x[token], gain, eps, multiples[token])
        steps[token] = _to_multiples(multiples[token], multiples[token])


@part_of_loops
def _rotate(x: Any, cos: Any, sin: Any, rotated: Any) -> None:
    """One head, rotated as layers.RowRotation says."""
    half = len(x) // 2
    for e in range(half):
        first, second = x[e], x[e + half]
        rotated[e] = first * wide(cos[e]) + second * wide(sin[e])
        rotated[e + half] = second * wide(cos[e + half]) + first * wide(sin[e + half])


@compiled(parallel=True)
def self_attention(
    projected: Any,
    steps: Any,
    bias: Any,
    query_gain: Any,
    key_gain: Any,
    eps: Any,
    cos: Any,
    sin: Any,
    slots: Any,
    positions: Any,
    keys: Any,
    key_steps: Any,
    values: Any,
    value_steps: Any,
    read: Any,
    read_steps: Any,
) -> None:
    """Self-attention of new tokens, from their projections, whose keys and values join those of a cache.

    Args:
        projected: float32 [N, H + 2 G, E], queries, keys and values in units of `steps`; overwritten.
        steps: float32 [N].
        bias: float32 [H + 2 G, E] of the projections, or None.
        query_gain: float32 [E] of a norm of each head's queries, or None.
        key_gain: the same of its keys.
        eps: of these norms.
        cos: [N, 1, E], layers.RowRotation.
        sin: [N, 1, E].
        slots: int64 [N].
        positions: int64 [N].
        keys: int8 [B, G, S, E] in units of `key_steps`, written at the tokens' positions.
        key_steps: float32 [B, G, S], as well.
        values: int8 [B, G, S, E], as well.
        value_steps: float32 [B, G, S], as well.
        read: float32 [N, H, E], multiples of what is read, written.
        read_steps: float32 [N], written.
    """
    num_tokens, num_projected, head_dim = projected.shape
    num_shared = keys.shape[1]
    num_heads = num_projected - 2 * num_shared
    for item in numba.prange(num_tokens * num_projected):
        token, head = item // num_projected, item % num_projected
        slot, position = slots[token], positions[token]
        x = projected[token, head]
        for e in range(head_dim):
            x[e] *= steps[token]
        if bias is not None:
            for e in range(head_dim):
                x[e] += bias[head, e]
        if head < num_heads:
            if query_gain is not None:
                _norm(x, query_gain, eps, x)
            _rotate(x, cos[token, 0], sin[token, 0], x)
        elif head < num_heads + num_shared:
            if key_gain is not None:
                _norm(x, key_gain, eps, x)
            _rotate(x, cos[token, 0], sin[token, 0], x)
            shared = head - num_heads
            key_steps[slot, shared, position] = _round_head(x, keys[slot, shared, position])
        else:
            shared = head - num_heads - num_shared
            value_steps[slot, shared, position] = _round_head(x, values[slot, shared, position])
    for item in numba.prange(num_tokens * num_heads):
        token, head = item // num_heads, item % num_heads
        slot, shared = slots[token], head * num_shared // num_heads
        _read_head(
            projected[token, head],
            keys[slot, shared],
            key_steps[slot, shared],
            values[slot, shared],
            value_steps[slot, shared],
            positions[token] + 1,
            None,
            read[token, head],
        )
    for token in numba.prange(num_tokens):
        row = read[token].reshape(-1)
        read_steps[token] = _to_multiples(row, row)


@compiled(parallel=True)
def cross_attention(
    queries: Any,
    steps: Any,
    cos: Any,
    sin: Any,
    slots: Any,
    keys: Any,
    key_steps: Any,
    values: Any,
    value_steps: Any,
    refusal: Any,
    read: Any,
    read_steps: Any,
) -> None:
    """Cross-attention of new tokens to the neighbours that a cache holds for their slots.

    Args:
        queries: float32 [N, H, E], in units of `steps`; overwritten.
        steps: float32 [N].
        cos: [N, 1, E], layers.RowRotation.
        sin: [N, 1, E].
        slots: int64 [N].
        keys: int8 [B, H, S, E] in units of `key_steps`.
        key_steps: float32 [B, H, S].
        values: int8 [B, H, S, E] in units of `value_steps`.
        value_steps: float32 [B, H, S].
        refusal: float32 [B or fewer, S or fewer]: of these first rows those that are not negative are read.
        read: float32 [N, H, E], multiples of what is read, written.
        read_steps: float32 [N], written.
    """
    num_tokens, num_heads, head_dim = queries.shape
    for item in numba.prange(num_tokens * num_heads):
        token, head = item // num_heads, item % num_heads
        slot = slots[token]
        x = queries[token, head]
        for e in range(head_dim):
            x[e] *= steps[token]
        _rotate(x, cos[token, 0], sin[token, 0], x)
        row_refusal = refusal[slot]
        _read_head(
            x,
            keys[slot, head],
            key_steps[slot, head],
            values[slot, head],
            value_steps[slot, head],
            len(row_refusal),
            row_refusal,
            read[token, head],
        )
    for token in numba.prange(num_tokens):
        row = read[token].reshape(-1)
        read_steps[token] = _to_multiples(row, row)


@compiled(parallel=True)
def gelu(up: Any, steps: Any, multiples: Any, new_steps: Any) -> None:
    """GELU of rows float32 [N, F] in units of `steps` [N], as multiples [N, F] and new steps [N], both written."""
    for token in numba.prange(len(up)):
        for i in range(up.shape[1]):
            x = up[token, i] * steps[token]
            multiples[token, i] = x * share_below(x)
        new_steps[token] = _to_multiples(multiples[token], multiples[token])


@compiled(parallel=True)
def gated_silu(gate_up: Any, steps: Any, multiples: Any, new_steps: Any) -> None:
    """SiLU of the first half of rows float32 [N, 2 F] times their second half; the rest as `gelu`."""
    width = gate_up.shape[1] // 2
    for token in numba.prange(len(gate_up)):
        for i in range(width):
            gate = gate_up[token, i] * steps[token]
            decay = exp(-abs(gate))
            share = (np.float32(1) if gate > 0 else decay) / (np.float32(1) + decay)
            multiples[token, i] = gate * share * (gate_up[token, width + i] * steps[token])
        new_steps[token] = _to_multiples(multiples[token], multiples[token])
