"""Rules 3 to 5 and 14: sharded search is search in one index, to the bit, whichever replicas answer and whenever
somebody commits; no neighbour is of the query's own document."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.ipc as ipc
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_ray.config import RetrievalConfig
from retro_ray.retrieval.answering import ServedShard
from retro_ray.retrieval.database_retriever import DatabaseRetriever
from retro_ray.retrieval.failover import FailoverClient
from retro_ray.retrieval.following import FollowedManifest
from retro_ray.retrieval.local import LocalRetriever
from retro_ray.retrieval.messages import CandidateAnswer, CandidateRequest
from retro_ray.retrieval.neighbours import own_document_ids, write_neighbours
from retro_ray.retrieval.retriever import NeighbourSet
from tests.unit.database.stores import M
from tests.unit.retrieval.fake_transport import DEAD, HANGS, OK, FakeTransport
from tests.unit.retrieval.homes import Home, write_home

DIM = 3
NUM_REPLICAS = 2
Corpus = tuple[list[list[int]], np.ndarray, list[int], list[int]]


@st.composite
def corpora(draw: st.DrawFn) -> Corpus:
    """Documents, keys with many ties, where segments begin, and the shard of each."""
    sizes = draw(st.lists(st.integers(1, 5 * M), min_size=1, max_size=12))
    documents = [[1 + (7 * d + t) % 90 for t in range(size)] for d, size in enumerate(sizes)]
    num_chunks = sum(-(-size // M) for size in sizes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    keys = rng.integers(-1, 2, (num_chunks, DIM)).astype(np.float32)
    cuts = draw(st.lists(st.integers(1, max(1, len(documents) - 1)), max_size=5, unique=True))
    cuts = sorted(cut for cut in cuts if cut < len(documents))
    return documents, keys, cuts, draw(st.lists(st.integers(0, 3), min_size=len(cuts) + 1, max_size=len(cuts) + 1))


class ServedShards:
    """Shards as actors hold them, each with replicas that fail as a test says; the client is the real one."""

    requests_at_a_time = 1
    are_elsewhere = True

    def __init__(self, home: Home, trouble: Sequence[int]) -> None:
        self.replicas = [
            [ServedShard(home.directory, shard) for _ in range(NUM_REPLICAS)]
            for shard in range(home.manifest.num_shards)
        ]
        self._trouble = list(trouble)
        transport = FakeTransport(self._behave, self._answer)
        self._client = FailoverClient(
            transport, num_replicas=NUM_REPLICAS, timeout_s=1.0, policy="wait", database="database"
        )

    def num_requests(self, num_queries: int) -> int:
        return 1

    def ask(self, request: CandidateRequest, num_shards: int) -> tuple[list[CandidateAnswer], tuple[int, ...]]:
        answers = self._client.finish(self._client.begin(request, num_shards))
        return list(answers.by_shard.values()), answers.missing_shards

    def _behave(self, shard: int, replica: int, now: float):
        """The next trouble: the call's replica is dead, or hangs."""
        kinds = [OK, DEAD, HANGS if replica == 0 else OK]
        return kinds[self._trouble.pop()] if self._trouble else OK

    def _answer(self, shard: int, request: CandidateRequest) -> CandidateAnswer:
        replicas = self.replicas[shard]
        replicas.append(replicas.pop(0))  # another one every time
        return replicas[0].answer([request])[0]


def sharded(home: Home, shards: ServedShards) -> DatabaseRetriever:
    return DatabaseRetriever(FollowedManifest(home.directory), shards, RetrievalConfig())


def assert_equal(found: NeighbourSet, expected: NeighbourSet) -> None:
    for field in ("distances", "chunk_ids", "tokens", "mask"):
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))
    assert found.documents == expected.documents
    assert found.missing_shards == ()


def naive(home: Home, keys: np.ndarray, query: np.ndarray, k: int, excluded: Sequence[int] = ()) -> list[tuple]:
    """(distance, chunk_id) of the k nearest live chunks, padded: every distance computed, all sorted."""
    alive = ~home.database.is_deleted(np.arange(home.manifest.next_chunk_id))
    live = [int(i) for i in np.flatnonzero(alive) if i not in excluded]
    squares = ((keys.astype(float) - query) ** 2).sum(1)
    pairs = sorted((float(squares[i]), i) for i in live)[:k]
    return pairs + [(np.inf, -1)] * (k - len(pairs))


@settings(max_examples=40)
@given(
    corpus=corpora(),
    k=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
    excluding=st.booleans(),
    trouble=st.lists(st.integers(0, 2), max_size=12),
)
def test_sharded_equals_whole(corpus: Corpus, k: int, seed: int, excluding: bool, trouble: list[int]) -> None:
    """However documents are spread over segments and shards, some of them empty, and whatever replicas do."""
    documents, keys, cuts, shards = corpus
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "whole").mkdir()
        (Path(folder) / "parts").mkdir()
        whole_home = write_home(Path(folder) / "whole", documents, keys, [], [0])
        parts_home = write_home(Path(folder) / "parts", documents, keys, cuts, shards)
        parts = sharded(parts_home, ServedShards(parts_home, trouble))
        whole = LocalRetriever.open(whole_home.database)
        rows = np.random.default_rng(seed).integers(0, len(keys), 6)
        excluded = own_document_ids(whole_home.stores[0], rows) if excluding else None
        expected, found = (retriever.search_ids(keys[rows], k, excluded) for retriever in (whole, parts))
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])
        assert found[1].shape == (6, k)
        for row, distances, chunk_ids in zip(range(6), *found, strict=True):
            own = () if excluded is None else range(excluded[row, 0], excluded[row, 1] + 1)
            assert list(zip(distances, chunk_ids, strict=True)) == naive(whole_home, keys, keys[rows[row]], k, own)
        assert_equal(parts.search(keys[rows], k), whole.search(keys[rows], k))


@settings(max_examples=40)
@given(corpus=corpora(), k=st.integers(1, 12), data=st.data())
def test_an_answer_is_of_one_generation_whatever_is_committed_meanwhile(
    corpus: Corpus, k: int, data: st.DataObject
) -> None:
    """Replicas and client notice a commit at different times; what is deleted when a search begins is not found."""
    documents, keys, cuts, shards = corpus
    with tempfile.TemporaryDirectory() as folder:
        home = write_home(Path(folder), documents, keys, cuts, shards)
        home.show(data.draw(st.integers(1, len(home.stores))))
        served_shards = ServedShards(home, [])
        retriever = sharded(home, served_shards)
        local = LocalRetriever.open(home.database)
        for _ in range(data.draw(st.integers(1, 4))):
            kind = data.draw(st.sampled_from(["delete", "show"]))
            if kind == "show":
                home.show(data.draw(st.integers(len(home.manifest.segments), len(home.stores))))
            else:
                there = [
                    (segment, document)
                    for segment in range(len(home.manifest.segments))
                    for document in range(home.stores[segment].num_documents)
                ]
                before = {place for place in there if home.database.is_deleted(_first_chunk(home, place)).item()}
                chosen = data.draw(st.sets(st.sampled_from(there), max_size=3))
                home.delete(sorted(before | chosen))
            # Some replicas have heard of it, others have not.
            for replicas in served_shards.replicas:
                for served in replicas:
                    if data.draw(st.booleans()):
                        served.refresh()
            found = retriever.search(keys[:3], k)
            assert found.generation == home.manifest.generation
            for query in range(min(3, len(keys))):
                pairs = list(zip(found.distances[query], found.chunk_ids[query], strict=True))
                assert pairs == naive(home, keys, keys[query], k)
            assert_equal(found, local.search(keys[:3], k))


def _first_chunk(home: Home, place: tuple[int, int]) -> np.ndarray:
    segment, document = place
    store = home.stores[segment]
    return np.array(store.chunk_id_base + store.document_first_row[document])


@settings(max_examples=40)
@given(corpus=corpora(), k=st.integers(1, 9))
def test_stored_neighbours_equal_a_naive_search(corpus: Corpus, k: int) -> None:
    """Nearest first, ties by chunk_id, none of the own document, -1 and infinity where nothing is left."""
    documents, keys, cuts, shards = corpus
    owner = np.concatenate([[d] * -(-len(tokens) // M) for d, tokens in enumerate(documents)])
    with tempfile.TemporaryDirectory() as folder:
        home = write_home(Path(folder), documents, keys, cuts, shards)
        retriever = LocalRetriever.open(home.database)
        for store in home.stores:
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
