"""Merging: the definition, ascending distances, ties by id, missing places last, and what is not certain."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from retro_ray.index.merge import Candidates, merge_candidates, nearest, pad_columns

candidates = st.lists(st.tuples(st.sampled_from([0.0, -0.0, 1e-30, 0.5, 2.0, np.inf]), st.integers(0, 30)), max_size=15)


@given(candidates=candidates, k=st.integers(0, 18))
def test_nearest_equals_sorting_pairs(candidates: list[tuple[float, int]], k: int) -> None:
    distances = np.array([[distance for distance, _ in candidates]], np.float32)
    ids = np.array([[chunk_id for _, chunk_id in candidates]], np.int64)
    order = nearest(distances, ids, k)
    assert sorted(set(order[0])) == sorted(order[0])
    found = list(zip(distances[0][order[0]], ids[0][order[0]], strict=True))
    real = sorted((d, c) for d, c in zip(distances[0], ids[0], strict=True) if d < np.inf)[:k]
    assert found[: len(real)] == real
    assert all(distance == np.inf for distance, _ in found[len(real) :])
    assert len(found) == min(k, len(candidates))


# Coarse distance and distance of rows, id their place: few values, so many ties.
rows = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=14)


@given(rows=rows, k=st.integers(1, 6), extra=st.integers(0, 4), data=st.data())
def test_merging_is_the_definition_or_says_that_it_may_not_be(
    rows: list[tuple[int, int]], k: int, extra: int, data: st.DataObject
) -> None:
    """Parts list what they like of their best rows; what they hide they own up to."""
    num_candidates = k + extra
    cut = sorted(coarse for coarse, _ in rows)[num_candidates - 1] if len(rows) >= num_candidates else np.inf
    expected = sorted((distance, row) for row, (coarse, distance) in enumerate(rows) if coarse <= cut)[:k]
    num_parts = data.draw(st.integers(1, 3))
    part_of = data.draw(st.lists(st.integers(0, num_parts - 1), min_size=len(rows), max_size=len(rows)))
    parts, hides = [], False
    for part in range(num_parts):
        own = sorted((rows[row][0], row) for row in range(len(rows)) if part_of[row] == part)
        num_listed = data.draw(st.integers(0, len(own)))
        listed, hidden = own[:num_listed], own[num_listed:]
        hides |= bool(hidden) and hidden[0][0] <= cut
        parts.append(
            Candidates(
                np.array([[coarse for coarse, _ in listed] + [np.inf]], np.float32),
                np.array([[rows[row][1] for _, row in listed] + [np.inf]], np.float32),
                np.array([[row for _, row in listed] + [-1]], np.int64),
                np.array([hidden[0][0] if hidden else np.inf], np.float32),
            )
        )
    merged = merge_candidates(parts, k, num_candidates)
    assert merged.ids.shape == merged.distances.shape == (1, k)
    assert merged.unfinished[0] == hides
    if not hides:
        found = list(zip(merged.distances[0], merged.ids[0], strict=True))
        assert found == expected + [(np.inf, -1)] * (k - len(expected))


def test_padding() -> None:
    values = np.arange(6).reshape(2, 3)
    assert pad_columns(values, 5, -1).tolist() == [[0, 1, 2, -1, -1], [3, 4, 5, -1, -1]]
    assert pad_columns(values, 3, -1) is values
    assert pad_columns(np.ones((2, 1, 4)), 2, 0).shape == (2, 2, 4)
