"""Merging: ascending distances, ties by chunk_id, missing places last."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from retro_ray.index.merge import nearest, pad_columns

candidates = st.lists(st.tuples(st.sampled_from([0.0, 0.5, 2.0, np.inf]), st.integers(-1, 30)), max_size=15)


@given(candidates=candidates, k=st.integers(0, 18))
def test_nearest_equals_sorting_pairs(candidates: list[tuple[float, int]], k: int) -> None:
    distances = np.array([[distance for distance, _ in candidates]], np.float32)
    chunk_ids = np.array([[chunk_id for _, chunk_id in candidates]], np.int64)
    order = nearest(distances, chunk_ids, k)
    found = list(zip(distances[0][order[0]], chunk_ids[0][order[0]], strict=True))
    real = sorted((d, c) for d, c in candidates if c >= 0)[:k]
    assert found[: len(real)] == real
    assert [chunk_id for _, chunk_id in found[len(real) :]] == [-1] * (min(k, len(candidates)) - len(real))


def test_padding() -> None:
    values = np.arange(6).reshape(2, 3)
    assert pad_columns(values, 5, -1).tolist() == [[0, 1, 2, -1, -1], [3, 4, 5, -1, -1]]
    assert pad_columns(values, 3, -1) is values
    assert pad_columns(np.ones((2, 1, 4)), 2, 0).shape == (2, 2, 4)
