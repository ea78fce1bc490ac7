"""Reranking by token overlap equals its definition, computed token by token; and what uses it."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retro_ray.config import RetrievalConfig
from retro_ray.database.format import file_record, write_manifest
from retro_ray.database.store import ChunkStore, Database
from retro_ray.database.token_statistics import num_holding, read_token_statistics, write_token_statistics
from retro_ray.errors import DatabaseError
from retro_ray.retrieval.local import LocalRetriever
from retro_ray.retrieval.neighbours import own_document_ids, write_neighbours
from retro_ray.retrieval.rerank import Chunks, OverlapScorer, Reranker, chunks_of, pad_chunks
from tests.fakes import write_tiny_database
from tests.unit.retrieval.indexed import with_indexes

V = 12
K = 4


def naive_overlap(query: Sequence[int], candidate: Sequence[int], holding: Sequence[int], num_chunks: int) -> float:
    """The definition in rerank.py, with sets."""

    def weight(token: int) -> float:
        exact = math.log(1 + (num_chunks - holding[token] + 0.5) / (holding[token] + 0.5))
        return round(256 * exact) / 256

    pairs = set(pairwise(query)) & set(pairwise(candidate))
    return sum(map(weight, set(query) & set(candidate))) + sum(weight(a) + weight(b) for a, b in pairs)


token_lists = st.lists(st.integers(0, V - 1), max_size=9)


@given(
    rows=st.lists(st.tuples(token_lists, st.lists(token_lists, min_size=3, max_size=3)), min_size=1, max_size=5),
    holding=st.lists(st.integers(0, 50), min_size=V, max_size=V),
    block=st.sampled_from([1, 1 << 9, 1 << 20]),
)
def test_scores_equal_the_definition(rows, holding: list[int], block: int) -> None:
    queries = pad_chunks([query for query, _ in rows])
    flat = pad_chunks([candidate for _, candidates in rows for candidate in candidates])
    # What stands in the padding must not matter.
    for chunks in (queries, flat):
        chunks.tokens[~chunks.is_real] = np.arange(np.count_nonzero(~chunks.is_real)) % V
    candidates = Chunks(flat.tokens.reshape(len(rows), 3, -1), flat.lengths.reshape(len(rows), 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retro_ray.retrieval.rerank._TABLE_ENTRIES", block)
        scores = OverlapScorer(np.array(holding), 50).score(queries, candidates)
    expected = [[naive_overlap(query, one, holding, 50) for one in candidates] for query, candidates in rows]
    np.testing.assert_array_equal(scores, np.array(expected, np.float32))


def with_statistics(database: Database, **changes) -> Database:
    """The database with token statistics, committed; and with fields of its manifest replaced."""
    path = database.directory / "token_statistics.npy"
    holding = num_holding(database.segments, database.manifest.vocab_size)
    write_token_statistics(path, holding, database.manifest.num_chunks)
    files = {**database.manifest.files, path.name: file_record(path)}
    manifest = replace(database.manifest, token_statistics=path.name, files=files, **changes)
    write_manifest(database.directory, manifest)
    return Database(database.directory, manifest)


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return with_indexes(write_tiny_database(tmp_path, num_shards=3))


def real_tokens(store: ChunkStore, row: int) -> list[int]:
    return store.tokens(np.array([row]))[0, : store.lengths(np.array([row]))[0]].tolist()


def test_token_statistics_count_chunks(database: Database, tmp_path: Path) -> None:
    vocab_size = database.manifest.vocab_size
    expected = np.zeros(vocab_size, np.int64)
    for store in database.segments:
        for row in range(store.num_chunks):
            expected[list(set(real_tokens(store, row)))] += 1
    holding = num_holding(database.segments, vocab_size)
    np.testing.assert_array_equal(holding, expected)
    write_token_statistics(tmp_path / "statistics.npy", holding, 321)
    read, num_chunks = read_token_statistics(tmp_path / "statistics.npy")
    np.testing.assert_array_equal(read, expected)
    assert num_chunks == 321
    (tmp_path / "statistics.npy").write_bytes(b"torn")
    with pytest.raises(DatabaseError, match=r"statistics\.npy"):
        read_token_statistics(tmp_path / "statistics.npy")


def expected_order(database: Database, query: list[int], dense: Sequence[int], k: int) -> list[int]:
    """Chunk_ids by overlap, ties as the dense search had them; special tokens count for nothing."""
    path = database.manifest.token_statistics
    assert path is not None
    holding, num_chunks = read_token_statistics(database.directory / path)
    holding[[database.tokenizer.bos_id, database.tokenizer.eos_id]] = num_chunks
    chunks = chunks_of(database, np.array(dense))
    scores = [
        naive_overlap(query, tokens[:length].tolist(), holding.tolist(), num_chunks)
        for tokens, length in zip(chunks.tokens, chunks.lengths, strict=True)
    ]
    return [dense[i] for i in sorted(range(len(dense)), key=lambda i: -scores[i])][:k]


@pytest.mark.parametrize("num_candidates", [1, K, 30])
def test_a_search_reorders_the_nearest_chunks(database: Database, num_candidates: int) -> None:
    database = with_statistics(database)
    retriever = LocalRetriever.open(database, RetrievalConfig(num_rerank_candidates=num_candidates))
    store = database.segments[1]
    queries, chunks = store.keys[:6], [real_tokens(store, row) for row in range(5, 11)]
    dense = retriever.search(queries, max(K, num_candidates))
    found = retriever.search(queries, K, chunks, "overlap")
    for row, chunk in enumerate(chunks):
        assert found.chunk_ids[row].tolist() == expected_order(database, chunk, dense.chunk_ids[row].tolist(), K)
        for column, chunk_id in enumerate(found.chunk_ids[row]):
            place = dense.chunk_ids[row].tolist().index(chunk_id)
            assert found.distances[row, column] == dense.distances[row, place]
            np.testing.assert_array_equal(found.tokens[row, column], dense.tokens[row, place])
            assert found.documents[row][column] == dense.documents[row][place]
    if num_candidates == 30:
        assert (found.chunk_ids != dense.chunk_ids[:, :K]).any()


def test_how_to_rerank_is_said_by_the_question_else_the_setting_else_the_database(database: Database) -> None:
    store = database.segments[0]
    keys, chunks = store.keys[:8], [real_tokens(store, row) for row in range(8)]

    def ids(database: Database, setting, question) -> list:
        retriever = LocalRetriever.open(database, RetrievalConfig(rerank=setting))
        return retriever.search(keys, K, chunks, question).chunk_ids.tolist()

    plain = with_statistics(database)
    dense, overlap = ids(plain, None, "none"), ids(plain, None, "overlap")
    assert dense != overlap
    assert ids(plain, None, None) == ids(plain, "overlap", "none") == dense
    assert ids(plain, "overlap", None) == overlap
    reranked = with_statistics(database, rerank="overlap")
    assert ids(reranked, None, None) == ids(reranked, "none", "overlap") == overlap
    assert ids(reranked, "none", None) == ids(reranked, None, "none") == dense
    # Without the chunks there is nothing to compare.
    assert LocalRetriever.open(reranked).search(keys, K).chunk_ids.tolist() == dense


def test_places_without_a_neighbour_stay_last(database: Database) -> None:
    database = with_statistics(database)
    retriever = LocalRetriever.open(database)
    num_chunks = database.manifest.num_chunks
    found = retriever.search(database.segments[0].keys[:2], num_chunks + 3, [[1, 2, 3], []], "overlap")
    assert sorted(found.chunk_ids[0, :num_chunks]) == list(range(num_chunks))
    assert (found.chunk_ids[:, num_chunks:] == -1).all()
    assert np.isinf(found.distances[:, num_chunks:]).all()


def test_stored_neighbours_are_reranked_as_the_manifest_says(database: Database, tmp_path: Path) -> None:
    """None of the own document, and what a search with the chunk's own tokens finds among the others."""
    database = with_statistics(database, rerank="overlap", num_rerank_candidates=20)
    retriever = LocalRetriever.open(database)
    store = database.segments[2]
    write_neighbours(store, retriever, K, tmp_path / "neighbours.arrow", database)
    excluded = own_document_ids(store, np.arange(store.num_chunks))
    dense = retriever.search_ids(store.keys, 20, excluded)[1]
    partition = replace(store.partition, neighbours_folder=str(tmp_path))
    stored = ChunkStore(database.directory, partition, database.chunk_length).neighbours.column("chunk_ids")
    for row in range(store.num_chunks):
        assert stored[row].tolist() == expected_order(database, real_tokens(store, row), dense[row].tolist(), K)


def test_a_database_without_statistics_says_what_to_do(database: Database) -> None:
    retriever = LocalRetriever.open(database, RetrievalConfig(rerank="overlap"))
    with pytest.raises(DatabaseError, match=r"rebuild it with jobs/index\.py, or set rerank to none"):
        retriever.search(database.segments[0].keys[:1], K, [[1, 2]])
    assert Reranker.of(database, "none", 50) is None
