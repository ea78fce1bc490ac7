"""How much of the evaluated text stands in the database already, and what is left without it (paper, section 2.6).

For a chunk C, r(C) is the longest run of tokens that C shares with one of its nearest neighbours
[N, F], over the length of C: 0 for new text, 1 for a copy. Bits per byte over the chunks with
r(C) <= alpha tells what a model gains where it cannot copy more than that.

Shape letters: n chunks, M chunk length, K neighbours, R neighbour length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from retro_ray.database.store import ChunkStore, Database
from retro_ray.evaluation.scores import BitsPerByte, ChunkScores
from retro_ray.training.windows import NeighbourSource

NUM_NEIGHBOURS = 10
"""Neighbours that a chunk is compared with (paper, section 2.6)."""
ALPHAS = (0.0625, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
"""Where the curves are drawn; 0.125 is under 8 tokens in a row."""


_CHUNKS_PER_BLOCK = 1024


def longest_shared_runs(tokens_nM: np.ndarray, neighbours_nKR: np.ndarray) -> np.ndarray:
    """Length of the longest run of tokens that each chunk shares with any of its neighbours, int64 [n].

    Args:
        tokens_nM: int64; negative where a place has no token that could be shared (padding, the
            document-start token).
        neighbours_nKR: int64; negative where a place has no token.
    """
    longest_n = np.zeros(len(tokens_nM), np.int64)
    # run[n, k, j]: length of the shared run that ends at the chunk's current token and at neighbour token j.
    run_nKR = np.zeros(neighbours_nKR.shape, np.int16)
    for token_n in tokens_nM.T:
        run_nKR[..., 1:] = run_nKR[..., :-1] + 1
        run_nKR[..., :1] = 1
        shared_nKR = (neighbours_nKR == token_n[:, None, None]) & (token_n >= 0)[:, None, None]
        run_nKR *= shared_nKR
        longest_n = np.maximum(longest_n, run_nKR.max(axis=(1, 2), initial=0))
    return longest_n


def overlap_ratios(tokens_nM: np.ndarray, neighbours_nKR: np.ndarray) -> np.ndarray:
    """r(C) of each chunk, float64 [n]: see `longest_shared_runs`. A chunk without tokens has 0."""
    num_tokens_n = (tokens_nM >= 0).sum(1)
    return longest_shared_runs(tokens_nM, neighbours_nKR) / np.maximum(num_tokens_n, 1)


def overlaps_with_neighbours(
    store: ChunkStore, database: Database, rows: np.ndarray, neighbours: NeighbourSource
) -> np.ndarray:
    """r(C) of chunks of a text, float64 [n].

    Args:
        store: of the text.
        database: that the neighbours are of.
        rows: int64 [n], of the chunks.
        neighbours: those that they are compared with.
    """
    start_id = database.tokenizer.bos_id
    ratios = [np.empty(0)]
    for first in range(0, len(rows), _CHUNKS_PER_BLOCK):
        block = rows[first : first + _CHUNKS_PER_BLOCK]
        tokens = store.tokens(block)
        real = (np.arange(store.chunk_length) < store.lengths(block)[:, None]) & (tokens != start_id)
        offered, mask = database.neighbour_tokens(neighbours(block))
        ratios.append(overlap_ratios(np.where(real, tokens, -1), np.where(mask, offered, -1)))
    return np.concatenate(ratios)


@dataclass(frozen=True)
class FilteredScore:
    """Bits per byte of the chunks that share at most so much with the database."""

    alpha: float
    num_chunks: int
    scores: dict[str, BitsPerByte]
    """By model or retrieval mode; all over the same chunks."""


def score_by_overlap(
    ratios: np.ndarray, scores: Mapping[str, ChunkScores], alphas: Sequence[float] = ALPHAS
) -> list[FilteredScore]:
    """bpb(alpha) of several models over the same chunks; bpb(1) is the full score.

    Args:
        ratios: float64 [n], r(C) of every chunk.
        scores: of the same n chunks in the same order, by model or retrieval mode.
        alphas: upper bounds of r(C), bound included.
    """
    curve = []
    for alpha in alphas:
        chosen = ratios <= alpha
        sums = {
            name: BitsPerByte(
                math.fsum(score.nats[chosen]), int(score.num_tokens[chosen].sum()), int(score.num_bytes[chosen].sum())
            )
            for name, score in scores.items()
        }
        curve.append(FilteredScore(alpha, int(chosen.sum()), sums))
    return curve
