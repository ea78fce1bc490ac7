"""Drafts guess well what is repeated, and show in nobody's answer."""

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_ray.database.store import DocumentRef
from retro_ray.generation.drafts import Drafter
from retro_ray.generation.engine import GenerationEngine
from retro_ray.generation.neighbours import ChunkQuery, RetrievedChunk
from retro_ray.generation.request import GenerationRequest, GenerationResult
from retro_ray.generation.sampling import SamplingConfig, token_probabilities
from retro_ray.model.retro import RetroModel
from retro_ray.retrieval.retriever import NeighbourSet
from retro_ray.text.tokenizer import train_tokenizer
from tests.fakes import tiny_texts
from tests.unit.generation.fakes import CHUNK_LENGTH, HashSearch, make_model

M = CHUNK_LENGTH
NUM_TOKENS = 262


def found(*texts: Sequence[int]) -> NeighbourSet:
    """Neighbours of one query with these tokens."""
    tokens = np.zeros((1, len(texts), max(map(len, texts))), np.int64)
    mask = np.zeros(tokens.shape, bool)
    for k, text in enumerate(texts):
        tokens[0, k, : len(text)], mask[0, k, : len(text)] = text, True
    ids = np.arange(len(texts))[None]
    documents = (tuple(DocumentRef(id="d", title="t", source="s") for _ in texts),)
    return NeighbourSet(ids.astype(np.float32), ids, tokens, mask, documents)


def retrieved(*chunks: NeighbourSet) -> list[RetrievedChunk]:
    return [RetrievedChunk(ChunkQuery(u, (), 1, None), neighbours) for u, neighbours in enumerate(chunks, start=1)]


def draft(tokens: Sequence[int], *chunks: NeighbourSet, most: int = 4) -> list[int]:
    drafter = Drafter(max_tokens=8)
    for _ in range(30):
        drafter.learn(1, 1)
    return drafter.draft(tokens, retrieved(*chunks), most)


def test_the_longest_match_decides() -> None:
    assert draft([1, 2, 3], found([9, 3, 4], [7, 2, 3, 5, 6], [3, 8])) == [5, 6]
    assert draft([1, 2, 3], found([2, 3, 4]), found([1, 2, 3, 5, 6, 7])) == [5, 6, 7]


def test_of_equal_matches_the_newest_chunks_nearest_neighbour_is_taken() -> None:
    assert draft([3], found([3, 4]), found([3, 5], [3, 6])) == [5]


def test_a_draft_ends_where_its_text_does() -> None:
    assert draft([1, 2], found([1, 2, 5], [8, 8, 8, 8])) == [5]
    assert draft([1, 2], found([1, 2], [2, 7])) == [7]
    assert draft([1, 2], found([1, 2])) == []
    assert draft([1, 2]) == []


def test_a_text_that_repeats_itself_is_continued_as_often_as_it_takes() -> None:
    assert draft([5, 1, 2, 1, 2, 1, 2], most=5) == [1, 2, 1, 2, 1]
    assert draft([5, 1, 2, 8, 9, 1, 2]) == [8, 9, 1, 2]
    # A single word says little about what follows; and what was read comes first.
    assert draft([5, 1, 2, 8, 2]) == []
    assert draft([1, 2, 3, 4, 1, 2], found([1, 2, 7, 7, 7])) == [7, 7, 7]


def test_a_draft_is_as_long_as_its_match_and_what_was_learnt_allow() -> None:
    text = found(list(range(1, 60)))
    drafter = Drafter(max_tokens=6)
    assert drafter.draft([7], retrieved(text), 9) == [8]
    assert drafter.draft([7, 2, 3, 4], retrieved(text), 9) == [5, 6, 7]
    assert drafter.draft([7, 2, 3, 4], retrieved(text), 2) == [5, 6]
    for _ in range(30):
        drafter.learn(3, 3)
    assert drafter.draft([7, 2, 3, 4, 5], retrieved(text), 9) == [6, 7, 8, 9, 10, 11]
    for _ in range(30):
        drafter.learn(3, 0)
    assert drafter.draft([7, 2, 3, 4, 5], retrieved(text), 9) == []
    # Long enough a match is tried again.
    assert len(drafter.draft([*range(1, 41)], retrieved(text), 9)) == 0
    drafter.learn(0, 0)
    drafter.learn(5, 1)
    drafter.learn(5, 4)
    assert len(drafter.draft([*range(1, 41)], retrieved(text), 9)) > 0


class KnownAnswer:
    """One neighbour per chunk: the text that is going to be, from that chunk on."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = list(tokens)

    def retrieve_chunks(self, chunks: Sequence[Sequence[int]], k: int) -> NeighbourSet:
        [chunk] = chunks
        length = len(chunk)
        start, *_ = [i for i in range(0, len(self._tokens), length) if self._tokens[i : i + length] == list(chunk)]
        return found(*[(self._tokens + [0] * 2 * length)[start : start + 2 * length]] * k)


@functools.cache
def engine_parts() -> tuple:
    tokenizer = train_tokenizer(tiny_texts(10, seed=0), NUM_TOKENS, f"train:{NUM_TOKENS}")
    return make_model(tokenizer.vocab_size), tokenizer


def count_passes(engine: GenerationEngine, request: GenerationRequest) -> tuple[GenerationResult, int]:
    with pytest.MonkeyPatch.context() as patch:
        passes, decode_tokens = [], RetroModel.decode_tokens

        def spy(self, tokens_N, *args, **kwargs):
            passes.append(len(tokens_N))
            return decode_tokens(self, tokens_N, *args, **kwargs)

        patch.setattr(RetroModel, "decode_tokens", spy)
        [result] = engine.generate([request])
    return result, len(passes)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_that_was_retrieved_is_read_several_tokens_at_a_time(temperature: float) -> None:
    _, tokenizer = engine_parts()
    chunk_length = 16
    model = make_model(tokenizer.vocab_size, chunk_length=chunk_length, pointer=False)
    with torch.no_grad():  # so that what is retrieved does not change what is going to be
        for layer in model.layers:
            if layer.cca is not None:
                layer.cca.out.weight.zero_()
    sampling = SamplingConfig(temperature=temperature, repetition_penalty=3, seed=3)
    request = GenerationRequest(prompt="123456789012345", max_tokens=4 * chunk_length, sampling=sampling)
    [expected] = GenerationEngine(model, tokenizer, None, speculate=0).generate([request])
    said = [tokenizer.bos_id, *tokenizer.encode(request.prompt).tolist(), *expected.token_ids]
    result, num_passes = count_passes(GenerationEngine(model, tokenizer, KnownAnswer(said)), request)
    assert result.token_ids == expected.token_ids
    assert num_passes < len(result.token_ids) / 3


REQUESTS = st.builds(
    GenerationRequest,
    # Of few different tokens, so that there is something to guess.
    prompt_tokens=st.lists(st.integers(200, 203), max_size=3 * M).map(tuple),
    max_tokens=st.integers(1, 4 * M),
    sampling=st.builds(
        SamplingConfig,
        temperature=st.sampled_from([0.0, 0.3, 1.0]),
        top_k=st.sampled_from([0, 2, 20]),
        top_p=st.sampled_from([1.0, 0.9]),
        min_p=st.sampled_from([0.0, 0.1]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        seed=st.integers(0, 3),
    ),
    retrieval=st.booleans(),
    logprobs=st.sampled_from([None, 2]),
)


@settings(max_examples=40, deadline=None)
@given(requests=st.lists(REQUESTS, min_size=1, max_size=4), speculate=st.integers(1, 12), prefetch=st.booleans())
def test_drafts_show_in_nobodys_answer(requests: Sequence[GenerationRequest], speculate: int, prefetch: bool) -> None:
    """Greedy and sampled, alone and in a batch: with the same random numbers, the same tokens."""
    model, tokenizer = engine_parts()
    search = HashSearch(tokenizer.vocab_size)
    with_drafts, without = (
        GenerationEngine(model, tokenizer, search, prefetch=prefetch, speculate=n) for n in (speculate, 0)
    )
    for actual, expected in zip(with_drafts.generate(requests), without.generate(requests), strict=True):
        assert replace(actual, logprobs=None) == replace(expected, logprobs=None)
        for one, other in zip(actual.logprobs or (), expected.logprobs or (), strict=True):
            assert one.logprob == pytest.approx(other.logprob)


def test_tokens_are_as_likely_as_without_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over many seeds the frequencies are the model's own, whatever is guessed: by chi-square."""
    model, tokenizer = engine_parts()
    sampling = SamplingConfig(temperature=4, top_k=3)
    prompt = (tokenizer.bos_id, 200, 201)

    def probabilities_after(*tokens: int) -> dict[int, float]:
        likely_V = token_probabilities(model(torch.tensor([prompt + tokens]))[0, -1], sampling)
        return {int(token): likely_V[token] for token in np.flatnonzero(likely_V)}

    expected = {
        (first, second): p * q
        for first, p in probabilities_after().items()
        for second, q in probabilities_after(first).items()
    }
    guess = list(max(expected, key=lambda pair: expected[pair]))
    monkeypatch.setattr(
        Drafter, "draft", lambda self, tokens, retrieved, most: guess[len(tokens) - len(prompt) :][:most]
    )
    engine = GenerationEngine(model, tokenizer, None)
    counts, num_answers = dict.fromkeys(expected, 0), 500
    requests = [
        GenerationRequest(prompt_tokens=prompt, max_tokens=3, sampling=replace(sampling, seed=seed))
        for seed in range(num_answers)
    ]
    for start in range(0, num_answers, 10):
        for result in engine.generate(requests[start : start + 10]):
            counts[result.token_ids[:2]] += 1
    statistic = sum((counts[pair] - num_answers * p) ** 2 / (num_answers * p) for pair, p in expected.items())
    assert len(expected) == 9
    assert statistic < 26.1  # of 8 degrees of freedom, exceeded once in a thousand
