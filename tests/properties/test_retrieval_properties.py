"""Rules 3 to 5: sharded search is search in one index, to the bit; no neighbour is of the query's own document."""

import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.ipc as ipc
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_ray.database.format import IndexSpec
from retro_ray.database.store import ChunkStore
from retro_ray.index.encoder import QueryEncoder
from retro_ray.index.shard import IndexShard
from retro_ray.retrieval.local import LocalRetriever, ShardSearcher
from retro_ray.retrieval.neighbours import own_document_ids, write_neighbours
from tests.unit.database.stores import M, write_store

FLAT = IndexSpec(factory="Flat")
DIM = 3


def searcher(store: ChunkStore, keys: np.ndarray) -> ShardSearcher:
    return ShardSearcher(FLAT, QueryEncoder(FLAT, None), IndexShard(FLAT, keys), store)


def write_shards(
    folder: Path, documents: list[list[int]], keys: np.ndarray, cuts: list[int]
) -> tuple[LocalRetriever, list[ChunkStore]]:
    """Documents and their keys, divided before the documents in `cuts`."""
    bounds = [0, *cuts, len(documents)]
    stores, searchers, base = [], [], 0
    for start, stop in pairwise(bounds):
        num_chunks = sum(-(-len(tokens) // M) for tokens in documents[start:stop])
        own = keys[base : base + num_chunks]
        name = f"{len(cuts)}-{len(stores)}"
        stores.append(write_store(folder, documents[start:stop], name=name, base=base, keys=own, first_document=start))
        searchers.append(searcher(stores[-1], own))
        base += num_chunks
    return LocalRetriever(searchers), stores


@st.composite
def corpora(draw: st.DrawFn) -> tuple[list[list[int]], np.ndarray, list[int]]:
    """Documents, keys with many ties, and where shards begin."""
    sizes = draw(st.lists(st.integers(1, 5 * M), min_size=1, max_size=12))
    documents = [[1 + (7 * d + t) % 90 for t in range(size)] for d, size in enumerate(sizes)]
    num_chunks = sum(-(-size // M) for size in sizes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    keys = rng.integers(-1, 2, (num_chunks, DIM)).astype(np.float32)
    cuts = draw(st.lists(st.integers(1, max(1, len(documents) - 1)), max_size=5, unique=True))
    return documents, keys, sorted(cut for cut in cuts if cut < len(documents))


@settings(max_examples=60)
@given(corpus=corpora(), k=st.integers(1, 12), seed=st.integers(0, 2**32 - 1), excluding=st.booleans())
def test_sharded_equals_whole(
    corpus: tuple[list[list[int]], np.ndarray, list[int]], k: int, seed: int, excluding: bool
) -> None:
    documents, keys, cuts = corpus
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "whole").mkdir()
        whole, [store] = write_shards(Path(folder) / "whole", documents, keys, [])
        sharded, _ = write_shards(Path(folder), documents, keys, cuts)
        rows = np.random.default_rng(seed).integers(0, len(keys), 6)
        excluded = own_document_ids(store, rows) if excluding else None
        expected, found = (retriever.search_ids(keys[rows], k, excluded) for retriever in (whole, sharded))
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])
        assert found[1].shape == (6, k)
        expected_set, found_set = whole.search(keys[rows], k), sharded.search(keys[rows], k)
        for field in ("distances", "chunk_ids", "tokens", "mask"):
            np.testing.assert_array_equal(getattr(found_set, field), getattr(expected_set, field))
        assert found_set.documents == expected_set.documents
        assert found_set.missing_shards == ()


@settings(max_examples=60)
@given(corpus=corpora(), k=st.integers(1, 9))
def test_stored_neighbours_equal_a_naive_search(corpus: tuple[list[list[int]], np.ndarray, list[int]], k: int) -> None:
    """Nearest first, ties by chunk_id, none of the own document, -1 and infinity where nothing is left."""
    documents, keys, cuts = corpus
    owner = np.concatenate([[d] * -(-len(tokens) // M) for d, tokens in enumerate(documents)])
    with tempfile.TemporaryDirectory() as folder:
        retriever, stores = write_shards(Path(folder), documents, keys, cuts)
        for store in stores:
            path = Path(folder) / store.partition.neighbours
            num_missing = write_neighbours(store, retriever, k, path)
            table = ipc.open_file(path).read_all()
            found = np.array(table["chunk_ids"].to_pylist()).reshape(-1, k)
            distances = np.array(table["distances"].to_pylist()).reshape(-1, k)
            assert num_missing == (found < 0).sum()
            for row in range(store.num_chunks):
                own = store.chunk_id_base + row
                squares = ((keys.astype(float) - keys[own]) ** 2).sum(1)
                pairs = sorted((squares[i], i) for i in range(len(keys)) if owner[i] != owner[own])[:k]
                pairs += [(np.inf, -1)] * (k - len(pairs))
                assert list(zip(distances[row], found[row], strict=True)) == pairs
