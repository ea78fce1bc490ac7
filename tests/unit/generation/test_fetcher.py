import threading

import pytest

from retro_ray.errors import RetrievalError
from retro_ray.generation.engine import GenerationEngine
from retro_ray.generation.fetcher import MAX_QUERIES_PER_CALL, Fetch, NeighbourFetcher, Outcome
from retro_ray.generation.neighbours import ChunkQuery
from tests.unit.generation.fakes import CHUNK_LENGTH, GatedSearch

PATIENCE_S = 60


class Inbox:
    """What was delivered, and a way to wait for so many owners."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.seconds: list[float] = []
        self._changed = threading.Condition()

    def deliver(self, outcomes: list[Outcome], seconds: float) -> None:
        with self._changed:
            self.outcomes += outcomes
            self.seconds.append(seconds)
            self._changed.notify_all()

    def wait_for(self, num_outcomes: int) -> dict[object, object]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.outcomes) >= num_outcomes, PATIENCE_S)
            return {fetch.owner: outcome for fetch, outcome in self.outcomes}


def fetch_of(owner: str, num_queries: int = 1, k: int = 2, token: int = 1) -> Fetch:
    chunks = [(token + i,) * CHUNK_LENGTH for i in range(num_queries)]
    return Fetch(owner, tuple(ChunkQuery(u, chunk, k, None) for u, chunk in enumerate(chunks, start=1)))


@pytest.fixture
def search(tokenizer) -> GatedSearch:
    return GatedSearch(tokenizer.vocab_size)


@pytest.fixture
def inbox() -> Inbox:
    return Inbox()


@pytest.fixture
def fetcher(model, tokenizer, search: GatedSearch, inbox: Inbox):
    fetcher = NeighbourFetcher(GenerationEngine(model, tokenizer, search), inbox.deliver)
    # Its thread is inside a call, so that what is asked meanwhile gathers.
    fetcher.ask([fetch_of("first")], urgent=True)
    assert search.was_asked.wait(PATIENCE_S)
    yield fetcher
    search.gate.set()
    fetcher.close()


def sizes(search: GatedSearch) -> list[int]:
    return [len(chunks) for chunks, _ in search.calls]


def test_what_gathers_is_one_call_and_long_prompts_do_not_crowd(fetcher, search: GatedSearch, inbox: Inbox) -> None:
    fetcher.ask([fetch_of("long", MAX_QUERIES_PER_CALL + 5)], urgent=False)
    fetcher.ask([fetch_of("short", 3), fetch_of("short too", 4)], urgent=False)
    fetcher.ask([fetch_of("stopped")], urgent=True)
    fetcher.ask([fetch_of("stopped too", 2)], urgent=True)
    search.gate.set()
    found = inbox.wait_for(6)
    # They take turns: the first call was of a stopped one.
    assert sizes(search) == [1, MAX_QUERIES_PER_CALL + 5, 1 + 2, 3 + 4]
    assert [answer.query.chunk for answer in found["short too"]] == [1, 2, 3, 4]
    assert all(seconds > 0 for seconds in inbox.seconds)


def test_answers_are_those_of_asking_alone(fetcher, search: GatedSearch, inbox: Inbox, tokenizer) -> None:
    fetcher.ask([fetch_of("a", 2, k=2), fetch_of("b", 2, k=3, token=50), fetch_of("c", 1, k=2, token=90)], urgent=True)
    search.gate.set()
    found = inbox.wait_for(4)
    assert sorted(sizes(search)) == [1, 2, 3]  # the first; those that ask for 3; those that ask for 2
    for owner in "abc":
        for answer in found[owner]:
            alone = search.retrieve_chunks([answer.query.tokens], answer.query.num_neighbours)
            assert answer.neighbours.chunk_ids.tolist() == alone.chunk_ids.tolist()
            assert answer.neighbours.tokens.tolist() == alone.tokens.tolist()
            assert answer.neighbours.documents == alone.documents


def test_a_failure_is_of_the_one_that_causes_it(fetcher, search: GatedSearch, inbox: Inbox) -> None:
    search.forbidden = 77
    fetcher.ask([fetch_of("good"), fetch_of("bad", token=77), fetch_of("good too", 2)], urgent=True)
    search.gate.set()
    found = inbox.wait_for(4)
    assert isinstance(found["bad"], RetrievalError)
    assert [len(found[owner]) for owner in ("good", "good too")] == [1, 2]


def test_a_closed_fetcher_delivers_what_is_on_its_way_and_asks_no_more(
    fetcher, search: GatedSearch, inbox: Inbox
) -> None:
    threads = [thread for thread in threading.enumerate() if thread.name == "retro-ray-neighbours"]
    fetcher.ask([fetch_of("too late")], urgent=True)
    fetcher.close()
    search.gate.set()
    assert list(inbox.wait_for(1)) == ["first"]
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert threads
    assert sizes(search) == [1]
