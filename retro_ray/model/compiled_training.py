"""Loops between the products of eight bits of training (int8_training.py) on a CPU, compiled by Numba when they are
first called.

Each is one pass over memory, where torch takes several: rows are rounded, and sums of integers are made numbers again
with all that is computed of one element on the way.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from retro_ray.model.compiled_loops import (
    LARGEST_MULTIPLE,
    SMALLEST_TRAINED_STEP,
    compiled,
    exp,
    magnitude,
    share_below,
    slope_of_gelu,
    step_of,
    to_bf16,
    wide,
)

LARGEST_SLOPE = LARGEST_MULTIPLE - 1
"""To which half a step may be added that another number has lost."""
_REFUSED = -1e30
"""Score of a key that a query may not see."""
_LANES = 16
"""Numbers that are rounded together, each carrying what it loses to the one so far behind it."""
_COLUMNS = 64
"""Positions that a thread passes over together: in the caches lines of 64 bytes are read whole."""
ROWS_AT_ONCE = 64
"""That a thread passes over before others, and for which it writes one row of what is taken from all rows."""


def num_blocks(num_rows: int) -> int:
    """How many times `ROWS_AT_ONCE`."""
    return -(-num_rows // ROWS_AT_ONCE)


@compiled(parallel=True)
def round_rows(x: Any, multiples: Any, steps: Any) -> None:
    """Rows [N, I] as whole multiples, int8 [N, I], of steps float32 [N]; both written."""
    for row in numba.prange(len(x)):
        largest = np.int32(0)
        for i in range(x.shape[1]):
            largest = max(largest, magnitude(wide(x[row, i])))
        step = step_of(largest, LARGEST_MULTIPLE)
        per_step = np.float32(1) / step
        for i in range(x.shape[1]):
            multiples[row, i] = np.int8(np.rint(wide(x[row, i]) * per_step))
        steps[row] = step


@compiled(parallel=True)
def scale_sums(sums: Any, row_steps: Any, column_steps: Any, before: Any, y: Any) -> None:
    """Sums int32 [N, O] of multiples in units of steps.

    Args:
        sums: of products.
        row_steps: float32 [N].
        column_steps: float32 [O], or None.
        before: bfloat16 [N, O], what `y` is GELU of, written; or None, and `y` is that itself.
        y: bfloat16 [N, O], written.
    """
    for row in numba.prange(len(sums)):
        step = row_steps[row]
        for o in range(sums.shape[1]):
            x = np.float32(sums[row, o]) * step
            if column_steps is not None:
                x *= column_steps[o]
            if before is not None:
                before[row, o] = to_bf16(x)
                x *= share_below(x)
            y[row, o] = to_bf16(x)


@compiled(parallel=True)
def scale_rows(sums: Any, row_steps: Any, y: Any) -> None:
    """Sums int32 [N, O] of multiples in units of `row_steps` float32 [N], as float32 [N, O], written."""
    for row in numba.prange(len(sums)):
        for o in range(sums.shape[1]):
            y[row, o] = np.float32(sums[row, o]) * row_steps[row]


@compiled(parallel=True)
def add_sums(sums: Any, row_steps: Any, y: Any) -> None:
    """The same, added to y."""
    for row in numba.prange(len(sums)):
        for o in range(sums.shape[1]):
            y[row, o] += np.float32(sums[row, o]) * row_steps[row]


@compiled(parallel=True)
def round_slopes_by_rows(
    slopes: Any, before: Any, column_steps: Any, row_weights: Any, multiples: Any, steps: Any, kept: Any, largest: Any
) -> None:
    """Slopes times `column_steps`, by rows, as `round_rows`; and what `round_slopes_by_columns` needs.

    Args:
        slopes: bfloat16 [N, O].
        before: bfloat16 [N, O]: slopes are of GELU, and become those of what is before it; or None.
        column_steps: float32 [O].
        row_weights: float32 [N].
        multiples: int8 [N, O], written.
        steps: float32 [N], written.
        kept: bfloat16 [N, O], slopes before GELU, written; None where `before` is.
        largest: int32 [N / ROWS_AT_ONCE, O], written: magnitudes of slopes times `row_weights`, the largest of so many
            rows.
    """
    num_rows, width = slopes.shape
    for block in numba.prange(len(largest)):
        for o in range(width):
            largest[block, o] = 0
        scaled = np.empty(width, np.float32)
        for row in range(block * ROWS_AT_ONCE, min(num_rows, (block + 1) * ROWS_AT_ONCE)):
            # Several short loops: one that reads and writes so much is not compiled to vectors.
            weight, largest_in_row = row_weights[row], np.int32(0)
            if before is not None:
                for o in range(width):
                    scaled[o] = wide(slopes[row, o]) * slope_of_gelu(wide(before[row, o]))
                for o in range(width):
                    kept[row, o] = to_bf16(scaled[o])
            for o in range(width):
                slope = wide(slopes[row, o]) if before is None else scaled[o]
                largest[block, o] = max(largest[block, o], magnitude(slope * weight))
                scaled[o] = slope * column_steps[o]
                largest_in_row = max(largest_in_row, magnitude(scaled[o]))
            step = step_of(largest_in_row, LARGEST_SLOPE)
            per_step = np.float32(1) / step
            for o in range(width):
                multiples[row, o] = np.int8(np.rint(scaled[o] * per_step))
            steps[row] = step


@compiled(parallel=True)
def round_slopes_by_columns(slopes: Any, row_weights: Any, per_step: Any, multiples: Any) -> None:
    """Slopes times `row_weights`, rounded to multiples of steps that are the columns' own.

    What rounding takes from one row is given to the next: tokens of small slopes would else be lost, though many of
    them may point the same way.

    Args:
        slopes: bfloat16 [N, O].
        row_weights: float32 [N].
        per_step: float32 [O], one over the steps.
        multiples: int8 [N, O], written.
    """
    num_rows, width = slopes.shape
    for block in numba.prange((num_rows + ROWS_AT_ONCE - 1) // ROWS_AT_ONCE):
        carried = np.zeros(width, np.float32)
        for row in range(block * ROWS_AT_ONCE, min(num_rows, (block + 1) * ROWS_AT_ONCE)):
            weight = row_weights[row]
            for o in range(width):
                exact = wide(slopes[row, o]) * (weight * per_step[o]) + carried[o]
                multiple = np.rint(exact)
                carried[o] = exact - multiple
                multiples[row, o] = np.int8(multiple)


@compiled(parallel=True)
def nats_and_slopes(
    sums: Any,
    shares: Any,
    weight_steps: Any,
    h_steps: Any,
    targets: Any,
    real: Any,
    nats: Any,
    slopes: Any,
    multiples: Any,
    steps: Any,
    first: Any,
) -> None:
    """Nats of targets and their slopes, softmax - one-hot, from logits of V tokens at N positions. All are zero for a
    target that is not real.

    Args:
        sums: int32 [V, N], logits in units of both steps; overwritten.
        shares: float32, the same memory.
        weight_steps: float32 [V].
        h_steps: float32 [N].
        targets: int64 [N].
        real: bool [N].
        nats: float32 [N], written.
        slopes: bfloat16 [V, more than N], written from column `first` on.
        multiples: int8, of the same shape, written there: the softmax times `weight_steps`, in units of `steps`. What
            rounding takes from a token is given to the next: most tokens have less than half a step each, and together
            a part of the softmax that pulls one way.
        steps: float32 [N], written.
        first: of the slopes' columns.
    """
    vocab_size, num_positions = sums.shape
    for block in numba.prange((num_positions + _COLUMNS - 1) // _COLUMNS):
        start = block * _COLUMNS
        width = min(num_positions - start, _COLUMNS)
        highest, total = np.full(width, np.float32(-1e30)), np.zeros(width, np.float32)
        largest, logits = np.zeros(width, np.float32), np.empty(width, np.float32)
        from_h = h_steps[start : start + width].copy()
        for token in range(vocab_size):
            row, weight_step = sums[token, start : start + width], weight_steps[token]
            for n in range(width):
                highest[n] = max(highest[n], np.float32(row[n]) * (weight_step * from_h[n]))
        for n in range(width):
            target = targets[start + n]
            nats[start + n] = highest[n] - np.float32(sums[target, start + n]) * (weight_steps[target] * from_h[n])
        for token in range(vocab_size):
            row, share = sums[token, start : start + width], shares[token, start : start + width]
            weight_step = weight_steps[token]
            for n in range(width):
                logits[n] = exp(np.float32(row[n]) * (weight_step * from_h[n]) - highest[n])
            for n in range(width):
                total[n] += logits[n]
                largest[n] = max(largest[n], logits[n] * weight_step)
                share[n] = logits[n]
        for n in range(width):
            is_real = real[start + n]
            nats[start + n] = nats[start + n] + np.log(total[n]) if is_real else np.float32(0)
            total[n] = np.float32(1) / total[n] if is_real else np.float32(0)
            step = np.float32(SMALLEST_TRAINED_STEP) + largest[n] * total[n] / np.float32(LARGEST_SLOPE)
            steps[start + n] = step
            largest[n] = total[n] / step
            highest[n] = 0  # from here on what is carried
        for token in range(vocab_size):
            share, weight_step = shares[token, start : start + width], weight_steps[token]
            slope = slopes[token, first + start : first + start + width]
            multiple = multiples[token, first + start : first + start + width]
            for n in range(width):
                slope[n] = to_bf16(share[n] * total[n])
            for n in range(width):
                exact = share[n] * (weight_step * largest[n]) + highest[n]
                rounded = np.rint(exact)
                highest[n] = exact - rounded
                multiple[n] = np.int8(rounded)
        for n in range(width):
            if real[start + n]:
                target = targets[start + n]
                slopes[target, first + start + n] = to_bf16(shares[target, start + n] * total[n] - np.float32(1))


@compiled(parallel=True)
def rms_norm(x: Any, gain: Any, eps: Any, scales: Any, y: Any) -> None:
    """RMSNorm of rows.

    Args:
        x: float32 [N, D].
        gain: float32 [D].
        eps: added to the mean of squares.
        scales: float32 [N], one over each row's root mean square, written.
        y: bfloat16 [N, D], written.
    """
    num_rows, width = x.shape
    for row in numba.prange(num_rows):
        total = np.float32(0)
        for i in range(width):
            total += x[row, i] * x[row, i]
        scale = np.float32(1) / np.sqrt(total / np.float32(width) + np.float32(eps))
        for i in range(width):
            y[row, i] = to_bf16(x[row, i] * scale * gain[i])
        scales[row] = scale


@compiled(parallel=True)
def slopes_of_rms_norm(x: Any, gain: Any, scales: Any, slopes: Any, of_x: Any, of_gain: Any) -> None:
    """Gradients of `rms_norm`.

    Args:
        x: float32 [N, D].
        gain: float32 [D].
        scales: float32 [N].
        slopes: bfloat16 [N, D], of the result.
        of_x: float32 [N, D], written.
        of_gain: float32 [N / ROWS_AT_ONCE, D], of so many rows each, written.
    """
    num_rows, width = x.shape
    for block in numba.prange(len(of_gain)):
        for i in range(width):
            of_gain[block, i] = 0
        for row in range(block * ROWS_AT_ONCE, min(num_rows, (block + 1) * ROWS_AT_ONCE)):
            scale, total = scales[row], np.float32(0)
            for i in range(width):
                product = wide(slopes[row, i]) * x[row, i]
                of_gain[block, i] += product * scale
                total += product * gain[i]
            # x changes its own value, and the scale through the mean of the squares.
            share = total * scale * scale * scale / np.float32(width)
            for i in range(width):
                of_x[row, i] = wide(slopes[row, i]) * gain[i] * scale - x[row, i] * share


@compiled(parallel=True)
def rotate(shape: Any, x: Any, x_strides: Any, cos: Any, sin: Any, rotated: Any, rotated_strides: Any) -> None:
    """Heads bfloat16 [B, H, T, E] of queries or keys, rotated as layers.rotate says.

    Args:
        shape: B, H, T and E.
        x: bfloat16, `as_flat_array` of them.
        x_strides: how far apart those of B, H and T are in it; the E of a head follow each other.
        cos: float32 [T, E / 2].
        sin: float32 [T, E / 2].
        rotated: as `x`, written.
        rotated_strides: as `x_strides`.
    """
    batch_size, num_heads, num_tokens, head_dim = shape
    half = head_dim // 2
    for item in numba.prange(batch_size * num_tokens):
        sequence, token = item // num_tokens, item % num_tokens
        old, cosines, sines = np.empty(head_dim, np.float32), cos[token], sin[token]
        for head in range(num_heads):
            first = sequence * x_strides[0] + head * x_strides[1] + token * x_strides[2]
            first_new = sequence * rotated_strides[0] + head * rotated_strides[1] + token * rotated_strides[2]
            row, new = x[first : first + head_dim], rotated[first_new : first_new + head_dim]
            for e in range(head_dim):
                old[e] = wide(row[e])
            for e in range(half):
                new[e] = to_bf16(old[e] * cosines[e] - old[e + half] * sines[e])
            for e in range(half):
                new[e + half] = to_bf16(old[e + half] * cosines[e] + old[e] * sines[e])


@compiled(parallel=True)
def softmax_of_allowed(scores: Any, allowed: Any, first: Any) -> None:
    """Scores of consecutive queries become weights.

    Args:
        scores: bfloat16 [B, H, T, S], overwritten.
        allowed: bool [B or 1, 1, T, S], the keys that a query sees; or None, those up to its own.
        first: position of the first query.
    """
    batch_size, num_heads, num_queries, num_keys = scores.shape
    for item in numba.prange(batch_size * num_heads * num_queries):
        query = item % num_queries
        head, sequence = item // num_queries % num_heads, item // (num_queries * num_heads)
        row = scores[sequence, head, query]
        weights = np.empty(num_keys, np.float32)
        for s in range(num_keys):
            weights[s] = wide(row[s])
        if allowed is None:
            for s in range(first + query + 1, num_keys):
                weights[s] = np.float32(_REFUSED)
        else:
            sees = allowed[sequence if len(allowed) > 1 else 0, 0, query]
            for s in range(num_keys):
                weights[s] = weights[s] if sees[s] else np.float32(_REFUSED)
        largest, total = np.float32(_REFUSED), np.float32(0)
        for s in range(num_keys):
            largest = max(largest, weights[s])
        for s in range(num_keys):
            # The series ends above 0, which what may not be seen must not.
            weight = exp(weights[s] - largest) if weights[s] != np.float32(_REFUSED) else np.float32(0)
            weights[s] = weight
            total += weight
        per_total = np.float32(1) / total
        for s in range(num_keys):
            row[s] = to_bf16(weights[s] * per_total)


@compiled(parallel=True)
def round_shares(slopes: Any, targets: Any, position_weights: Any, multiples: Any, steps: Any) -> None:
    """A softmax from its slopes, times `position_weights`, as whole multiples of steps that are the tokens' own. What
    rounding takes from a position is given to a later one.

    Args:
        slopes: bfloat16 [V, at least N], softmax - one-hot.
        targets: int32 [N], negative where nothing was taken from the softmax.
        position_weights: float32 [N].
        multiples: int8 [V, N], written.
        steps: float32 [V], written.
    """
    vocab_size, num_positions = multiples.shape
    for token in numba.prange(vocab_size):
        shares, largest = np.empty(num_positions, np.float32), np.int32(0)
        for n in range(num_positions):
            share = wide(slopes[token, n]) + (np.float32(1) if targets[n] == token else np.float32(0))
            shares[n] = share * position_weights[n]
        for n in range(num_positions):
            largest = max(largest, magnitude(shares[n]))
        step = step_of(largest, LARGEST_SLOPE)
        per_step = np.float32(1) / step
        carried = np.zeros(_LANES, np.float32)
        for start in range(0, num_positions, _LANES):
            for lane in range(min(_LANES, num_positions - start)):
                exact = shares[start + lane] * per_step + carried[lane]
                multiple = np.rint(exact)
                carried[lane] = exact - multiple
                multiples[token, start + lane] = np.int8(multiple)
        steps[token] = step
