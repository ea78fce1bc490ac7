"""Keys, or values, that a cache holds for its slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from retro_ray.model.int8_product import row_steps

ROW_BLOCK = 64
"""Keys and values have room for multiples of so many rows. A softmax over further blocks, masked, adds up
in the same order as without them: to the bit, a sequence gets the same logits whatever is in the
slots beside it."""


def whole_blocks(num_rows: int) -> int:
    """`num_rows`, or the next number of them that fills blocks."""
    return -(-num_rows // ROW_BLOCK) * ROW_BLOCK


def rows_to_read(num_rows: int, held_rows: int) -> int:
    """How many of the held rows to read for the first `num_rows`: all, unless they are far more. So passes differ less
    in shape, and a part of the rows, which products copy first, is seldom read.
    """
    return held_rows if num_rows <= held_rows <= 3 * num_rows else whole_blocks(num_rows)


@dataclass(frozen=True)
class CachedRows:
    """Rows [B, G, S, E] of B slots and G heads: as they are, or in eight bits.

    In eight bits they take half the memory that they take in bf16, and half the time to be read. Every row has a step
    of its own, so that it is rounded to the same whatever is beside it.
    """

    of: Tensor
    """[B, G, S, E]; int8: in units of `steps`."""
    steps: Tensor | None = None
    """float32 [B, G, S]; None: the rows are as they are."""

    @classmethod
    def zeros(cls, *shape: int, device: torch.device, dtype: torch.dtype) -> CachedRows:
        """Rows of zeros; those of `dtype` int8 are in eight bits."""
        of = torch.zeros(*shape, device=device, dtype=dtype)
        return cls(of, torch.zeros(*shape[:-1], device=device) if dtype == torch.int8 else None)

    @property
    def shape(self) -> torch.Size:
        return self.of.shape

    def resized(self, num_slots: int, num_rows: int) -> CachedRows:
        """The same for so many slots of so many rows each: zeros where there was no place before."""
        _, num_heads, _, head_dim = self.of.shape
        steps = None if self.steps is None else resized(self.steps, num_slots, num_heads, num_rows)
        return CachedRows(resized(self.of, num_slots, num_heads, num_rows, head_dim), steps)

    def write(self, slots: Tensor, rows: Tensor) -> None:
        """Put rows [len(slots), G, T, E] in place of the first T of some slots."""
        num_rows = rows.shape[2]
        if self.steps is None:
            self.of[slots, :, :num_rows] = rows.to(self.of.dtype)
            return
        rows = rows.float()
        steps = row_steps(rows)
        self.of[slots, :, :num_rows] = torch.round(rows / steps[..., None]).to(torch.int8)
        self.steps[slots, :, :num_rows] = steps

    def move(self, source: int, target: int, num_rows: int) -> None:
        """Copy the first rows of slot `source` over those of slot `target`."""
        self.of[target, :, :num_rows] = self.of[source, :, :num_rows]
        if self.steps is not None:
            self.steps[target, :, :num_rows] = self.steps[source, :, :num_rows]

    def clear(self, slots: int | Tensor) -> None:
        """Make zeros of all rows of some slots."""
        self.of[slots] = 0


def resized(old: Tensor, *shape: int) -> Tensor:
    """Zeros of `shape`, with what of `old` has a place in it."""
    if old.shape == shape:
        return old
    new = old.new_zeros(shape)
    common = tuple(slice(min(pair)) for pair in zip(old.shape, shape, strict=True))
    new[common] = old[common]
    return new
