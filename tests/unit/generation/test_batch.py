"""What a batch does may not show in anybody's answer."""

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_ray.generation.batch import DecodingBatch, slot_size
from retro_ray.generation.engine import GenerationEngine
from retro_ray.generation.events import TextDelta
from retro_ray.generation.neighbours import RetrievedChunk
from retro_ray.generation.request import GenerationRequest, GenerationResult
from retro_ray.generation.sampling import SamplingConfig
from retro_ray.generation.sequence import SequenceState
from retro_ray.text.tokenizer import train_tokenizer
from tests.fakes import tiny_texts
from tests.unit.generation.fakes import CHUNK_LENGTH, HashSearch, make_model

M = CHUNK_LENGTH
NUM_TOKENS = 262


@functools.cache
def float32_engine(prefetch: bool, cca_start: str = "copy") -> GenerationEngine:
    tokenizer = train_tokenizer(tiny_texts(10, seed=0), NUM_TOKENS, f"train:{NUM_TOKENS}")
    torch.manual_seed(0)  # whether an answer ends at once depends on the weights
    model = make_model(tokenizer.vocab_size, cca_start=cca_start).float()
    return GenerationEngine(model, tokenizer, HashSearch(tokenizer.vocab_size), prefetch=prefetch)


@functools.cache
def alone(request: GenerationRequest, prefetch: bool, cca_start: str = "copy") -> GenerationResult:
    return without_logprobs(float32_engine(prefetch, cca_start).generate([request])[0])


def without_logprobs(result: GenerationResult) -> GenerationResult:
    """They differ in their last bits with the order in which a sum is taken; tokens may not."""
    return replace(result, logprobs=None)


REQUESTS = st.builds(
    GenerationRequest,
    prompt_tokens=st.lists(st.integers(1, NUM_TOKENS - 1), max_size=3 * M).map(tuple),
    max_tokens=st.integers(1, 3 * M),
    sampling=st.builds(
        SamplingConfig,
        temperature=st.sampled_from([0.0, 0.7, 1.5]),
        top_k=st.sampled_from([0, 20]),
        repetition_penalty=st.sampled_from([1.0, 1.4]),
        seed=st.integers(0, 3),
    ),
    logprobs=st.sampled_from([None, 2]),
    echo=st.booleans(),
    retrieval=st.booleans(),
    num_neighbours=st.sampled_from([None, 1, 4]),
)


def answered(engine: GenerationEngine, state: SequenceState) -> list[RetrievedChunk]:
    return engine.retrieve(state.take_queries())


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    requests=st.lists(REQUESTS, min_size=1, max_size=6),
    prefetch=st.booleans(),
    cca_start=st.sampled_from(["paper", "copy"]),
)
def test_whoever_comes_and_goes_whenever_neighbours_arrive(
    seed: int, requests: Sequence[GenerationRequest], prefetch: bool, cca_start: str
) -> None:
    fate = random.Random(seed)
    engine = float32_engine(prefetch, cca_start)
    expected = [alone(request, prefetch, cca_start) for request in requests]
    states = [engine.start(request) for request in requests]
    batch = DecodingBatch(engine.model, max_batch_size=fate.randint(1, 4))
    # Just enough for the largest, or more.
    needed = max(slot_size(engine.model.config, state.max_length, state.num_neighbours) for state in states)
    memory = needed * fate.randint(1, 4)
    queued, given_up = list(states), set()
    on_their_way: list[tuple[SequenceState, list[RetrievedChunk]]] = []
    while queued or batch.active:
        for state in [*queued, *batch.active]:
            if found := answered(engine, state):
                on_their_way.append((state, found))
        ready = [state for state in queued if not state.is_waiting]
        joining = ready[: fate.randint(0, 3)]
        while joining and not batch.fits(joining, memory):
            joining.pop()
        if joining:
            batch.admit(joining, memory)
            queued = [state for state in queued if state not in joining]
        elif not batch.step() and on_their_way:
            state, found = on_their_way.pop(fate.randrange(len(on_their_way)))
            state.retrieved += found
        if len(batch.active) > 1 and fate.random() < 0.1:
            given_up.add(states.index(batch.active[0]))
            batch.remove(batch.active[0])
        assert batch.num_cached_tokens <= memory
        if fate.random() < 0.1:
            batch.release()
    for number, state in enumerate(states):
        if number not in given_up:
            assert without_logprobs(state.result()) == expected[number]


@pytest.mark.parametrize("cca_start", ["paper", "copy"])
def test_a_request_with_neighbours_joins_one_without(cca_start: str) -> None:
    """As where a page asks for both side by side."""
    engine = float32_engine(False, cca_start)
    shared = {"max_tokens": 3 * M, "sampling": SamplingConfig(temperature=0)}
    requests = [
        GenerationRequest(prompt_tokens=tuple(range(1, 6)), retrieval=False, **shared),
        GenerationRequest(prompt_tokens=tuple(range(1, 3 * M)), **shared),
    ]
    states, batch = [engine.start(request) for request in requests], DecodingBatch(engine.model, max_batch_size=2)
    for state in states:
        state.retrieved += answered(engine, state)
        batch.admit([state], 1000)
        batch.step()
    while batch.active:
        for state in states:
            state.retrieved += answered(engine, state)
        batch.step()
    assert [without_logprobs(state.result()) for state in states] == [alone(r, False, cca_start) for r in requests]


@settings(max_examples=40, deadline=None)
@given(
    request=REQUESTS,
    stops=st.lists(st.tuples(st.integers(0, 10), st.integers(1, 4)), min_size=1, max_size=3),
    pace=st.integers(1, 3),
)
def test_events_show_no_part_of_a_stop_string_and_add_up(
    request: GenerationRequest, stops: Sequence[tuple[int, int]], pace: int
) -> None:
    """Stop strings are taken from the text that comes without them; events may be asked for late."""
    engine = float32_engine(prefetch=False)
    request = replace(request, logprobs=1)
    generated = engine.tokenizer.decode(alone(request, False).token_ids)
    found = tuple(text for at, length in stops if (text := generated[at : at + length]) and "\ufffd" not in text)
    request = replace(request, stop=(*found, "not in it"))
    state = engine.start(request)
    state.retrieved += answered(engine, state)
    batch = DecodingBatch(engine.model, max_batch_size=1)
    batch.admit([state], 1000)
    events, turn = [], 0
    while batch.active:
        if turn % pace == 0:
            events += state.take_events()
        state.retrieved += answered(engine, state)
        batch.step()
        turn += 1
    events += state.take_events()
    assert state.take_events() == []
    deltas = [event for event in events if isinstance(event, TextDelta)]
    result = state.result()
    assert "".join(delta.text for delta in deltas) == result.text
    assert sum((delta.token_ids for delta in deltas), ()) == result.token_ids
    assert sum((delta.logprobs or () for delta in deltas), ()) == result.logprobs
    own_text = result.text[len(engine.tokenizer.decode(request.prompt_tokens or ())) if request.echo else 0 :]
    assert not any(stop in own_text for stop in request.stop)
    assert (result.finish_reason == "stop") == (
        any(stop in engine.tokenizer.decode(result.token_ids) for stop in found)
        or result.token_ids[-1] == engine.tokenizer.eos_id
    )


@pytest.mark.parametrize("cca_start", ["paper", "copy"])
def test_a_cache_without_neighbours_serves_requests_without_retrieval(cca_start: str) -> None:
    engine = float32_engine(False, cca_start)
    request = GenerationRequest(prompt="12345", max_tokens=9, retrieval=False, sampling=SamplingConfig(seed=0))
    other = replace(request, retrieval=True)
    assert engine.generate([request]) == engine.generate([request, other])[:1]


def test_the_cache_grows_by_doubling_and_gives_back() -> None:
    engine = float32_engine(prefetch=False)
    batch = DecodingBatch(engine.model, max_batch_size=4)
    sizes = []
    states = [
        engine.start(GenerationRequest(prompt_tokens=(7, 8), max_tokens=n, retrieval=False)) for n in (5, 6, 14, 3)
    ]
    for state in states:
        batch.admit([state], 1000)
        sizes.append(batch.num_cached_tokens)
    # 8 and 9 tokens with the start of the document, then 17; the last one finds room.
    assert sizes == [4 * 8, 4 * 16, 4 * 32, 4 * 32]
    batch.remove(states[2])
    batch.release()
    assert batch.num_cached_tokens == 3 * 9
    for state in (states[0], states[1], states[3]):
        batch.remove(state)
    batch.release()
    assert batch.num_cached_tokens == 0


def test_neighbours_count_by_the_layers_that_keep_them() -> None:
    """Keys and values in two of three layers; the pointer's keys."""
    config = float32_engine(prefetch=False).model.config
    assert slot_size(config, 20, 0) == 20
    assert slot_size(config, 20, 3) == 20 + math.ceil(3 * 2 * M * 2.5 / 3)
    without = replace(config, pointer=False)
    assert slot_size(without, 20, 3) == 20 + math.ceil(3 * 2 * M * 2 / 3)
