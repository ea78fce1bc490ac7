"""One segment's search: exact for an exact index, with ties by row, exclusions and refilling; never FAISS's -1."""

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_ray.index.build import fill_index, train_index, write_index
from retro_ray.index.encoder import PreparedQueries, QueryEncoder
from retro_ray.index.shard import IndexShard
from retro_ray.index.spec import IndexSpec
from tests.unit.index.parts import Parts

FLAT = IndexSpec(factory="Flat")


def exact_shard(keys: np.ndarray) -> Parts:
    return Parts(FLAT, None, keys)


def brute_force(
    keys: np.ndarray, queries: np.ndarray, k: int, excluded: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Pair by pair in float64: the k smallest (distance, row), inf and -1 where there are fewer."""
    distances = np.full((len(queries), k), np.inf, np.float32)
    rows = np.full((len(queries), k), -1, np.int64)
    for q, query in enumerate(queries.astype(np.float64)):
        pairs = []
        for row, key in enumerate(keys.astype(np.float64)):
            if excluded is not None and excluded[q, 0] <= row <= excluded[q, 1]:
                continue
            pairs.append((float(((key - query) ** 2).sum()), row))
        for place, (distance, row) in enumerate(sorted(pairs)[:k]):
            distances[q, place], rows[q, place] = distance, row
    return distances, rows


def assert_equal(found: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])
    assert (found[0].dtype, found[1].dtype) == (np.float32, np.int64)


def ranges_strategy(num_queries: int, num_rows: int) -> st.SearchStrategy:
    """First and last excluded row per query, or none."""
    bound = st.integers(0, max(0, num_rows - 1))
    return st.lists(
        st.one_of(st.just((-1, -1)), st.tuples(bound, bound).map(sorted).map(tuple)),
        min_size=num_queries,
        max_size=num_queries,
    ).map(lambda ranges: np.array(ranges, np.int64).reshape(-1, 2))


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_rows=st.integers(0, 40),
    num_queries=st.one_of(st.integers(0, 4), st.just(24)),
    dim=st.sampled_from([2, 8]),
    k=st.integers(0, 12),
    spread=st.sampled_from([1, 3]),
    offset=st.sampled_from([0, 300]),
    data=st.data(),
)
def test_exact_search_is_brute_force(
    seed: int, num_rows: int, num_queries: int, dim: int, k: int, spread: int, offset: int, data: st.DataObject
) -> None:
    """Integer coordinates of small spread: many exact ties and doubled keys."""
    rng = np.random.default_rng(seed)
    keys = (offset + rng.integers(-spread, spread + 1, (num_rows, dim))).astype(np.float32)
    queries = (offset + rng.integers(-spread, spread + 1, (num_queries, dim))).astype(np.float32)
    excluded = data.draw(st.one_of(st.none(), ranges_strategy(num_queries, num_rows)))
    assert_equal(exact_shard(keys).search(queries, k, excluded), brute_force(keys, queries, k, excluded))


def test_ties_far_beyond_the_margin() -> None:
    """Hundreds of rows at one distance: the first of them are the neighbours."""
    keys = np.ones((700, 4), np.float32)
    keys[650:] = 0.5
    shard = exact_shard(keys)
    queries = np.zeros((3, 4), np.float32)
    excluded = np.array([(-1, -1), (650, 699), (640, 660)], np.int64)
    assert_equal(shard.search(queries, 60, excluded), brute_force(keys, queries, 60, excluded))


def test_long_keys_in_large_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """There FAISS's own distances are off by more than these keys are apart."""
    monkeypatch.setattr(faiss.cvar, "distance_compute_blas_threshold", 20)
    rng = np.random.default_rng(0)
    keys = (400 + rng.integers(0, 2, (600, 16))).astype(np.float32)
    queries = (400 + rng.integers(0, 2, (40, 16))).astype(np.float32)
    assert_equal(exact_shard(keys).search(queries, 5), brute_force(keys, queries, 5))


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_an_answer_does_not_depend_on_the_batch(batch: int) -> None:
    rng = np.random.default_rng(1)
    keys, queries = rng.standard_normal((500, 24), np.float32), rng.standard_normal((64, 24), np.float32)
    shard = exact_shard(keys)
    together = shard.search(queries, 6)
    parts = [shard.search(queries[start : start + batch], 6) for start in range(0, 64, batch)]
    np.testing.assert_array_equal(np.concatenate([distances for distances, _ in parts]), together[0])
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in parts]), together[1])


def test_refilled_to_the_last_row() -> None:
    """The nearest are all excluded: what is left is found, and what is not left is missing."""
    keys = np.arange(200, dtype=np.float32)[:, None] * np.ones(2, np.float32)
    shard = exact_shard(keys)
    distances, rows = shard.search(np.zeros((1, 2), np.float32), 5, np.array([[0, 196]]))
    assert rows.tolist() == [[197, 198, 199, -1, -1]]
    assert np.isinf(distances[0, 3:]).all()


def test_all_excluded() -> None:
    keys = np.ones((30, 2), np.float32)
    distances, rows = exact_shard(keys).search(np.ones((2, 2), np.float32), 3, np.array([[0, 29], [-1, -1]]))
    assert rows.tolist() == [[-1, -1, -1], [0, 1, 2]]
    assert np.isinf(distances[0]).all()


@pytest.mark.parametrize("num_candidates", [10, 1500])
def test_what_is_excluded_may_begin_before_the_segment(num_candidates: int) -> None:
    keys = np.arange(2000, dtype=np.float32)[:, None] * np.ones(2, np.float32)
    prepared = QueryEncoder(FLAT, None).prepare(np.zeros((2, 2), np.float32))
    found = IndexShard(FLAT, keys).candidates(prepared, num_candidates, np.array([[-5, 4], [-9, -2]]))
    assert [min(row[row >= 0]) for row in found.ids] == [5, 0]


# Compressed indexes. ------------------------------------------------------------------------------------------

DIM = 16
COMPRESSED = IndexSpec(factory="IVF64,PQ8x4fs", nprobe=4, refine_factor=4)


@pytest.fixture(scope="module")
def clustered() -> tuple[np.ndarray, np.ndarray]:
    """Keys in clusters, and queries near some of them."""
    rng = np.random.default_rng(2)
    centres = 4 * rng.standard_normal((80, DIM))
    keys = (centres[rng.integers(0, 80, 6000)] + rng.standard_normal((6000, DIM))).astype(np.float32)
    return keys, (keys[::120] + 0.1 * rng.standard_normal((50, DIM))).astype(np.float32)


@pytest.fixture(scope="module")
def codec(clustered: tuple[np.ndarray, np.ndarray]) -> faiss.Index:
    return train_index(COMPRESSED, DIM, clustered[0])


def test_a_compressed_index_finds_the_neighbours_at_their_distances(codec, clustered) -> None:
    keys, queries = clustered
    spec = IndexSpec(factory=COMPRESSED.factory, nprobe=16, refine_factor=10)
    distances, rows = Parts(spec, codec, keys).search(queries, 10)
    expected_distances, expected = brute_force(keys, queries, 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows, expected, strict=True)])
    assert recall > 0.9
    same = rows == expected
    np.testing.assert_allclose(distances[same], expected_distances[same], rtol=1e-5)


def test_a_compressed_index_respects_exclusions_and_refills(codec, clustered) -> None:
    keys, queries = clustered
    nearest_row = np.arange(0, 6000, 120)
    excluded = np.stack([np.maximum(nearest_row - 1000, 0), nearest_row + 1000], axis=1)
    excluded[::2] = -1
    distances, rows = Parts(COMPRESSED, codec, keys).search(queries, 10, excluded)
    inside = (rows >= excluded[:, :1]) & (rows <= excluded[:, 1:])
    assert not inside.any()
    assert ((rows >= 0) & (rows < 6000)).all()
    assert np.isfinite(distances).all()
    assert (np.diff(distances, axis=1) >= 0).all()
    assert all(len(set(row)) == 10 for row in rows)
    assert (rows[::2, 0] == nearest_row[::2]).mean() > 0.9


@pytest.mark.parametrize("num_rows", [0, 3, 40])
def test_a_small_compressed_shard_is_exhausted(codec, clustered, num_rows: int) -> None:
    """Fewer rows than asked for, spread over lists that are not visited at first: all are found, none twice."""
    keys, queries = clustered
    excluded = np.full((len(queries), 2), -1, np.int64)
    excluded[0] = (1, 1)
    distances, rows = Parts(COMPRESSED, codec, keys[:num_rows]).search(queries, 50, excluded)
    found = [sorted(row[row >= 0]) for row in rows]
    assert found[1:] == [list(range(num_rows))] * (len(queries) - 1)
    assert found[0] == [row for row in range(num_rows) if row != 1]
    np.testing.assert_array_equal(np.isinf(distances), rows < 0)
    assert all((row[len(real) :] == -1).all() for row, real in zip(rows, found, strict=True))


@pytest.mark.parametrize("factory", ["PCA12,IVF32,PQ6x4fs", "IVF32,PQ4", "IVF32,SQ8", "IVF32,RaBitQ", "IVF32,RaBitQfs"])
def test_every_family_prepares_queries_as_faiss_does(clustered, factory: str) -> None:
    """Up to rounding, what is visited and what the codes say is what FAISS's own search has."""
    keys, queries = clustered
    spec = IndexSpec(factory=factory, nprobe=5)
    codec = train_index(spec, DIM, keys)
    whole = faiss.clone_index(codec)
    whole.add(keys)
    faiss.extract_index_ivf(whole).nprobe = 5
    coarse, rows = whole.search(queries, 12)
    found = IndexShard(spec, keys, whole).candidates(QueryEncoder(spec, codec).prepare(queries), 12)
    # Codes tie; so do not compare which of the tied rows was taken.
    np.testing.assert_allclose(found.coarse, coarse, rtol=1e-3, atol=1e-2)
    assert (found.ids == rows).mean() > 0.95


def test_files_make_the_same_shard(codec, clustered, tmp_path) -> None:
    keys, queries = clustered
    np.save(tmp_path / "keys.npy", keys)
    write_index(fill_index(faiss.clone_index(codec), [keys]), tmp_path / "index.faiss")
    for spec, encoder in ((FLAT, QueryEncoder(FLAT, None)), (COMPRESSED, QueryEncoder(COMPRESSED, codec))):
        index = None if spec.is_exact else fill_index(faiss.clone_index(codec), [keys])
        prepared = encoder.prepare(queries)
        expected = IndexShard(spec, keys, index).candidates(prepared, 20)
        for mmap in (False, True):
            shard = IndexShard.open(spec, tmp_path / "keys.npy", tmp_path / "index.faiss", mmap=mmap)
            found = shard.candidates(prepared, 20)
            for name in ("coarse", "distances", "ids", "hidden_from"):
                np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_queries_divide_and_join(codec, clustered) -> None:
    _, queries = clustered
    prepared = QueryEncoder(COMPRESSED, codec).prepare(queries)
    assert (len(prepared), prepared.lists.shape) == (50, (50, 4))
    joined = PreparedQueries.concatenate([prepared[:20], prepared[np.arange(20, 50)]])
    for name in ("keys", "transformed", "lists", "list_distances"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(prepared, name))


# Which index, and how it is made. -----------------------------------------------------------------------------


def test_documents_whose_chunks_are_nearest_to_each_other_are_searched_in_one_round():
    rng = np.random.default_rng(0)
    num_documents, num_chunks, dim, k = 30, 25, 8, 5
    middles = np.repeat(rng.normal(size=(num_documents, dim)), num_chunks, axis=0)
    keys = (middles + 0.01 * rng.normal(size=middles.shape)).astype(np.float32)
    first = np.repeat(np.arange(num_documents) * num_chunks, num_chunks)
    own = np.stack([first, first + num_chunks - 1], axis=1)
    parts = exact_shard(keys)
    found = parts.search(keys, k, own)
    assert parts.num_asked == [len(keys)]
    some = rng.choice(len(keys), 20, replace=False)
    np.testing.assert_array_equal(found[1][some], brute_force(keys, keys[some], k, own[some])[1])
