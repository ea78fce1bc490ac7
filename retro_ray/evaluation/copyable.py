"""How much of a text could be copied from the database and from nowhere else: will retrieval help?

A token is *newly copyable* if the n-gram that ends with it stands in a neighbour of the chunk
before it, and not in the text's own context, where the model finds it without a database. The share
of such tokens ranks corpora by what retrieval gains on them, before anything is trained.

Shape letters: T tokens of one document, L chunks, M chunk length, K neighbours, R neighbour length.
"""

from __future__ import annotations

import numpy as np

from retro_ray.text.ngrams import ngram_codes

NGRAM_LENGTH = 5
CONTEXT_LENGTH = 448
"""Tokens of its own text that a small model looks back on."""


def newly_copyable(
    tokens_T: np.ndarray,
    neighbours_LKR: np.ndarray,
    chunk_length: int,
    context_length: int = CONTEXT_LENGTH,
    n: int = NGRAM_LENGTH,
) -> np.ndarray:
    """Which tokens of a document are newly copyable, bool [T].

    Args:
        tokens_T: int64, one whole document.
        neighbours_LKR: int64, the neighbours of its chunks; negative where there is no token.
        chunk_length: M; those of chunk u serve the tokens of chunk u + 1.
        context_length: tokens before a token in which its n-gram must not stand.
        n: tokens of an n-gram.
    """
    num_tokens = len(tokens_T)
    copyable_T = np.zeros(num_tokens, bool)
    codes = ngram_codes(tokens_T, n)  # of the n-gram that ends at token n - 1 + i
    own = _seen_before(codes, context_length)
    for u, neighbours_KR in enumerate(neighbours_LKR):
        first, stop = (u + 1) * chunk_length, min((u + 2) * chunk_length, num_tokens)
        start = max(first, n - 1)
        if start >= stop:
            continue
        wanted = codes[start - n + 1 : stop - n + 1]
        offered = ngram_codes(neighbours_KR, n)
        copyable_T[start:stop] = np.isin(wanted, offered) & (wanted > 0) & ~own[start - n + 1 : stop - n + 1]
    return copyable_T


def _seen_before(codes: np.ndarray, distance: int) -> np.ndarray:
    """bool: whether the same code stands at most `distance` places earlier."""
    order = np.argsort(codes, kind="stable")
    seen = np.zeros(len(codes), bool)
    same = codes[order[1:]] == codes[order[:-1]]
    seen[order[1:]] = same & (order[1:] - order[:-1] <= distance)
    return seen
