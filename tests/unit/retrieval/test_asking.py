"""The side that asks and the side that answers, without Ray: batches, commits, mismatches, what is missing."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from retro_ray.config import RetrievalConfig
from retro_ray.database.store import Database
from retro_ray.errors import DatabaseError, MismatchError, RetrievalError
from retro_ray.index.encoder import QueryEncoder
from retro_ray.index.search import Wanted
from retro_ray.retrieval import answering, asking
from retro_ray.retrieval.answering import ServedShard
from retro_ray.retrieval.asking import Asker
from retro_ray.retrieval.database_retriever import DatabaseRetriever
from retro_ray.retrieval.following import Commit, CommitId, FollowedManifest
from retro_ray.retrieval.local import LocalRetriever
from retro_ray.retrieval.messages import CandidateAnswer, CandidateRequest
from tests.fakes import write_tiny_database
from tests.unit.database.stores import M
from tests.unit.retrieval.homes import FLAT, Home, write_home
from tests.unit.retrieval.indexed import with_indexes

DIM = 5
NUM_DOCUMENTS = 12


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """Documents of two chunks each, in three segments of two shards."""
    keys = np.random.default_rng(0).standard_normal((2 * NUM_DOCUMENTS, DIM)).astype(np.float32)
    documents = [[d] * (M + 1) for d in range(NUM_DOCUMENTS)]
    (tmp_path / "database").mkdir()
    return write_home(tmp_path / "database", documents, keys, [5, 8], [0, 1, 0])


def keys_of(home: Home) -> np.ndarray:
    return np.concatenate([store.keys for store in home.stores])


class FixedShards:
    """Answers with shards held here, or as a test says."""

    requests_at_a_time = 2
    are_elsewhere = True
    num_pieces = 1

    def __init__(self, home: Home, change: Callable[[list[CandidateAnswer]], Sequence[CandidateAnswer]] = list) -> None:
        self.served = [ServedShard(home.directory, shard) for shard in range(home.manifest.num_shards)]
        self.num_asked = 0
        self.missing: tuple[int, ...] = ()
        self._change = change

    def num_requests(self, num_queries: int) -> int:
        return self.num_pieces

    def ask(self, request: CandidateRequest, num_shards: int) -> tuple[Sequence[CandidateAnswer], tuple[int, ...]]:
        self.num_asked += 1
        there = [served for shard, served in enumerate(self.served) if shard not in self.missing]
        return self._change([served.answer([request])[0] for served in there]), self.missing


def asker(home: Home, shards: FixedShards, timeout_s: float = 5.0) -> Asker:
    return Asker(FollowedManifest(home.directory), shards, timeout_s)


@pytest.mark.parametrize("compressed", [False, True])
def test_requests_answered_together_get_what_they_get_alone(tmp_path: Path, compressed: bool) -> None:
    database = write_tiny_database(tmp_path, num_documents=60, num_shards=2)
    spec = replace(FLAT, factory="IVF8,PQ4x4fs", nprobe=4, refine_factor=3) if compressed else FLAT
    database = with_indexes(database, index=spec)
    served = ServedShard(database.directory, 1)
    encoder = asking._open_view(FollowedManifest(database.directory), Commit(database.manifest), None).encoder
    rng = np.random.default_rng(1)
    requests = [
        CandidateRequest(
            Commit(database.manifest).id,
            encoder.prepare(rng.standard_normal((size, 8)).astype(np.float32)),
            Wanted(12),
            excluded,
        )
        for size, excluded in [(3, None), (1, np.array([[5, 200]])), (4, None)]
    ]
    assert len({ServedShard.group_of(request) for request in requests}) == 1
    together = served.answer(requests)
    for request, answer in zip(requests, together, strict=True):
        alone = served.answer([request])[0]
        assert answer.commit == alone.commit
        assert answer.candidates is not None
        assert alone.candidates is not None
        for field in ("coarse", "distances", "ids", "hidden_from"):
            found, expected = getattr(answer.candidates, field), getattr(alone.candidates, field)
            assert found.shape == expected.shape
            np.testing.assert_array_equal(found, expected)


def test_only_new_segments_are_loaded_after_a_commit(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    home.show(2)
    served = ServedShard(home.directory)
    opened: list[str] = []
    original = answering.IndexShard.open

    def open_shard(spec, keys, index, deleted, mmap):
        opened.append(keys.parent.name)
        return original(spec, keys, index, deleted, mmap)

    monkeypatch.setattr(answering.IndexShard, "open", open_shard)
    for commit in (lambda: home.delete([(0, 1)]), lambda: home.show(3), lambda: home.delete([])):
        database = commit()
        assert served.refresh() == Commit(database.manifest).id
    assert opened == ["segment-2"]


def test_a_search_goes_on_with_what_it_began_with(home: Home) -> None:
    """A deletion changes nothing under a search that runs: it is of the commit before."""
    served = ServedShard(home.directory)
    before = served._view
    home.delete([(0, 0)])
    served.refresh()
    queries = QueryEncoder(FLAT, None).prepare(home.stores[0].keys[:1])
    assert 0 in before.segments[0].candidates(queries, Wanted(5), None).ids
    assert 0 not in served._view.segments[0].candidates(queries, Wanted(5), None).ids


@pytest.mark.parametrize("mmap", [False, True])
def test_a_mapped_shard_answers_the_same_and_checks_sizes(tmp_path: Path, mmap: bool) -> None:
    spec = replace(FLAT, factory="IVF8,PQ4x4fs", nprobe=8, refine_factor=8)
    database = with_indexes(write_tiny_database(tmp_path, num_documents=60, num_shards=2), index=spec)
    queries = database.segments[0].keys[:5]
    expected = LocalRetriever.open(database).search_ids(queries, 4)
    found = LocalRetriever.open(database, RetrievalConfig(mmap=mmap)).search_ids(queries, 4)
    np.testing.assert_array_equal(found, expected)
    path = database.directory / database.manifest.segments[0].chunks
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(DatabaseError, match="bytes"):
        LocalRetriever.open(database, RetrievalConfig(mmap=mmap))
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    if mmap:
        LocalRetriever.open(database, RetrievalConfig(mmap=True))  # reading it all is what mapping is to avoid
    else:
        with pytest.raises(DatabaseError, match="SHA-256"):
            LocalRetriever.open(database)


def test_large_batches_go_in_pieces(home: Home) -> None:
    shards = FixedShards(home)
    shards.num_pieces = 6
    queries = np.random.default_rng(2).standard_normal((40, DIM)).astype(np.float32)
    excluded = np.stack([np.arange(40) % 24, np.arange(40) % 24 + 3], axis=1)
    found = asker(home, shards).search(queries, 6, excluded)
    assert shards.num_asked >= 6
    expected = LocalRetriever.open(home.database).search_ids(queries, 6, excluded)
    np.testing.assert_array_equal(found.distances, expected[0])
    np.testing.assert_array_equal(found.chunk_ids, expected[1])
    assert asker(home, shards).search(queries[:0], 6).chunk_ids.shape == (0, 6)


def test_shards_that_stay_behind_are_an_error_in_the_end(home: Home) -> None:
    def behind(answers: list[CandidateAnswer]) -> list[CandidateAnswer]:
        return [CandidateAnswer(CommitId(0, "old"), None) for _ in answers]

    with pytest.raises(RetrievalError, match=r"generation 0, its manifest here says 1, .*timeout_s=0\.05"):
        asker(home, FixedShards(home, behind), timeout_s=0.05).search(keys_of(home), 3)


def test_a_shard_that_is_behind_is_asked_again(home: Home) -> None:
    late = 3

    def behind(answers: list[CandidateAnswer]) -> list[CandidateAnswer]:
        nonlocal late
        late -= 1
        return [CandidateAnswer(CommitId(0, "old"), None), *answers[1:]] if late > 0 else answers

    shards = FixedShards(home, behind)
    found = asker(home, shards).search(keys_of(home), 3)
    np.testing.assert_array_equal(found.chunk_ids[:, 0], np.arange(2 * NUM_DOCUMENTS))
    assert late == 0


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"tokenizer_fingerprint": "other"}, "tokenizer"),
        ({"embedder_fingerprint": "other"}, "embedder"),
        ({"chunk_length": 2 * M}, "chunk_length"),
    ],
)
def test_a_database_of_another_kind_is_refused(home: Home, change: dict, setting: str) -> None:
    """What was read with the old tokenizer must not be read with the new one."""
    retriever = LocalRetriever.open(home.database)
    keys = keys_of(home)
    retriever.search_ids(keys, 2)
    home.commit(**change)
    with pytest.raises(MismatchError, match=f"rebuilt with another {setting} .*start this program again"):
        retriever.search_ids(keys, 2)


def test_queries_of_another_dimension_are_refused(home: Home) -> None:
    with pytest.raises(RetrievalError, match=r"\(3, 4\) .* 5 dimensions"):
        asker(home, FixedShards(home)).search(np.zeros((3, 4), np.float32), 2)


@pytest.mark.parametrize("missing", [(1,), (0, 1)])
def test_what_is_missing_is_said_wherever_there_is_a_place_for_it(home: Home, missing: tuple[int, ...]) -> None:
    shards = FixedShards(home)
    shards.missing = missing
    retriever = DatabaseRetriever(FollowedManifest(home.directory), shards, RetrievalConfig())
    found = retriever.search(keys_of(home), 30)
    assert found.missing_shards == missing
    of_shard = {shard: set(range(10)) | set(range(16, 24)) if shard == 0 else set(range(10, 16)) for shard in (0, 1)}
    there = set().union(*(of_shard[shard] for shard in (0, 1) if shard not in missing))
    assert set(found.chunk_ids[0]) - {-1} == there
    with pytest.raises(RetrievalError, match=r"shards \[.*1\] .*set the policy to wait"):
        retriever.search_ids(keys_of(home), 2)


def test_the_database_is_the_one_of_the_answer(home: Home) -> None:
    retriever = LocalRetriever.open(home.database)
    assert retriever.search(keys_of(home), 2).generation == 1
    database: Database = home.delete([(1, 1)])
    assert retriever.database.manifest == database.manifest
    assert retriever.search(keys_of(home), 2).generation == 2
