import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_ray.evaluation.bits_per_byte import ChunkScores
from retro_ray.evaluation.overlap import longest_shared_runs, overlap_ratios, score_by_overlap

NONE = -1


def naive_longest_run(chunk: list[int], neighbours: list[list[int]]) -> int:
    """Every run of the chunk, looked for at every place of every neighbour."""
    best = 0
    for start in range(len(chunk)):
        for stop in range(start + 1, len(chunk) + 1):
            run = chunk[start:stop]
            if NONE in run:
                continue
            for tokens in neighbours:
                if any(tokens[i : i + len(run)] == run for i in range(len(tokens))):
                    best = max(best, len(run))
    return best


@pytest.mark.parametrize(
    ("chunk", "neighbours", "expected"),
    [
        ([1, 2, 3, 4], [[9, 1, 2, 3, 4, 9, 9, 9]], 4),
        ([1, 2, 3, 4], [[1, 2, 9, 3, 4, 1, 9, 9]], 2),
        ([1, 2, 3, 4], [[9] * 8], 0),
        ([1, 2, 3, NONE], [[1, 2, 3, NONE, NONE, NONE, NONE, NONE]], 3),  # padding is shared with nothing
        ([NONE, 1, 2, 3], [[NONE, 1, 2, 9, 9, 9, 9, 9]], 2),
        ([1, 2, 3, 4], [[1, 2, 9, 9, 9, 9, 9, 9], [9, 2, 3, 4, 9, 9, 9, 9]], 3),  # the better of two neighbours
        ([1, 2, 3, 4], [[9, 9, 9, 1, 2, 9, 9, 9]], 2),  # a run goes on from N into F
        ([1, 2, 3, 4], [[3, 4, 9, 9, 9, 9, 1, 2]], 2),  # but not around the end
    ],
)
def test_known_runs(chunk: list[int], neighbours: list[list[int]], expected: int) -> None:
    assert longest_shared_runs(np.array([chunk]), np.array([neighbours])).tolist() == [expected]
    ratio = overlap_ratios(np.array([chunk]), np.array([neighbours]))
    assert ratio.tolist() == [expected / sum(token != NONE for token in chunk)]


def test_no_neighbours_and_no_tokens() -> None:
    assert longest_shared_runs(np.array([[1, 2]]), np.empty((1, 0, 4), np.int64)).tolist() == [0]
    assert overlap_ratios(np.full((1, 4), NONE), np.full((1, 2, 8), NONE)).tolist() == [0.0]


@settings(max_examples=100)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_equals_a_naive_search(num_chunks: int, length: int, num_neighbours: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(NONE, 3, (num_chunks, length))
    neighbours = rng.integers(NONE, 3, (num_chunks, num_neighbours, 2 * length))
    expected = [naive_longest_run(c, n) for c, n in zip(tokens.tolist(), neighbours.tolist(), strict=True)]
    assert longest_shared_runs(tokens, neighbours).tolist() == expected


def scores_of(nats: list[float]) -> ChunkScores:
    n = len(nats)
    return ChunkScores(np.arange(n), np.array(nats), np.full(n, 4), np.arange(1, n + 1))


def test_known_scores() -> None:
    curve = score_by_overlap(
        np.array([0.0, 0.5, 1.0]),
        {"on": scores_of([np.log(2), 2 * np.log(2), 9 * np.log(2)]), "off": scores_of([np.log(2)] * 3)},
        alphas=(0.0, 0.49, 0.5, 1.0),
    )
    assert [point.num_chunks for point in curve] == [1, 1, 2, 3]
    assert [point.scores["on"].value for point in curve] == pytest.approx([1, 1, 3 / 3, 12 / 6])
    assert [point.scores["off"].value for point in curve] == pytest.approx([1, 1, 2 / 3, 3 / 6])


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 100)), min_size=1, max_size=20))
def test_alpha_one_is_the_full_score_and_counts_grow(chunks: list[tuple[float, float]]) -> None:
    ratios, nats = zip(*chunks, strict=True)
    scores = scores_of(list(nats))
    curve = score_by_overlap(np.array(ratios), {"on": scores})
    assert curve[-1].scores["on"] == scores.total
    counts = [point.num_chunks for point in curve]
    assert counts == sorted(counts)
    assert counts[-1] == len(chunks)
