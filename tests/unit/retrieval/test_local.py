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
    num_texts = 0

    def embed(self, texts) -> np.ndarray:
        self.num_texts += len(texts)
        return np.array([[len(text), *[0] * 7] for text in texts], np.float32).reshape(-1, 8)


class Recorder:
    """A Retriever that remembers what it was asked."""

    def __init__(self, inner: LocalRetriever) -> None:
        self.asked: list[tuple[np.ndarray, list[list[int]], str | None]] = []
        self._inner = inner

    def search(self, queries, k, chunks, rerank=None):
        self.asked.append((queries, [list(chunk) for chunk in chunks], rerank))
        return self._inner.search(queries, k)

    search_ids = None


def test_chunks_are_asked_for_by_their_text(database: Database) -> None:
    """Embedded once, whether they come as text or as tokens."""
    tokenizer, embedder = database.tokenizer, CountingEmbedder()
    recorder = Recorder(LocalRetriever.open(database))
    retriever = ChunkRetriever(tokenizer, embedder, recorder)  # type: ignore[arg-type]
    texts = ["alpha beta", "x"]
    # The start token is no text.
    chunks = [[tokenizer.bos_id, *tokenizer.encode(text).tolist()] for text in texts]
    answer = retriever.retrieve_chunks(chunks, 2, rerank="none")
    queries, tokens, rerank = recorder.asked[0]
    assert queries[:, 0].tolist() == [len(text) for text in texts]
    assert (tokens, rerank) == (chunks, "none")
    assert answer.chunk_ids.shape == (2, 2)
    assert embedder.num_texts == 2
    np.testing.assert_array_equal(retriever.retrieve_texts(texts, 2).chunk_ids, answer.chunk_ids)
    assert recorder.asked[1][1:] == ([chunk[1:] for chunk in chunks], None)
    assert embedder.num_texts == 4


def test_an_embedder_with_other_weights_is_refused(tmp_path: Path) -> None:
    database = with_indexes(
        write_tiny_database(tmp_path), embedder_name="all-MiniLM-L6-v2", embedder_fingerprint="0123456789abcdef"
    )
    with pytest.raises(MismatchError, match="0123456789abcdef") as caught:
        ChunkRetriever.open(database, LocalRetriever.open(database))
    assert "all-MiniLM-L6-v2" in str(caught.value)
