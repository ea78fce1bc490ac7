import asyncio
from collections.abc import AsyncGenerator

import numpy as np
import pytest

from retro_ray.errors import DeadlineError
from retro_ray.generation.events import GenerationEvent
from retro_ray.generation.request import GenerationRequest
from retro_ray.retrieval.retriever import NeighbourSet
from retro_ray.serve.metrics import MeasuredSearch, ServiceMetrics
from tests.unit.serve.fakes import EchoService
from tests.unit.serve.tiny_replica import Instruments, TextHashSearch

REQUEST = GenerationRequest(prompt="ab")


@pytest.fixture
def instruments() -> Instruments:
    return Instruments()


@pytest.fixture
def metrics(instruments: Instruments) -> ServiceMetrics:
    return ServiceMetrics(instruments)


def outcomes(instruments: Instruments) -> list[str]:
    return [tags["outcome"] for tags in instruments["completions"].tags if tags]


def test_a_completion_is_counted_and_timed(metrics: ServiceMetrics, instruments: Instruments) -> None:
    async def run() -> list[GenerationEvent]:
        return [event async for event in metrics.measured(EchoService().stream(REQUEST))]

    async def plain() -> list[GenerationEvent]:
        return [event async for event in EchoService().stream(REQUEST)]

    assert asyncio.run(run()) == asyncio.run(plain())
    assert outcomes(instruments) == ["length"]
    assert instruments["prompt_tokens"].values == [3]
    assert instruments["generated_tokens"].values == [3]
    [first], [between] = instruments["time_to_first_token_seconds"].values, instruments["time_per_token_seconds"].values
    assert first > 0
    assert between > 0


def test_what_ends_early_is_told_apart(metrics: ServiceMetrics, instruments: Instruments) -> None:
    failing, endless = EchoService(), EchoService()
    failing.late_error = DeadlineError("deadline_s = 1 passed")
    endless.never_ends = True

    async def run() -> None:
        with pytest.raises(DeadlineError):
            await drained(metrics.measured(failing.stream(REQUEST)))
        events = metrics.measured(endless.stream(REQUEST))
        await anext(events)
        await events.aclose()
        assert endless.num_open == 0  # closing it closes what it measures

    asyncio.run(run())
    assert outcomes(instruments) == ["DeadlineError", "disconnected"]
    assert instruments["generated_tokens"].values == []


async def drained(events: AsyncGenerator[GenerationEvent, None]) -> None:
    async for _ in events:
        pass


def test_retrieval_is_timed_and_its_gaps_are_shown(metrics: ServiceMetrics, instruments: Instruments) -> None:
    plain = TextHashSearch(300)
    whole, partial = (MeasuredSearch(search, metrics) for search in (plain, TextHashSearch(300, missing_shards=(1, 4))))

    def same(a: NeighbourSet, b: NeighbourSet) -> bool:
        return np.array_equal(a.chunk_ids, b.chunk_ids)

    assert same(whole.retrieve_chunks([[1, 2], [3]], 5), plain.retrieve_chunks([[1, 2], [3]], 5))
    assert same(whole.retrieve_texts(["a"], 5, "overlap"), plain.retrieve_texts(["a"], 5, "overlap"))
    assert not same(whole.retrieve_texts(["a"], 5), plain.retrieve_texts(["a"], 5, "overlap"))
    partial.retrieve_texts(["a"], 2)
    assert instruments["retrieved_chunks"].values == [2, 1, 1, 1]
    assert len(instruments["retrieval_seconds"].values) == 4
    assert instruments["missing_shards"].values == [0, 0, 0, 2]
    assert instruments["partial_retrievals"].values == [1]
