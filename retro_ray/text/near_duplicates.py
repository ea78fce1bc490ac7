"""Documents that are nearly the same: whose sets of 13-grams of tokens overlap by 80 % or more (paper, appendix A.1).

MinHash finds those that could be; the exact Jaccard similarity then decides.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from datasketch import MinHash, MinHashLSH

from retro_ray.text.ngrams import ngram_codes

NGRAM_LENGTH = 13
MIN_JACCARD = 0.8

_NUM_PERMUTATIONS = 128
_BANDS = (32, 4)
"""Bands and values of each: of pairs with a similarity of 0.8 they overlook 5 in 100 million."""
_NGRAMS_AT_A_TIME = 1 << 16


class NearDocument(NamedTuple):
    """A document, and how similar another one is to it."""

    name: str
    jaccard: float


def shingles(tokens_T: np.ndarray) -> np.ndarray:
    """The set of a document's 13-grams, as codes: uint64 [n], ascending.

    Args:
        tokens_T: int64, without the document-start token; all of a shorter document is one n-gram.
    """
    return np.unique(ngram_codes(tokens_T, min(NGRAM_LENGTH, max(1, len(tokens_T)))))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Similarity of two sets of `shingles`: shared over all; 0 for two empty ones."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / max(1, len(a) + len(b) - shared)


class NearDocuments:
    """Documents to which others may be near.

    Args:
        documents: name and `shingles` of each; names may be equal.
    """

    def __init__(self, documents: Iterable[tuple[str, np.ndarray]]) -> None:
        self._index = MinHashLSH(num_perm=_NUM_PERMUTATIONS, params=_BANDS)
        self._names: list[str] = []
        self._shingles: list[np.ndarray] = []
        for name, codes in documents:
            if len(codes):
                self._index.insert(len(self._names), _min_hash(codes), check_duplication=False)
                self._names.append(name)
                self._shingles.append(codes)

    def __len__(self) -> int:
        return len(self._names)

    def near(self, codes: np.ndarray) -> list[NearDocument]:
        """Those to which a document with these `shingles` is near, the most similar first."""
        if not len(codes):
            return []
        numbers = sorted(number for number in self._index.query(_min_hash(codes)) if isinstance(number, int))
        found = [NearDocument(self._names[number], jaccard(codes, self._shingles[number])) for number in numbers]
        return sorted((one for one in found if one.jaccard >= MIN_JACCARD), key=lambda one: -one.jaccard)


def _min_hash(codes: np.ndarray) -> MinHash:
    signature = MinHash(num_perm=_NUM_PERMUTATIONS, hashfunc=int)
    for start in range(0, len(codes), _NGRAMS_AT_A_TIME):
        signature.update_batch((codes[start : start + _NGRAMS_AT_A_TIME] >> np.uint64(32)).tolist())
    return signature
