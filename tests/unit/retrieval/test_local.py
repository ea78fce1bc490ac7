"""What an answer of the local retriever holds, and how retrieval by text asks for it."""

from pathlib import Path

import numpy as np
import pytest

from retro_ray.database.store import Database
from retro_ray.errors import DatabaseError, MismatchError
from retro_ray.retrieval.local import LocalRetriever
from retro_ray.retrieval.neighbours import own_document_ids
from retro_ray.retrieval.retriever import ChunkRetriever
from tests.fakes import write_tiny_database
from tests.unit.retrieval.indexed import with_indexes


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return with_indexes(write_tiny_database(tmp_path, num_shards=3))


def test_an_answer_holds_the_chunks_and_their_documents(database: Database) -> None:
    retriever = LocalRetriever.open(database)
    queries = np.concatenate([store.keys[:2] for store in database.segments])
    answer = retriever.search(queries, 5)
    own = np.concatenate([[store.chunk_id_base, store.chunk_id_base + 1] for store in database.segments])
    np.testing.assert_array_equal(answer.chunk_ids[:, 0], own)
    np.testing.assert_array_equal(answer.distances[:, 0], 0)
    tokens, mask = database.neighbour_tokens(answer.chunk_ids)
    np.testing.assert_array_equal(answer.tokens, tokens)
    np.testing.assert_array_equal(answer.mask, mask)
    for query, chunk_id in np.ndindex(answer.chunk_ids.shape):
        found = int(answer.chunk_ids[query, chunk_id])
        store = next(s for s in database.segments if s.chunk_id_base <= found < s.chunk_id_base + s.num_chunks)
        document = int(store.document_of(np.array([found - store.chunk_id_base]))[0])
        assert answer.documents[query][chunk_id] == store.document_ref(document)


def test_more_neighbours_than_chunks(database: Database) -> None:
    num_chunks = database.manifest.num_chunks
    answer = LocalRetriever.open(database).search(database.segments[0].keys[:2], num_chunks + 3)
    assert sorted(answer.chunk_ids[0, :num_chunks]) == list(range(num_chunks))
    assert (answer.chunk_ids[:, num_chunks:] == -1).all()
    assert np.isinf(answer.distances[:, num_chunks:]).all()
    assert not answer.mask[:, num_chunks:].any()
    assert answer.documents[0][num_chunks:] == (None, None, None)


def test_no_queries(database: Database) -> None:
    answer = LocalRetriever.open(database).search(np.empty((0, 8), np.float32), 4)
    assert answer.chunk_ids.shape == (0, 4)
    assert answer.tokens.shape == (0, 4, 2 * database.chunk_length)
    assert answer.documents == ()


def test_own_documents_end_where_the_next_begins(database: Database) -> None:
    store = database.segments[1]
    ranges = own_document_ids(store, np.arange(store.num_chunks))
    assert ranges is not None
    for row, (first, last) in enumerate(ranges - store.chunk_id_base):
        documents = store.document_of(np.arange(store.num_chunks))
        assert np.flatnonzero(documents == documents[row]).tolist() == list(range(first, last + 1))
    assert database.validation is not None
    assert own_document_ids(database.validation, np.arange(2)) is None


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
@pytest.mark.parametrize("file", ["keys", "chunks", "documents"])
def test_a_damaged_shard_is_not_served(database: Database, file: str, damage: str) -> None:
    path = database.directory / getattr(database.manifest.segments[1], file)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes({"flipped": bytes(content), "cut": bytes(content[:-7]), "missing": b""}[damage])
    if damage == "missing":
        path.unlink()
    with pytest.raises(DatabaseError, match=str(path)) as caught:
        LocalRetriever.open(database)
    assert "\n" not in str(caught.value)


class CountingEmbedder:
    """Keys whose first number is the length of the text."""

    fingerprint = "counting"

    def embed(self, texts) -> np.ndarray:
        return np.array([[len(text), *[0] * 7] for text in texts], np.float32).reshape(-1, 8)


def test_chunks_are_asked_for_by_their_text(database: Database) -> None:
    asked: list[np.ndarray] = []

    class Recorder(LocalRetriever):
        def search(self, queries, k):
            asked.append(queries)
            return super().search(queries, k)

    tokenizer = database.tokenizer
    recorder = Recorder(LocalRetriever.open(database)._searchers)
    retriever = ChunkRetriever(tokenizer, CountingEmbedder(), recorder)  # type: ignore[arg-type]
    texts = ["alpha beta", "x"]
    # The start token is no text.
    answer = retriever.retrieve_chunks([[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts], 2)
    assert asked[0][:, 0].tolist() == [len(text) for text in texts]
    assert answer.chunk_ids.shape == (2, 2)
    np.testing.assert_array_equal(retriever.retrieve_texts(texts, 2).chunk_ids, answer.chunk_ids)


def test_an_embedder_with_other_weights_is_refused(tmp_path: Path) -> None:
    database = with_indexes(
        write_tiny_database(tmp_path), embedder_name="all-MiniLM-L6-v2", embedder_fingerprint="0123456789abcdef"
    )
    with pytest.raises(MismatchError, match="0123456789abcdef") as caught:
        ChunkRetriever.open(database, LocalRetriever.open(database))
    assert "all-MiniLM-L6-v2" in str(caught.value)
