"""A replica of a real, tiny model, without HTTP."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch

from retro_ray.database.store import Database
from retro_ray.errors import MismatchError, OverloadedError, PromptError, RetrievalError
from retro_ray.generation.engine import GenerationEngine
from retro_ray.generation.events import Finished
from retro_ray.generation.request import GenerationRequest, GenerationResult
from retro_ray.generation.sampling import SamplingConfig
from retro_ray.serve.replica import Replica
from retro_ray.training.checkpoint import load_model
from retro_ray.training.run_folder import run_directory
from tests.fakes import write_tiny_database
from tests.unit.generation.fakes import CHUNK_LENGTH, make_model
from tests.unit.serve.tiny_replica import Instruments, TextHashSearch, new_replica, write_home, write_run

GREEDY = SamplingConfig(temperature=0)
REQUEST = GenerationRequest(prompt="alpha beta", max_tokens=20, sampling=GREEDY)


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a batch gives what one gives alone."""
    monkeypatch.setattr("retro_ray.generation.fast_model.bf16_is_fast", lambda device: False)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    write_home(home)
    return home


@asynccontextmanager
async def started(home: Path, instruments: Instruments | None = None, **settings) -> AsyncGenerator[Replica, None]:
    replica = new_replica(home, instruments, **settings)
    await replica.start()
    try:
        yield replica
    finally:
        await replica.close()


async def generated(replica: Replica, request: GenerationRequest) -> GenerationResult:
    async for event in replica.stream(request):
        if isinstance(event, Finished):
            return event.result
    raise AssertionError("it did not finish")


def expected_of(home: Path, request: GenerationRequest, *, prefetch: bool = False) -> GenerationResult:
    """By the newest checkpoint, alone."""
    database = Database.open(home)
    model, _, _ = load_model(run_directory(home, "default"))
    search = TextHashSearch(database.manifest.vocab_size, missing_shards=(1,))
    return GenerationEngine(model, database.tokenizer, search, prefetch=prefetch).generate([request])[0]


async def soon(is_so) -> None:
    for _ in range(3000):
        if is_so():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came")


@pytest.mark.parametrize("prefetch", [False, True])
def test_it_generates_what_the_engine_does(home: Path, prefetch: bool) -> None:
    async def run() -> None:
        async with started(home, prefetch=prefetch) as replica:
            results = await asyncio.gather(*(generated(replica, REQUEST) for _ in range(3)))
        assert results == [expected_of(home, REQUEST, prefetch=prefetch)] * 3
        assert results[0].citations[0].missing_shards == (1,)

    asyncio.run(run())


def test_it_says_what_it_serves(home: Path) -> None:
    async def run() -> None:
        async with started(home, refresh_s=0.01) as replica:
            model = replica.model()
            assert (model.name, model.checkpoint_step, model.context_length) == ("default", 3, 10 * CHUNK_LENGTH)
            assert model.database_version == Database.open(home).manifest.version
            assert replica.problems() == []
            with pytest.raises(PromptError, match="the model's context holds 40"):
                replica.check(GenerationRequest(prompt="a", max_tokens=41))
        assert replica.problems() == ["the replica is shutting down"]

    asyncio.run(run())


def test_it_is_not_ready_while_the_database_does_not_answer(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        async with started(home, refresh_s=0.01) as replica:
            search = replica._search
            assert isinstance(search, TextHashSearch)
            search.error = RetrievalError("shard 1 did not answer")
            await soon(lambda: replica.problems() == ["shard 1 did not answer"])
            await asyncio.sleep(0.1)
            search.error = None
            await soon(lambda: replica.problems() == [])

    asyncio.run(run())
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == ["not ready: shard 1 did not answer"]  # once, however often it looks


def test_a_failure_beside_the_requests_is_told_to_who_can_replace_the_replica(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        async with started(home, refresh_s=0.01) as replica:
            replica.check_alive()
            search = replica._search
            assert isinstance(search, TextHashSearch)
            search.error = KeyError("a bug")
            await soon(lambda: "a background task of the replica has ended" in caplog.text)
            with pytest.raises(RuntimeError, match="has ended"):
                replica.check_alive()

    asyncio.run(run())


def test_texts_are_searched_for_as_chunks_are(home: Path) -> None:
    async def run() -> None:
        async with started(home) as replica:
            two = await replica.retrieve(["alpha", "beta"], None, None)
            [one] = await replica.retrieve(["beta"], 5, "overlap")
        search = TextHashSearch(Database.open(home).manifest.vocab_size)
        for found, expected in zip(
            [*two, one],
            [
                search.retrieve_texts(["alpha"], 2),
                search.retrieve_texts(["beta"], 2),
                search.retrieve_texts(["beta"], 5, "overlap"),
            ],
            strict=True,
        ):
            ids = [number for number in expected.chunk_ids[0].tolist() if number >= 0]
            assert [neighbour.chunk_id for neighbour in found.neighbours] == ids
            assert [neighbour.document_id for neighbour in found.neighbours] == [f"doc{number}" for number in ids]
            assert found.missing_shards == (1,)

    asyncio.run(run())


def test_more_retrievals_than_may_wait_are_refused_at_once(home: Path) -> None:
    async def run() -> None:
        async with started(home, max_queued=2) as replica:
            searches = [replica.retrieve(["alpha"], None, None) for _ in range(9)]
            outcomes = await asyncio.gather(*searches, return_exceptions=True)
            refused = [outcome for outcome in outcomes if isinstance(outcome, OverloadedError)]
            assert len(refused) == 9 - 4 - 2
            assert len(await replica.retrieve(["alpha"], None, None)) == 1  # and later ones are not

    asyncio.run(run())


def test_a_new_checkpoint_is_taken_up_between_requests_that_go_on(tmp_path: Path) -> None:
    write_home(tmp_path, num_chunks=100)
    long = GenerationRequest(prompt="alpha beta", max_tokens=300, sampling=GREEDY)
    before = expected_of(tmp_path, long)
    assert len(before.token_ids) == 300
    other = make_model(Database.open(tmp_path).manifest.vocab_size, num_chunks=100)
    with torch.no_grad():
        for weights in other.parameters():
            weights.neg_()

    async def run() -> None:
        async with started(tmp_path, refresh_s=0.01) as replica:
            events = replica.stream(long)
            first = await anext(events)
            write_run(tmp_path, other, 4)
            await soon(lambda: replica.model().checkpoint_step == 4)
            last = [first, *[event async for event in events]][-1]
            assert isinstance(last, Finished)
            assert last.result == before
            assert await generated(replica, REQUEST) == expected_of(tmp_path, REQUEST)

    asyncio.run(run())


def test_a_checkpoint_of_another_tokenizer_is_not_taken_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    database = write_home(tmp_path)
    model = make_model(database.manifest.vocab_size, num_chunks=10)

    async def run() -> None:
        async with started(tmp_path, refresh_s=0.01) as replica:
            write_run(tmp_path, model, 4, tokenizer_fingerprint="feedfeedfeedfeed")
            await soon(lambda: "step-00000004 is not taken up" in caplog.text)
            assert replica.model().checkpoint_step == 3
            assert len((await generated(replica, REQUEST)).token_ids) == 20

    asyncio.run(run())


def test_a_model_that_cannot_read_the_database_is_refused_at_the_start(tmp_path: Path) -> None:
    database = write_tiny_database(tmp_path, chunk_length=CHUNK_LENGTH)
    write_run(tmp_path, make_model(database.manifest.vocab_size), 1, tokenizer_fingerprint="feedfeedfeedfeed")
    with pytest.raises(MismatchError):
        new_replica(tmp_path)


def test_figures_are_kept_up_to_date(home: Path) -> None:
    instruments = Instruments()

    async def run() -> None:
        async with started(home, instruments, refresh_s=0.01, max_cached_tokens=500) as replica:
            await generated(replica, REQUEST)
            await asyncio.sleep(0.05)

    asyncio.run(run())
    assert instruments["generated_tokens"].values == [20]
    assert set(instruments["cache_size_tokens"].values) == {500}
    assert instruments["batch_size"].values[-1] == instruments["queued_completions"].values[-1] == 0
    assert instruments["retrieved_chunks"].values
    assert set(instruments["missing_shards"].values) == {1}


@pytest.mark.parametrize("drain_s", [0.0, 60.0])
def test_what_runs_at_the_end_is_drained_or_marked(tmp_path: Path, drain_s: float) -> None:
    write_home(tmp_path, num_chunks=100)
    long = GenerationRequest(prompt="alpha beta", max_tokens=300, sampling=GREEDY)

    async def run() -> None:
        replica = new_replica(tmp_path, drain_s=drain_s)
        await replica.start()
        events = replica.stream(long)
        seen = [await anext(events)]
        closing = asyncio.create_task(replica.close())
        await soon(lambda: bool(replica.problems()))
        with pytest.raises(OverloadedError):
            await until_refused(replica)
        seen += [event async for event in events]
        await closing
        last = seen[-1]
        assert isinstance(last, Finished)
        assert last.result.finish_reason == ("length" if drain_s else "cancelled")

    asyncio.run(run())


async def until_refused(replica: Replica) -> None:
    """Asks again and again; the replica may need a moment to close its door."""
    for _ in range(1000):
        await generated(replica, GenerationRequest(prompt="a", max_tokens=1, sampling=GREEDY))
        await asyncio.sleep(0.005)
