import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import replace
from typing import Any

import pytest

from retro_ray.errors import DeadlineError, OverloadedError, PromptError, RetrievalError
from retro_ray.generation.engine import GenerationEngine
from retro_ray.generation.events import Finished, GenerationEvent, Retrieved, TextDelta
from retro_ray.generation.request import GenerationRequest
from retro_ray.generation.sampling import SamplingConfig
from retro_ray.generation.scheduler import GenerationScheduler
from retro_ray.model.retro import RetroModel
from tests.unit.generation.fakes import CHUNK_LENGTH, GatedSearch, HashSearch, make_model

M = CHUNK_LENGTH
GREEDY = SamplingConfig(temperature=0)
PromptOf = Callable[[int], str]
# No test ends by time; where something hangs, this says so.
PATIENCE_S = 60


@pytest.fixture
def gated(tokenizer) -> Iterator[GatedSearch]:
    search = GatedSearch(tokenizer.vocab_size)
    yield search
    search.gate.set()


def run(main: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(main, PATIENCE_S))


@contextlib.asynccontextmanager
async def scheduling(engine: GenerationEngine, **settings) -> AsyncIterator[GenerationScheduler]:
    scheduler = GenerationScheduler(engine, **settings)
    try:
        yield scheduler
    finally:
        await asyncio.to_thread(scheduler.close)


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.001)


async def events_of(scheduler: GenerationScheduler, request: GenerationRequest) -> list[GenerationEvent]:
    return [event async for event in scheduler.stream(request)]


def mixed_requests(prompt_of: PromptOf) -> list[GenerationRequest]:
    return [
        GenerationRequest(prompt="", max_tokens=11, sampling=GREEDY),
        GenerationRequest(prompt=prompt_of(M), max_tokens=14, sampling=SamplingConfig(seed=1), echo=True),
        GenerationRequest(prompt=prompt_of(M + 2), max_tokens=1, sampling=SamplingConfig(seed=1)),
        GenerationRequest(prompt=prompt_of(3 * M), max_tokens=9, sampling=SamplingConfig(seed=2, top_p=0.8)),
        GenerationRequest(prompt=prompt_of(M), max_tokens=14, sampling=SamplingConfig(seed=1), retrieval=False),
        GenerationRequest(prompt=prompt_of(5), max_tokens=20, sampling=SamplingConfig(seed=3), num_neighbours=5),
        GenerationRequest(prompt=prompt_of(9), max_tokens=0, echo=True),
        GenerationRequest(
            prompt_tokens=(7, 8, 9),
            max_tokens=9,
            sampling=SamplingConfig(seed=4, repetition_penalty=1.5, min_p=0.01, top_k=40),
        ),
    ]


@pytest.mark.parametrize("speculate", [0, 8])
def test_every_request_gets_what_it_gets_alone(model, tokenizer, search, prompt_of: PromptOf, speculate: int) -> None:
    engine = GenerationEngine(model, tokenizer, search, speculate=speculate)
    requests = mixed_requests(prompt_of)
    alone = [engine.generate([request])[0] for request in requests]

    async def main() -> None:
        async with scheduling(engine, max_batch_size=3) as scheduler:
            assert await asyncio.gather(*map(scheduler.generate, requests)) == alone
            assert await asyncio.gather(*map(scheduler.generate, requests[::-1])) == alone[::-1]
            stats = scheduler.stats()
            assert (stats.queued, stats.active, stats.requests_failed) == (0, 0, 0)
            assert stats.requests_finished == 2 * len(requests)
            assert stats.tokens_generated == 2 * sum(len(result.token_ids) for result in alone)
            assert stats.prompt_tokens == 2 * sum(result.num_prompt_tokens for result in alone)
            # Every token but the first of a request is one sequence's part in one step, if it was not drafted.
            num_first = 2 * sum(bool(result.token_ids) for result in alone)
            num_drafted = stats.tokens_generated - num_first - stats.batch_size_sum
            assert num_drafted > 0 if speculate else num_drafted == 0
            assert stats.batch_size_sum / 3 <= stats.num_steps < stats.batch_size_sum
            assert 0 <= stats.retrieval_hidden_share <= 1
            assert min(stats.retrieval_s, stats.prefill_s, stats.decode_s) > 0

    run(main())


def test_the_events_are_the_result_in_pieces(model, tokenizer, prompt_of: PromptOf) -> None:
    engine = GenerationEngine(model, tokenizer, HashSearch(tokenizer.vocab_size, missing_shards=(3,)))
    requests = [replace(request, logprobs=i % 3) for i, request in enumerate(mixed_requests(prompt_of))]

    async def main() -> None:
        async with scheduling(engine) as scheduler:
            for events in await asyncio.gather(*(events_of(scheduler, request) for request in requests)):
                assert isinstance(events[-1], Finished)
                result = events[-1].result
                deltas = [event for event in events[:-1] if isinstance(event, TextDelta)]
                assert "".join(delta.text for delta in deltas) == result.text
                assert sum((delta.token_ids for delta in deltas), ()) == result.token_ids
                assert sum((delta.logprobs or () for delta in deltas), ()) == result.logprobs
                retrieved = [event.citation for event in events[:-1] if isinstance(event, Retrieved)]
                assert retrieved == [replace(c, last_token=None, text_end=None) for c in result.citations]
                # Neighbours are told of before the text that they condition.
                for citation in retrieved:
                    before = events[: events.index(Retrieved(citation=citation))]
                    text = "".join(event.text for event in before if isinstance(event, TextDelta))
                    assert len(text) <= citation.text_start
            stats = scheduler.stats()
            assert stats.missing_shards == (3,)
            assert stats.partial_answers > 0

    run(main())


@pytest.mark.parametrize("num_prompt_tokens", [1, 2 * M])
def test_a_request_that_waits_for_neighbours_holds_up_no_other(
    model, tokenizer, gated: GatedSearch, prompt_of: PromptOf, num_prompt_tokens: int
) -> None:
    """In the middle of its text, or with its prompt."""
    engine = GenerationEngine(model, tokenizer, gated)
    waits = GenerationRequest(prompt=prompt_of(num_prompt_tokens), max_tokens=2 * M, sampling=GREEDY)
    others = [replace(waits, retrieval=False, sampling=SamplingConfig(seed=seed)) for seed in range(3)]

    async def main() -> None:
        async with scheduling(engine, max_batch_size=2) as scheduler:
            waiting = asyncio.create_task(scheduler.generate(waits))
            await asyncio.to_thread(gated.was_asked.wait)
            results = await asyncio.gather(*map(scheduler.generate, others))
            assert not waiting.done()
            gated.gate.set()
            result = await waiting
            assert [result, *results] == [engine.generate([request])[0] for request in (waits, *others)]

    run(main())


def test_neighbours_wanted_meanwhile_are_one_call(model, tokenizer, gated: GatedSearch, prompt_of: PromptOf) -> None:
    engine = GenerationEngine(model, tokenizer, gated)
    requests = [
        GenerationRequest(prompt="", max_tokens=M, sampling=SamplingConfig(temperature=2.0, seed=seed))
        for seed in range(4)
    ]

    async def main() -> None:
        async with scheduling(engine) as scheduler:
            first = asyncio.create_task(scheduler.generate(GenerationRequest(prompt=prompt_of(2 * M), max_tokens=1)))
            await asyncio.to_thread(gated.was_asked.wait)
            tasks = [asyncio.create_task(scheduler.generate(request)) for request in requests]
            # Each has read its start token and generated all but the last of the chunk's tokens.
            await until(lambda: scheduler.stats().tokens_generated == 4 * (M - 1))
            gated.gate.set()
            await asyncio.gather(first, *tasks)
            assert [len(chunks) for chunks, _ in gated.calls] == [2, 4]

    run(main())


def test_only_sequences_that_decode_are_computed(
    model, tokenizer, search, prompt_of: PromptOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    decode_tokens = RetroModel.decode_tokens

    def spy(self, tokens_N, *args, **kwargs):
        sizes.append(len(tokens_N))
        return decode_tokens(self, tokens_N, *args, **kwargs)

    monkeypatch.setattr(RetroModel, "decode_tokens", spy)
    engine = GenerationEngine(model, tokenizer, search, speculate=0)
    requests = [GenerationRequest(prompt=prompt_of(3), max_tokens=n, sampling=GREEDY) for n in (2, 8, 5)]

    async def main() -> None:
        async with scheduling(engine) as scheduler:
            await asyncio.gather(*map(scheduler.generate, requests))
            assert sum(sizes) == scheduler.stats().batch_size_sum == 1 + 7 + 4

    run(main())


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_a_request_given_up_frees_its_slot(model, tokenizer, gated: GatedSearch, prompt_of: PromptOf, how: str) -> None:
    engine = GenerationEngine(model, tokenizer, gated)
    # One whose first token is text by itself, so that there is an event before neighbours are wanted.
    stops = next(
        request
        for seed in range(100)
        for request in [GenerationRequest(prompt="", max_tokens=3 * M, sampling=SamplingConfig(seed=seed))]
        if engine.generate([replace(request, max_tokens=1)])[0].text.isascii()
    )

    async def main() -> None:
        async with scheduling(engine, max_batch_size=1) as scheduler:
            events = scheduler.stream(stops)
            if how == "close":
                assert isinstance(await anext(events), TextDelta)
                await events.aclose()
            else:
                task = asyncio.create_task(events_of(scheduler, stops))
                await asyncio.to_thread(gated.was_asked.wait)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            # The only slot is free, although the neighbours never came.
            result = await scheduler.generate(GenerationRequest(prompt=prompt_of(3), max_tokens=2, retrieval=False))
            assert len(result.token_ids) == 2
            stats = scheduler.stats()
            assert (stats.active, stats.queued, stats.requests_failed, stats.requests_finished) == (0, 0, 1, 1)

    run(main())


def test_more_requests_than_may_wait_are_refused_at_once(model, tokenizer, gated: GatedSearch) -> None:
    engine = GenerationEngine(model, tokenizer, gated)
    request = GenerationRequest(prompt="", max_tokens=2 * M, sampling=GREEDY)

    async def main() -> None:
        async with scheduling(engine, max_batch_size=1, max_queued=2) as scheduler:
            tasks = [asyncio.create_task(scheduler.generate(request))]
            await asyncio.to_thread(gated.was_asked.wait)
            tasks += [asyncio.create_task(scheduler.generate(request)) for _ in range(2)]
            await until(lambda: scheduler.stats().queued == 2)
            with pytest.raises(OverloadedError, match="2 requests wait already, max_queued is 2") as refused:
                await scheduler.generate(request)
            assert refused.value.retry_after_s >= 1
            gated.gate.set()
            assert len({result.token_ids for result in await asyncio.gather(*tasks)}) == 1

    run(main())


@pytest.mark.parametrize("max_batch_size", [1, 2])
def test_a_deadline_ends_a_request_that_is_decoded_or_queued(
    model, tokenizer, gated: GatedSearch, max_batch_size: int
) -> None:
    engine = GenerationEngine(model, tokenizer, gated)
    waits = GenerationRequest(prompt="", max_tokens=2 * M, sampling=GREEDY)

    async def main() -> None:
        async with scheduling(engine, max_batch_size=max_batch_size) as scheduler:
            first = asyncio.create_task(scheduler.generate(waits))
            await asyncio.to_thread(gated.was_asked.wait)
            with pytest.raises(DeadlineError, match=rf"deadline_s = 0.02 passed after \d+ of {2 * M} tokens"):
                await scheduler.generate(replace(waits, deadline_s=0.02))
            stats = scheduler.stats()
            assert (stats.active, stats.queued, stats.requests_failed) == (1, 0, 1)
            gated.gate.set()
            assert await first == engine.generate([waits])[0]

    run(main())


def test_a_failed_retrieval_ends_the_request_concerned_alone(
    model, tokenizer, gated: GatedSearch, prompt_of: PromptOf
) -> None:
    engine = GenerationEngine(model, tokenizer, gated)
    gated.forbidden = 200
    fails = GenerationRequest(prompt_tokens=(200,) * M, max_tokens=3)
    works = GenerationRequest(prompt=prompt_of(M), max_tokens=3, sampling=GREEDY)

    async def main() -> None:
        async with scheduling(engine) as scheduler:
            tasks = [asyncio.create_task(scheduler.generate(request)) for request in (works, fails, works)]
            await until(lambda: scheduler.stats().queued == 3)
            gated.gate.set()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(results[1], RetrievalError)
            assert results[0] == results[2] == engine.generate([works])[0]
            assert scheduler.stats().active == 0

    run(main())


def test_an_error_while_decoding_leaves_nobody_waiting(
    model, tokenizer, search, prompt_of: PromptOf, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    engine = GenerationEngine(model, tokenizer, search)
    requests = [GenerationRequest(prompt=prompt_of(3), max_tokens=5, sampling=GREEDY)] * 5

    def broken(*args, **kwargs):
        raise ZeroDivisionError("the weights are gone")

    async def main() -> None:
        async with scheduling(engine, max_batch_size=2) as scheduler:
            with monkeypatch.context() as patch:
                patch.setattr(RetroModel, "decode_tokens", broken)
                results = await asyncio.gather(*map(scheduler.generate, requests), return_exceptions=True)
            for result in results:
                assert isinstance(result, RuntimeError)
                assert isinstance(result.__cause__, ZeroDivisionError)
            assert "the weights are gone" in caplog.text
            # And those that come later are served.
            assert await scheduler.generate(requests[0]) == engine.generate(requests[:1])[0]

    run(main())


def test_requests_in_progress_finish_on_the_engine_they_began_with(
    model, tokenizer, gated: GatedSearch, search
) -> None:
    old = GenerationEngine(model, tokenizer, gated)
    new = GenerationEngine(make_model(tokenizer.vocab_size, num_layers=4), tokenizer, search)
    request = GenerationRequest(prompt="", max_tokens=3 * M, sampling=GREEDY)
    context = model.config.context_length

    async def main() -> None:
        async with scheduling(old, max_batch_size=3, max_cached_tokens=2 * context) as scheduler:
            first = asyncio.create_task(scheduler.generate(request))
            await asyncio.to_thread(gated.was_asked.wait)
            scheduler.replace_engine(new)
            results = await asyncio.gather(*(scheduler.generate(request) for _ in range(3)))
            assert not first.done()
            assert scheduler.stats().cached_tokens <= 2 * context
            gated.gate.set()
            of_old = await first
            assert results == new.generate([request]) * 3
            assert [of_old] == old.generate([request])
            assert of_old != results[0]
            # The old one's memory is given back.
            await scheduler.generate(request)
            assert list(scheduler._decoding._lanes) == [new]

    run(main())


def test_memory_is_bounded_and_what_does_not_fit_waits(model, tokenizer, search, prompt_of: PromptOf) -> None:
    engine = GenerationEngine(model, tokenizer, search)
    requests = mixed_requests(prompt_of)
    alone = [engine.generate([request])[0] for request in requests]
    most = 0

    async def main() -> None:
        nonlocal most
        async with scheduling(engine, max_cached_tokens=64) as scheduler:

            async def watched(awaitable: Awaitable) -> Any:
                nonlocal most
                result = await awaitable
                most = max(most, scheduler.stats().cached_tokens)
                return result

            assert await asyncio.gather(*(watched(scheduler.generate(request)) for request in requests)) == alone
            # 37 tokens alone would fit, but not with the neighbours that two of three layers and the pointer keep.
            huge = GenerationRequest(prompt=prompt_of(30), max_tokens=7, num_neighbours=6)
            with pytest.raises(PromptError, match="take the memory of 77 tokens, max_cached_tokens is 64"):
                await scheduler.generate(huge)
            with pytest.raises(PromptError, match="take the memory of 77 tokens"):
                scheduler.check(huge)

    run(main())
    assert 32 < most <= 64


def test_close_lets_requests_finish(model, tokenizer, search, prompt_of: PromptOf) -> None:
    engine = GenerationEngine(model, tokenizer, search)
    request = GenerationRequest(prompt=prompt_of(3), max_tokens=20, sampling=GREEDY)

    async def main() -> None:
        scheduler = GenerationScheduler(engine, max_batch_size=1)
        tasks = [asyncio.create_task(scheduler.generate(request)) for _ in range(3)]
        await until(lambda: scheduler.stats().tokens_generated > 0)
        await asyncio.to_thread(scheduler.close, PATIENCE_S)
        assert await asyncio.gather(*tasks) == engine.generate([request]) * 3
        with pytest.raises(OverloadedError, match="shutting down"):
            await scheduler.generate(request)

    run(main())


def test_close_marks_what_it_cuts_short(model, tokenizer, gated: GatedSearch) -> None:
    engine = GenerationEngine(model, tokenizer, gated)
    request = GenerationRequest(prompt="", max_tokens=20, sampling=GREEDY)

    async def main() -> None:
        scheduler = GenerationScheduler(engine, max_batch_size=1)
        active = asyncio.create_task(events_of(scheduler, request))
        await asyncio.to_thread(gated.was_asked.wait)
        queued = asyncio.create_task(scheduler.generate(request))
        await until(lambda: scheduler.stats().queued == 1)
        await asyncio.to_thread(scheduler.close)
        events = await active
        assert isinstance(events[-1], Finished)
        assert events[-1].result.finish_reason == "cancelled"
        gated.gate.set()
        [whole] = engine.generate([request])
        assert events[-1].result.token_ids == whole.token_ids[: M - 1]
        assert "".join(event.text for event in events if isinstance(event, TextDelta)) == events[-1].result.text
        with pytest.raises(OverloadedError, match="shut down before"):
            await queued

    run(main())


def test_a_client_whose_loop_is_gone_disturbs_nobody(model, tokenizer, search, prompt_of: PromptOf) -> None:
    engine = GenerationEngine(model, tokenizer, search)
    request = GenerationRequest(prompt=prompt_of(3), max_tokens=20, sampling=GREEDY)
    scheduler = GenerationScheduler(engine)
    left_open = []

    async def leave() -> None:
        left_open.append(scheduler.stream(replace(request, max_tokens=30)))
        await anext(left_open[0])

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    loop.close()

    async def main() -> None:
        assert await scheduler.generate(request) == engine.generate([request])[0]
        await until(lambda: scheduler.stats().active == 0)

    run(main())
    scheduler.close()


def test_a_requests_rerank_reaches_retrieval(model, tokenizer, gated: GatedSearch, search, prompt_of: PromptOf) -> None:
    gated.gate.set()
    requests = [
        GenerationRequest(prompt=prompt_of(M), max_tokens=1, rerank=rerank) for rerank in (None, "none", "overlap")
    ]
    GenerationEngine(model, tokenizer, gated).generate(requests)
    assert gated.reranks == [None, "none", "overlap"]
    with pytest.raises(PromptError, match="rerank is 'overlap'; this retriever does not rerank"):
        GenerationEngine(model, tokenizer, search).start(requests[2])


def test_threads_end_with_their_scheduler(model, tokenizer, search) -> None:
    before = set(threading.enumerate())
    scheduler = GenerationScheduler(GenerationEngine(model, tokenizer, search))
    started = set(threading.enumerate()) - before
    assert {thread.name for thread in started} == {"retro-ray-decoding"}  # the other starts when there is work
    asyncio.run(scheduler.generate(GenerationRequest(max_tokens=1)))
    started = set(threading.enumerate()) - before
    assert {thread.name for thread in started} == {"retro-ray-decoding", "retro-ray-neighbours"}
    scheduler.close()
    for thread in started:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
