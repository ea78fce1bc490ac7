"""How loops become machine code (Numba), and what they compute with.

A bfloat16 is a uint16 to them, and computed with in float32. Compiled loops are kept on the disk beside their
file, and made anew when that changes; of a change here nothing tells them, so remove `__pycache__` after it.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from numba.core import config, types
from numba.extending import overload
from numba.np.ufunc.parallel import get_thread_count
from torch import Tensor

logger = logging.getLogger(__name__)


def _has_openmp() -> bool:
    try:
        importlib.import_module("numba.np.ufunc.omppool")
    except ImportError:
        return False
    return True


HAS_OPENMP = _has_openmp()
"""Whether parallel loops run in threads of OpenMP."""
LARGEST_MULTIPLE = 127
SMALLEST_STEP = 1e-12
"""So that a row of zeros has one."""
SMALLEST_TRAINED_STEP = 1e-30
"""The same beside gradients, which are divided by a step's number of targets."""
_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    # Sums may be taken in the order that is fastest; infinities and NaNs stay what they are.
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},
}
part_of_loops = numba.njit(**_OPTIONS)
"""What loops call: compiled once for all of them, and in half the time that its text in each of them takes."""


def compiled(*, parallel: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Loops as machine code, kept on the disk for the next process where there is a place for it.

    Parallel ones share the OpenMP threads of torch, which threads of their own would be in the way of; without OpenMP
    they run in one thread.
    """
    options = {**_OPTIONS, "parallel": parallel and HAS_OPENMP}

    def compile_(loops: Callable[..., None]) -> Callable[..., None]:
        try:
            return numba.njit(cache=True, **options)(loops)
        except RuntimeError:  # neither the package's folder nor the user's cache can be written to
            return numba.njit(**options)(loops)

    return compile_


def wide(x: Any) -> Any:
    """A number as it is computed with. Numba compiles the overload below in its place."""
    raise NotImplementedError


@overload(wide, inline="always")
def _wide_for(x: Any) -> Callable[[Any], Any]:
    def from_bf16(x: Any) -> Any:
        return np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)

    def from_int8(x: Any) -> Any:
        return np.float32(x)

    def same(x: Any) -> Any:
        return x

    return {types.uint16: from_bf16, types.int8: from_int8}.get(x, same)


@numba.njit(inline="always")
def to_bf16(x: Any) -> Any:
    """The nearest bfloat16, of two the even one."""
    bits = np.float32(x).view(np.uint32)
    return np.uint16((np.uint32(bits + np.uint32(0x7FFF)) + np.uint32((bits >> np.uint32(16)) & np.uint32(1))) >> 16)


@numba.njit(inline="always")
def magnitude(x: Any) -> Any:
    """The bits of |x| as a whole number, which is the larger the larger |x| is, and largest for NaN. Unlike that of
    floats the maximum of such is taken of many at once, and NaN is not passed over.
    """
    return np.int32(np.float32(x).view(np.int32) & np.int32(0x7FFFFFFF))


@numba.njit(inline="always")
def step_of(largest: Any, multiple: Any) -> Any:
    """Step of which the number with this `magnitude` is a multiple: not 0, and finite if that is."""
    return np.float32(SMALLEST_TRAINED_STEP) + np.int32(largest).view(np.float32) / np.float32(multiple)


def exp(x: Any) -> Any:
    """Of x <= 0, e^x; as `wide`."""
    raise NotImplementedError


@overload(exp, inline="always")
def _exp_for(x: Any) -> Callable[[Any], Any]:
    def by_library(x: Any) -> Any:
        return math.exp(x)

    def by_series(x: Any) -> Any:
        # 2^t, to 2e-7 of it: unlike a call of the C library, many at once.
        t = max(x, np.float32(-87)) * np.float32(1.4426950408889634)
        whole = np.floor(t + np.float32(0.5))
        f = t - whole
        power = np.float32(1.5403530e-4)
        power = power * f + np.float32(1.3333558e-3)
        power = power * f + np.float32(9.6181291e-3)
        power = power * f + np.float32(5.5504109e-2)
        power = power * f + np.float32(0.24022651)
        power = power * f + np.float32(0.69314718)
        power = power * f + np.float32(1.0)
        return power * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)

    return by_series if x == types.float32 else by_library


@numba.njit(inline="always")
def _share_below(x: Any, decay: Any) -> Any:
    """`decay` is exp(-x^2 / 2). Erf by Abramowitz and Stegun 7.1.26."""
    t = np.float32(1) / (np.float32(1) + np.float32(0.3275911 * 0.7071067811865476) * abs(x))
    p = np.float32(1.061405429)
    p = p * t + np.float32(-1.453152027)
    p = p * t + np.float32(1.421413741)
    p = p * t + np.float32(-0.284496736)
    p = p * t + np.float32(0.254829592)
    tail = np.float32(0.5) * p * t * decay
    return np.float32(1) - tail if x > 0 else tail


@numba.njit(inline="always")
def share_below(x: Any) -> Any:
    """The share of a standard normal distribution below x: GELU of x is x times it."""
    return _share_below(x, exp(np.float32(-0.5) * x * x))


@numba.njit(inline="always")
def slope_of_gelu(x: Any) -> Any:
    """Its derivative."""
    decay = exp(np.float32(-0.5) * x * x)
    return _share_below(x, decay) + x * np.float32(0.3989422804014327) * decay


def as_array(tensor: Tensor) -> np.ndarray:
    """The same memory; bfloat16 as uint16. Loops are compiled anew for elements that do not follow each other."""
    array: np.ndarray = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def as_flat_array(tensor: Tensor) -> tuple[np.ndarray, tuple[int, ...]]:
    """The same memory as one row, from the first element to the last, and the strides of all dimensions but the last,
    whose elements are to follow each other: loops over them become vectors, whatever order the others lie in.
    """
    assert tensor.stride(-1) == 1, "elements of the last dimension follow each other"
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return as_array(tensor.as_strided((length,), (1,))), tensor.stride()[:-1]


def as_array_of_weights(tensor: Tensor) -> np.ndarray:
    """The same of float32 weights, whose memory FSDP resizes between layers, which torch refuses behind `as_array`. It
    takes three times as long.
    """
    array: np.ndarray = np.from_dlpack(tensor.detach())
    return array


def use_threads_of_torch() -> None:
    """Parallel loops that this thread calls take as many threads as torch's operations do."""
    if _have_openmp():
        num_threads = torch.get_num_threads()
        numba.set_num_threads(min(num_threads, get_thread_count()))
        if torch.get_num_threads() != num_threads:  # Numba, when it starts, tells OpenMP to take all processors
            torch.set_num_threads(num_threads)


@cache
def _have_openmp() -> bool:
    """Asked for once, before any loop runs."""
    if HAS_OPENMP:
        config.THREADING_LAYER = "omp"  # pyright: ignore[reportAttributeAccessIssue]
    elif torch.get_num_threads() > 1:
        logger.warning(
            "Numba finds no OpenMP here, so what it compiles runs in one thread: install libgomp1 "
            "(Debian, Ubuntu), libgomp (Fedora, RHEL) or libomp (macOS)"
        )
    return HAS_OPENMP
