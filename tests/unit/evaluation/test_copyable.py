import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_ray.evaluation.copyable import newly_copyable
from retro_ray.text.ngrams import ngram_codes

M = 4


def naive(tokens: list[int], neighbours: list[list[list[int]]], context: int, n: int) -> list[bool]:
    found = []
    for t in range(len(tokens)):
        u = t // M - 1
        gram = tokens[t - n + 1 : t + 1] if t >= n - 1 else []
        if u < 0 or not gram or min(gram) < 0:
            found.append(False)
            continue
        offered = any(row[i : i + n] == gram for row in neighbours[u] for i in range(len(row) - n + 1))
        earlier = (tokens[e - n + 1 : e + 1] for e in range(max(n - 1, t - context), t))
        found.append(offered and gram not in earlier)
    return found


@settings(max_examples=100)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(2, 3), st.integers(0, 2**32 - 1))
def test_equals_a_naive_search(num_tokens: int, context: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 3, num_tokens)
    neighbours = rng.integers(-1, 3, (-(-num_tokens // M), 2, 2 * M))
    expected = naive(tokens.tolist(), neighbours.tolist(), context, n)
    assert newly_copyable(tokens, neighbours, M, context, n).tolist() == expected


def test_a_copy_counts_once_and_only_where_it_is_new() -> None:
    tokens = np.array([1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7, 8])
    neighbours = np.full((3, 1, 2 * M), -1)
    neighbours[:2, 0, :5] = [4, 5, 6, 7, 8]
    # Chunk 2 copies 4 5 6 7 8 from its second token on; by chunk 3 the 3-grams stand in the text's own context.
    assert np.flatnonzero(newly_copyable(tokens, neighbours, M, 448, 3)).tolist() == [5, 6, 7]
    assert np.flatnonzero(newly_copyable(tokens, neighbours, M, 3, 3)).tolist() == [5, 6, 7, 10, 11]


@pytest.mark.parametrize("length", [0, 1, 4])
def test_shorter_than_an_ngram(length: int) -> None:
    assert ngram_codes(np.arange(length), 5).shape == (0,)
    assert not newly_copyable(np.arange(length), np.zeros((1, 1, 8), np.int64), M).any()


def test_codes_tell_ngrams_apart() -> None:
    grams = np.random.default_rng(0).integers(0, 1 << 16, (200_000, 5))
    assert len(np.unique(ngram_codes(grams, grams.shape[1]))) == len(np.unique(grams, axis=0))
    assert ngram_codes(np.array([1, 2, -1, 4, 5]), 2).tolist()[1:3] == [0, 0]
