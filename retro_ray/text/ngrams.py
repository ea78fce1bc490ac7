"""Runs of n tokens as numbers that can be sorted and compared at once."""

from __future__ import annotations

import numpy as np

_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, of no structure: a multiplicative hash


def ngram_codes(tokens: np.ndarray, n: int) -> np.ndarray:
    """uint64 [..., T - n + 1] for int64 [..., T]: equal for equal n-grams, and but for 2**-64 only for these.

    An n-gram with a negative token (no token there) has code 0.
    """
    num_ngrams = tokens.shape[-1] - n + 1
    if num_ngrams <= 0:
        return np.empty((*tokens.shape[:-1], 0), np.uint64)
    codes = np.zeros((*tokens.shape[:-1], num_ngrams), np.uint64)
    real = np.ones(codes.shape, bool)
    for offset in range(n):
        part = tokens[..., offset : offset + num_ngrams]
        real &= part >= 0
        mixed = (codes ^ part.astype(np.uint64)) * _FACTOR
        codes = mixed ^ (mixed >> np.uint64(29))
    return np.where(real, np.maximum(codes, np.uint64(1)), np.uint64(0))
