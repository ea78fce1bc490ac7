"""Rule 5: however keys are cut into segments and queries into batches, the answer is that of one index.

Of graphs, each its segment's own, that holds for batches alone; what holds besides is tested below.
"""

from functools import cache
from unittest import mock

import faiss
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_ray.index import graph as graph_module
from retro_ray.index.build import train_index
from retro_ray.index.spec import IndexSpec
from tests.unit.index.parts import Parts, defined_neighbours

DIM = 8
# Few candidates of few lists: what the codes say, and the cut, decide.
SPECS = [
    IndexSpec(factory="Flat"),
    IndexSpec(factory="IVF8,PQ4x4fs", nprobe=2, refine_factor=1.5),
    IndexSpec(factory="IVF8,PQ2x4fs", nprobe=3, refine_factor=2),
    IndexSpec(factory="PCA4,IVF8,PQ2x4fs", nprobe=2, refine_factor=1),
    IndexSpec(factory="IVF8,PQ4x4fsr", nprobe=3, refine_factor=1.5),
    IndexSpec(factory="IVF8,SQ8", nprobe=2, refine_factor=1),
    IndexSpec(factory="IVF8,RaBitQfs", nprobe=3, refine_factor=2),
]


@cache
def codec(factory: str) -> faiss.Index | None:
    if factory == "Flat":
        return None
    sample = np.random.default_rng(7).standard_normal((1000, DIM)).astype(np.float32)
    return train_index(IndexSpec(factory=factory), DIM, sample)


@st.composite
def databases(draw: st.DrawFn, dim: int = DIM, max_rows: int = 120) -> tuple[np.ndarray, list[int], np.ndarray | None]:
    """Keys with ties and doubles, where segments start (empty ones among them), and what is deleted."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_rows = draw(st.integers(0, max_rows))
    if draw(st.booleans()):
        keys = rng.integers(-1, 2, (num_rows, dim)).astype(np.float32)
    else:
        keys = rng.standard_normal((num_rows, dim)).astype(np.float32)
    if num_rows and draw(st.booleans()):  # doubled keys, far apart
        keys = keys[rng.integers(0, max(1, num_rows // 4), num_rows)]
    cuts = sorted(draw(st.lists(st.integers(0, num_rows), max_size=7)))
    share = draw(st.sampled_from([None, 0.1, 0.5, 0.95, 1.0]))
    return keys, cuts, None if share is None else rng.random(num_rows) < share


def asked(keys: np.ndarray, rng: np.random.Generator, excluding: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """24 queries, half of them keys, and perhaps rows to pass over for two thirds of them."""
    queries = rng.standard_normal((24, keys.shape[1])).astype(np.float32)
    if len(keys):
        queries[::2] = keys[rng.integers(0, len(keys), 12)]
    if not excluding:
        return queries, None
    excluded = np.sort(rng.integers(0, max(1, len(keys)), (24, 2)), axis=1)
    excluded[::3] = -1
    return queries, excluded


@settings(max_examples=250)
@given(
    database=databases(),
    spec=st.sampled_from(SPECS),
    k=st.integers(1, 30),
    seed=st.integers(0, 2**32 - 1),
    excluding=st.booleans(),
    batch=st.integers(1, 12),
)
def test_parts_and_batches_equal_the_whole(
    database: tuple[np.ndarray, list[int], np.ndarray | None],
    spec: IndexSpec,
    k: int,
    seed: int,
    excluding: bool,
    batch: int,
) -> None:
    keys, cuts, deleted = database
    rng = np.random.default_rng(seed)
    queries, excluded = asked(keys, rng, excluding)
    whole = Parts(spec, codec(spec.factory), keys, (), deleted)
    distances, ids = whole.search(queries, k, excluded)

    parts = Parts(spec, codec(spec.factory), keys, cuts, deleted)
    for start in range(0, 24, batch):
        cut = slice(start, start + batch)
        found = parts.search(queries[cut], k, None if excluded is None else excluded[cut])
        np.testing.assert_array_equal(found[0], distances[cut])
        np.testing.assert_array_equal(found[1], ids[cut])

    query = int(rng.integers(24))
    allowed = np.ones(len(keys), bool) if deleted is None else ~deleted
    if excluded is not None and excluded[query, 0] >= 0:
        allowed[excluded[query, 0] : excluded[query, 1] + 1] = False
    expected = defined_neighbours(spec, codec(spec.factory), keys, queries[query], k, allowed)
    num_found = int((ids[query] >= 0).sum())
    assert num_found == len(expected)
    np.testing.assert_allclose(distances[query, :num_found], [d for d, _ in expected], rtol=1e-5)
    if np.all(queries[query] == np.round(queries[query])) and np.all(keys == np.round(keys)):
        # Sums of small integers are exact, so ties are the same ties here and there.
        assert list(ids[query, :num_found]) == [row for _, row in expected]


GRAPH = IndexSpec(factory="SymphonyQG32", nprobe=20)
GRAPH_DIM = 64


@settings(max_examples=100)
@given(
    database=databases(GRAPH_DIM, 400),
    k=st.integers(1, 30),
    seed=st.integers(0, 2**32 - 1),
    excluding=st.booleans(),
    batch=st.integers(1, 12),
    exact_from=st.sampled_from([1, 2, 16]),
)
def test_graphs_answer_in_full_and_only_with_what_is_asked_for(
    database: tuple[np.ndarray, list[int], np.ndarray | None],
    k: int,
    seed: int,
    excluding: bool,
    batch: int,
    exact_from: int,
) -> None:
    """Nothing deleted or excluded, nothing twice, as many as there are, at their distances, ties by id; in any batch.

    Segments have graphs from 33 rows on, and compare all rows where a walk would look at `1 / exact_from` of them.
    """
    keys, cuts, deleted = database
    rng = np.random.default_rng(seed)
    queries, excluded = asked(keys, rng, excluding)
    with mock.patch.multiple(graph_module, MIN_ROWS=0, _EXACT_FROM=exact_from):
        parts = Parts(GRAPH, None, keys, cuts, deleted)
        distances, ids = parts.search(queries, k, excluded)
        for start in range(0, 24, batch):
            cut = slice(start, start + batch)
            found = parts.search(queries[cut], k, None if excluded is None else excluded[cut])
            np.testing.assert_array_equal(found[0], distances[cut])
            np.testing.assert_array_equal(found[1], ids[cut])
    for query in range(24):
        allowed = np.ones(len(keys), bool) if deleted is None else ~deleted
        if excluded is not None and excluded[query, 0] >= 0:
            allowed[excluded[query, 0] : excluded[query, 1] + 1] = False
        num_found = min(k, int(allowed.sum()))
        own, at = ids[query, :num_found], distances[query, :num_found]
        assert (own >= 0).all()
        assert (ids[query, num_found:] == -1).all()
        assert np.isinf(distances[query, num_found:]).all()
        assert allowed[own].all()
        assert len(set(own.tolist())) == num_found
        assert list(zip(at, own, strict=True)) == sorted(zip(at, own, strict=True))
        exact = ((keys[own].astype(np.float64) - queries[query]) ** 2).sum(1)
        np.testing.assert_allclose(at, exact, rtol=1e-5, atol=1e-5)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), num_parts=st.integers(1, 4), k=st.integers(1, 20))
def test_graphs_find_nearly_all_of_what_is_easy_to_find(seed: int, num_parts: int, k: int) -> None:
    """Keys in few dimensions, and many rows in view; the query's own key is always found."""
    rng = np.random.default_rng(seed)
    keys = np.zeros((600, GRAPH_DIM), np.float32)
    keys[:, :4] = rng.standard_normal((600, 4))
    queries = keys[::20]
    cuts = sorted(rng.integers(0, 600, num_parts - 1).tolist())
    spec = IndexSpec(factory="SymphonyQG32", nprobe=100)
    with mock.patch.multiple(graph_module, MIN_ROWS=0, _EXACT_FROM=1):
        distances, ids = Parts(spec, None, keys, cuts).search(queries, k)
    expected, _ = Parts(IndexSpec(factory="Flat"), None, keys).search(queries, k)
    assert (distances[:, 0] == 0).all()
    assert (np.abs(distances - expected) <= 1e-5).mean() > 0.9
    assert ids.shape == (30, k)
