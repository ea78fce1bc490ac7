"""New tokens of many sequences in one pass: where they belong in a cache, and what they read there.

On a GPU consecutive slots of about equal length are read as one batch, and what is behind a slot's end is masked;
on a CPU every token is read alone (row_attention.py).

Shapes: N new tokens of all sequences, one slot's after another's. In a group of slots: B slots, at
most T new tokens of each, S rows of the cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retro_ray.config import ModelConfig
from retro_ray.model.attention_kernels import attend
from retro_ray.model.cached_rows import rows_to_read
from retro_ray.model.causal_attention import refusal
from retro_ray.model.layers import RowRotation, decoder_rotary, rotary_at, row_rotation

_MAX_WASTED_ROWS = 32_768
"""Slots of unequal length are read together if not more rows than these are read in vain: about the
time that one more group takes, by reckoning."""


@dataclass(frozen=True)
class GroupShape:
    """What is read of consecutive slots, but for their numbers."""

    slots: range
    rows: range
    """Of the N new tokens."""
    width: int
    """T."""
    num_read: int
    """S."""

    @property
    def is_full(self) -> bool:
        """Whether the group's tokens fill all B * T places."""
        return len(self.rows) == len(self.slots) * self.width


@dataclass(frozen=True)
class PassShape:
    """A pass, but for its numbers: passes of one shape compute the same with other ones."""

    num_slots: int
    num_tokens: int
    """N."""
    num_first: int
    """Slots that have new tokens."""
    groups: tuple[GroupShape, ...]
    """Empty: every token is read alone."""

    def place(self, config: ModelConfig, numbers_X: Tensor, dtype: torch.dtype) -> NewTokens:
        """A pass over the tokens that `plan_pass` gave these numbers, int64, for; without waiting for a GPU."""
        sizes = [self.num_tokens] * 3 + [self.num_first]
        for group in self.groups:
            sizes += [0 if group.is_full else len(group.rows), len(group.slots) * group.width]
        tokens_N, slots_N, positions_N, first_rows, *of_groups = numbers_X.split(sizes)
        m, places = config.chunk_length, iter(of_groups)
        places_N1 = (m + (positions_N + 1) % m)[:, None]
        return NewTokens(
            tokens_N=tokens_N,
            slots_N=slots_N,
            positions_N=positions_N,
            first_rows=first_rows,
            groups=tuple(_slot_group(group, next(places), next(places), dtype) for group in self.groups),
            rotation=row_rotation(decoder_rotary(config, positions_N[:, None], dtype), dtype),
            neighbour_rotation=row_rotation(rotary_at(places_N1, config.head_dim, config.rope_base, dtype), dtype),
        )


@dataclass(frozen=True)
class SlotGroup:
    """Consecutive slots whose attention is computed as one batch."""

    slots: slice
    rows: slice
    """Of the N new tokens."""
    width: int
    """T."""
    places_N: Tensor | None
    """Of each token among the B * T; None: they fill all places."""
    refusal_BTS: Tensor
    """Added to scores: 0 for positions of its slot that a token may look at, the least number for others."""

    def read(self, q_NHE: Tensor, keys: Tensor, values: Tensor, refusal_BTS: Tensor) -> Tensor:
        """What the group's queries read in the first S rows of its slots of a cache: [N, H * E]."""
        num_slots, num_rows = self.slots.stop - self.slots.start, refusal_BTS.shape[-1]
        q_NHE = q_NHE[self.rows].to(keys.dtype)
        if self.places_N is not None:
            places = q_NHE.new_zeros(num_slots * self.width, *q_NHE.shape[1:])
            q_NHE = places.index_copy_(0, self.places_N, q_NHE)
        q_BHTE = q_NHE.unflatten(0, (num_slots, self.width)).transpose(1, 2)
        k_BGSE, v_BGSE = keys[self.slots, :, :num_rows], values[self.slots, :, :num_rows]
        read_BHTE = attend(q_BHTE, k_BGSE, v_BGSE, refusal_BTS[:, None])
        read_NX = read_BHTE.transpose(1, 2).flatten(2).flatten(0, 1)
        return read_NX if self.places_N is None else read_NX[self.places_N]


@dataclass(frozen=True)
class NewTokens:
    """The new tokens of one pass."""

    tokens_N: Tensor
    slots_N: Tensor
    positions_N: Tensor
    first_rows: Tensor
    """Which of the N tokens are their slot's first."""
    groups: tuple[SlotGroup, ...]
    rotation: RowRotation
    """To the tokens' positions."""
    neighbour_rotation: RowRotation
    """To their positions for chunked cross-attention."""

    def read_past(self, q_NHE: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Self-attention over a cache's keys and values [*, G, *, E], those of the new tokens among
        them: [N, H * E].
        """
        if not self.groups:
            return self._read_alone(q_NHE, keys, values, None)
        return _joined([group.read(q_NHE, keys, values, group.refusal_BTS) for group in self.groups])

    def read_neighbours(self, q_NHE: Tensor, keys: Tensor, values: Tensor, refusal_BS: Tensor) -> Tensor:
        """What the queries read in those rows of their slots [*, H, S, E] that are not refused: [N, H * E]."""
        if not self.groups:
            return self._read_alone(q_NHE, keys, values, refusal_BS)
        return _joined([group.read(q_NHE, keys, values, refusal_BS[group.slots, None]) for group in self.groups])

    def _read_alone(self, q_NHE: Tensor, keys: Tensor, values: Tensor, refusal_BS: Tensor | None) -> Tensor:
        from retro_ray.model.row_attention import read_rows  # Numba, which only CPUs need, takes half a second

        return read_rows(q_NHE, keys, values, self.slots_N, self.positions_N, refusal_BS)


def plan_pass(
    tokens: Sequence[int], lengths: Sequence[int], num_new: Sequence[int], held_rows: int | None
) -> tuple[PassShape, list[int]]:
    """Places for new tokens, one in all at least, in a cache.

    Args:
        tokens: of the first slot, then of the second, and so on.
        lengths: that its slots have.
        num_new: how many of the tokens are each slot's.
        held_rows: that it has for each slot; None: every token is to be read alone.

    Returns:
        The shape of the pass, and its numbers.
    """
    slots = [slot for slot, count in enumerate(num_new) for _ in range(count)]
    positions = [length + t for length, count in zip(lengths, num_new, strict=True) for t in range(count)]
    first_rows = [sum(num_new[:slot]) for slot, count in enumerate(num_new) if count]
    numbers, groups, first_row = [*tokens, *slots, *positions, *first_rows], [], 0
    shape = PassShape(len(num_new), len(slots), len(first_rows), ())
    if held_rows is None:
        return shape, numbers
    for members in _grouped_slots(lengths, num_new):
        counts = [num_new[slot] for slot in members]
        rows, width = range(first_row, first_row + sum(counts)), max(counts)
        longest = max(lengths[slot] + num_new[slot] for slot in members)
        group = GroupShape(members, rows, width, rows_to_read(longest, held_rows))
        if not group.is_full:
            numbers += [b * width + t for b, count in enumerate(counts) for t in range(count)]
        numbers += [lengths[slot] + t for slot in members for t in range(width)]
        groups.append(group)
        first_row = rows.stop
    return dataclasses.replace(shape, groups=tuple(groups)), numbers


def _grouped_slots(lengths: Sequence[int], num_new: Sequence[int]) -> list[range]:
    """Consecutive slots that have new tokens, in groups of about equal length."""
    groups: list[range] = []
    longest = total = 0
    for slot, count in enumerate(num_new):
        if count == 0:
            continue
        end = lengths[slot] + count
        wasted = max(longest, end) * (len(groups[-1]) + 1) - total - end if groups else 0
        if groups and groups[-1].stop == slot and wasted <= _MAX_WASTED_ROWS:
            groups[-1] = range(groups[-1].start, slot + 1)
            longest, total = max(longest, end), total + end
        else:
            groups.append(range(slot, slot + 1))
            longest = total = end
    return groups


def _slot_group(shape: GroupShape, places_N: Tensor, positions_X: Tensor, dtype: torch.dtype) -> SlotGroup:
    positions_BT1 = positions_X.view(len(shape.slots), shape.width, 1)
    return SlotGroup(
        slots=slice(shape.slots.start, shape.slots.stop),
        rows=slice(shape.rows.start, shape.rows.stop),
        width=shape.width,
        places_N=None if shape.is_full else places_N,
        refusal_BTS=refusal(torch.arange(shape.num_read, device=positions_X.device) > positions_BT1, dtype),
    )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))
