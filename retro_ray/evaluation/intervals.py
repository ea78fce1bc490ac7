"""How far a figure could be off because other documents might have been scored: bootstrap over documents."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.stats import bootstrap

_NUM_RESAMPLES = 2000
_RESAMPLES_AT_A_TIME = 100


class Interval(NamedTuple):
    """Where a figure lies with a probability of 95 %; NaN where there are too few documents to tell."""

    low: float
    high: float


def interval_of_ratio(numerators: np.ndarray, denominators: np.ndarray, *, seed: int = 0) -> Interval:
    """Of sum(numerators) / sum(denominators), when whole documents are drawn anew.

    Args:
        numerators: float64 [d], of each document.
        denominators: [d], of the same documents.
        seed: of the draws.
    """
    if len(numerators) < 2:
        return Interval(math.nan, math.nan)

    def ratio(above: np.ndarray, below: np.ndarray, axis: int = -1) -> np.ndarray:
        return above.sum(axis) / below.sum(axis)

    found = bootstrap(
        (np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)),
        ratio,
        n_resamples=_NUM_RESAMPLES,
        batch=_RESAMPLES_AT_A_TIME,
        vectorized=True,
        paired=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(found.low), float(found.high))
