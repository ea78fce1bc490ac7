"""Loops over the few rows of new tokens on a CPU, compiled by Numba when they are first called.

A step of decoding is short work on much memory. Keys and values are read here at the speed of memory,
where a product of one row takes two to three times as long; and what torch does in five operations
of a few microseconds each takes one. Every row is computed alone and in one order: it gives the same
to the bit whatever rows are beside it. Numba's loops share the OpenMP threads of torch, and would be in
their way with threads of their own; where there is no OpenMP for them, they run in one thread.

Types: bfloat16 is uint16 here, and computed with in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from numba.core import types
from numba.extending import overload
from torch import Tensor

try:
    from numba.np.ufunc import omppool

    _HAS_OPENMP = omppool is not None
except ImportError:
    _HAS_OPENMP = False

_LEAST = -1e30
"""Below every score."""


def read_rows(
    q_NHE: Tensor, keys: Tensor, values: Tensor, slots_N: Tensor, positions_N: Tensor, refusal_BS: Tensor | None = None
) -> Tensor:
    """Attention of new tokens over what a cache holds for their slots: [N, H * E], of the queries' type.

    Args:
        q_NHE: queries, rotated.
        keys: [B, G, S, E]; each of the G heads is for H / G consecutive heads of queries.
        values: [B, G, S, E].
        slots_N: int64, of the tokens.
        positions_N: int64; a token reads the rows up to its own.
        refusal_BS: in place of that: a token reads those of its slot's first rows for which this is 0.
    """
    precise = torch.promote_types(q_NHE.dtype, torch.float32)
    read_NHE = torch.empty(q_NHE.shape, dtype=precise)
    refusal = None if refusal_BS is None else _array(refusal_BS.to(precise))
    arrays = (_array(tensor) for tensor in (q_NHE.to(precise), keys, values, slots_N, positions_N))
    _use_threads_of_torch()
    _attend(*arrays, refusal, _array(read_NHE))
    return read_NHE.flatten(1).to(q_NHE.dtype)


def _array(tensor: Tensor) -> np.ndarray:
    """The same memory, if its rows follow each other."""
    tensor = tensor.contiguous()
    array: np.ndarray = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def _use_threads_of_torch() -> None:
    """As many of them as the calling thread has."""
    if _HAS_OPENMP:
        _choose_openmp()
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


@cache
def _choose_openmp() -> None:
    numba.config.THREADING_LAYER = "omp"


def _compiled(loops: Callable[..., None]) -> Callable[..., None]:
    """`loops` as machine code, kept on the disk for the next process where there is a place for it."""
    # Sums may be taken in the order that is fastest; infinities and NaNs stay what they are.
    options: dict[str, Any] = {"parallel": _HAS_OPENMP, "nogil": True, "error_model": "numpy"}
    options["fastmath"] = {"reassoc", "contract", "nsz", "arcp"}
    try:
        return numba.njit(cache=True, **options)(loops)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written to
        return numba.njit(**options)(loops)


def _wide(x: Any) -> Any:
    """A number as it is computed with."""
    raise NotImplementedError


@overload(_wide, inline="always")
def _wide_for(x: Any) -> Callable[[Any], Any]:
    def from_bf16(x: Any) -> Any:
        return np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)

    def same(x: Any) -> Any:
        return x

    return from_bf16 if x == types.uint16 else same


def _exp(x: Any) -> Any:
    """e^x for x <= 0."""
    raise NotImplementedError


@overload(_exp, inline="always")
def _exp_for(x: Any) -> Callable[[Any], Any]:
    def by_library(x: Any) -> Any:
        return math.exp(x)

    return _exp32 if x == types.float32 else by_library


def _exp32(x: Any) -> Any:
    # 2^t, the fraction by its series, to 2e-7 of it: unlike a call of the C library, many at once.
    t = max(x, np.float32(-87)) * np.float32(1.4426950408889634)
    whole = np.floor(t + np.float32(0.5))
    f = t - whole
    power = np.float32(1.5403530e-4)
    for factor in (1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 0.24022651, 0.69314718, 1.0):
        power = power * f + np.float32(factor)
    return power * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@_compiled
def _attend(q: Any, keys: Any, values: Any, slots: Any, positions: Any, refusal: Any, out: Any) -> None:
    """softmax(q k^T / sqrt(E)) v for one token after the other.

    Args:
        q: [N, H, E].
        keys: [B, G, S, E], each of the G heads for H / G consecutive heads of queries.
        values: [B, G, S, E].
        slots: int64 [N], of the tokens among the B.
        positions: int64 [N]: each token reads the rows up to its own.
        refusal: [B or fewer, S or fewer], in place of that: it reads those of these rows that are not negative.
        out: [N, H, E], written.
    """
    num_tokens, num_heads, head_dim = q.shape
    scale = q.dtype.type(1 / math.sqrt(head_dim))
    for item in numba.prange(num_tokens * num_heads):
        token, head = item // num_heads, item % num_heads
        slot, shared = slots[token], head * keys.shape[1] // num_heads
        query, read = q[token, head], out[token, head]
        key, value = keys[slot, shared], values[slot, shared]
        num_rows = positions[token] + 1 if refusal is None else refusal.shape[1]
        weights = np.empty(num_rows, q.dtype)
        largest = q.dtype.type(_LEAST)
        for row in range(num_rows):
            score = q.dtype.type(0)
            for e in range(head_dim):
                score += query[e] * _wide(key[row, e])
            score *= scale
            if refusal is not None and refusal[slot, row] < 0:
                score = q.dtype.type(2 * _LEAST)
            weights[row] = score
            largest = max(largest, score)
        total = q.dtype.type(0)
        for row in range(num_rows):
            weight = _exp(weights[row] - largest)
            if weights[row] < _LEAST:
                weight = q.dtype.type(0)
            weights[row] = weight
            total += weight
        for e in range(head_dim):
            read[e] = 0
        for row in range(num_rows):
            weight = weights[row] / total
            for e in range(head_dim):
                read[e] += weight * _wide(value[row, e])
