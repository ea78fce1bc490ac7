import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_ray.text.near_duplicates import MIN_JACCARD, NGRAM_LENGTH, NearDocuments, jaccard, shingles


def ngram_set(tokens: list[int]) -> set[tuple[int, ...]]:
    n = min(NGRAM_LENGTH, len(tokens))
    return {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}


def naive_jaccard(a: list[int], b: list[int]) -> float:
    one, other = ngram_set(a), ngram_set(b)
    return len(one & other) / len(one | other)


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(0, 3))
def test_exactly_the_pairs_above_the_threshold_are_found(seed: int, length: int, num_edits: int) -> None:
    """A document beside copies of it with more and more changed tokens, by the sets of their n-grams themselves."""
    rng = np.random.default_rng(seed)
    text = rng.integers(0, 50, 10 * length).tolist()
    documents = {"other": rng.integers(0, 50, 200).tolist()}
    for number in range(5):
        edited = list(text)
        for _ in range(num_edits * number):
            edited[int(rng.integers(len(edited)))] = int(rng.integers(50))
        documents[f"edited {number}"] = edited
    near = NearDocuments((name, shingles(np.array(tokens))) for name, tokens in documents.items())
    found = near.near(shingles(np.array(text)))
    expected = {name: naive_jaccard(text, tokens) for name, tokens in documents.items()}
    assert {one.name for one in found} == {name for name, value in expected.items() if value >= MIN_JACCARD}
    assert all(one.jaccard == expected[one.name] for one in found)
    assert [one.jaccard for one in found] == sorted((one.jaccard for one in found), reverse=True)


def test_nothing_is_near_to_nothing() -> None:
    empty = shingles(np.empty(0, np.int64))
    assert len(empty) == 0
    near = NearDocuments([("empty", empty), ("short", shingles(np.array([1, 2])))])
    assert len(near) == 1
    assert near.near(empty) == []
    assert [one.name for one in near.near(shingles(np.array([1, 2])))] == ["short"]
    assert near.near(shingles(np.array([1, 2, 3]))) == []
    assert jaccard(empty, empty) == 0
