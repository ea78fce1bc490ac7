from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from retro_ray.errors import PromptError, RetrievalError
from retro_ray.generation.engine import GenerationEngine
from retro_ray.generation.request import GenerationRequest, GenerationResult
from retro_ray.generation.sampling import SamplingConfig
from retro_ray.model.retro import RetroModel
from retro_ray.text.tokenizer import TextTokenizer
from tests.unit.generation.fakes import CHUNK_LENGTH, HashSearch, make_model

M = CHUNK_LENGTH
GREEDY = SamplingConfig(temperature=0)
PromptOf = Callable[[int], str]


def generate_naively(
    model: RetroModel,
    tokenizer: TextTokenizer,
    search: HashSearch | None,
    prompt: str,
    num_tokens: int,
    k: int,
    query_length: int = M,
) -> list[int]:
    """The definition: for every token, retrieve for all finished chunks and run the full forward pass.

    Chunks that the prompt does not finish are searched for by their first `query_length` tokens.
    """
    tokens = [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]
    num_prompt_tokens = len(tokens)
    while len(tokens) < num_prompt_tokens + num_tokens:
        chunks = [tokens[start : start + M] for start in range(0, len(tokens) - M + 1, M)]
        neighbours = mask = None
        if search is not None and chunks:
            in_prompt = num_prompt_tokens // M
            queries = [chunk if u < in_prompt else chunk[:query_length] for u, chunk in enumerate(chunks)]
            found = search.retrieve_chunks(queries, k)
            neighbours, mask = torch.tensor(found.tokens)[None], torch.tensor(found.mask)[None]
        logits = model(torch.tensor([tokens]), neighbours_BLKR=neighbours, neighbour_mask_BLKR=mask)
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] == tokenizer.eos_id:
            break
    return tokens[num_prompt_tokens:]


@pytest.mark.parametrize("num_neighbours", [1, 2, 3])
@pytest.mark.parametrize("num_prompt_tokens", [1, M - 1, M, M + 1, 2 * M - 1, 2 * M, 3 * M + 2])
def test_greedy_generation_equals_recomputing_everything_for_every_token(
    model, tokenizer, search, prompt_of: PromptOf, num_prompt_tokens: int, num_neighbours: int
) -> None:
    prompt = prompt_of(num_prompt_tokens)
    request = GenerationRequest(prompt=prompt, max_tokens=4 * M, sampling=GREEDY, num_neighbours=num_neighbours)
    [result] = GenerationEngine(model, tokenizer, search).generate([request])
    expected = generate_naively(model, tokenizer, search, prompt, 4 * M, num_neighbours)
    assert list(result.token_ids) == expected
    # Retrieval decides tokens here, so that the equality says something about it.
    assert expected != generate_naively(model, tokenizer, None, prompt, 4 * M, num_neighbours)


@pytest.mark.parametrize("num_prompt_tokens", [1, M - 1, M, M + 3, 2 * M])
def test_prefetch_asks_with_three_quarters_of_a_chunk(
    model, tokenizer, search, prompt_of: PromptOf, num_prompt_tokens: int
) -> None:
    prompt = prompt_of(num_prompt_tokens)
    request = GenerationRequest(prompt=prompt, max_tokens=4 * M, sampling=GREEDY)
    [result] = GenerationEngine(model, tokenizer, search, prefetch=True).generate([request])
    assert list(result.token_ids) == generate_naively(model, tokenizer, search, prompt, 4 * M, 2, 3 * M // 4)
    assert list(result.token_ids) != generate_naively(model, tokenizer, search, prompt, 4 * M, 2)
    tokens = [tokenizer.bos_id, *tokenizer.encode(prompt).tolist(), *result.token_ids]
    for citation in result.citations:
        start = (citation.chunk - 1) * M
        searched = M if citation.chunk * M <= num_prompt_tokens else 3 * M // 4
        assert citation.query == tokenizer.decode(tokens[start : start + searched])


def mixed_requests(prompt_of: PromptOf) -> list[GenerationRequest]:
    return [
        GenerationRequest(prompt="", max_tokens=11, sampling=GREEDY),
        GenerationRequest(prompt=prompt_of(M), max_tokens=14, sampling=SamplingConfig(seed=1)),
        GenerationRequest(prompt=prompt_of(M + 2), max_tokens=1, sampling=SamplingConfig(seed=1)),
        GenerationRequest(prompt=prompt_of(3 * M), max_tokens=9, sampling=SamplingConfig(seed=2, top_p=0.8)),
        GenerationRequest(prompt=prompt_of(M), max_tokens=14, sampling=SamplingConfig(seed=1), retrieval=False),
        GenerationRequest(prompt=prompt_of(5), max_tokens=20, sampling=SamplingConfig(seed=3), num_neighbours=5),
    ]


def test_a_request_gets_in_a_batch_what_it_gets_alone(model, tokenizer, search, prompt_of: PromptOf) -> None:
    engine = GenerationEngine(model, tokenizer, search)
    requests = mixed_requests(prompt_of)
    alone = [engine.generate([request])[0] for request in requests]
    assert engine.generate(requests) == alone
    assert engine.generate(requests[::-1]) == alone[::-1]
    assert engine.generate([]) == []


def test_the_seed_decides_the_tokens(model, tokenizer, search) -> None:
    engine = GenerationEngine(model, tokenizer, search)

    def tokens(seed: int) -> tuple[int, ...]:
        request = GenerationRequest(max_tokens=16, sampling=SamplingConfig(temperature=2.0, seed=seed))
        return engine.generate([request])[0].token_ids

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_retrieval_turned_off_equals_no_retriever(model, tokenizer, search, prompt_of: PromptOf) -> None:
    request = GenerationRequest(prompt=prompt_of(2 * M), max_tokens=2 * M, sampling=GREEDY)
    off = GenerationRequest(prompt=prompt_of(2 * M), max_tokens=2 * M, sampling=GREEDY, retrieval=False)
    [result] = GenerationEngine(model, tokenizer, search).generate([off])
    assert [result] == GenerationEngine(model, tokenizer, None).generate([request])
    assert list(result.token_ids) == generate_naively(model, tokenizer, None, request.prompt, 2 * M, 2)
    assert result.citations == ()
    assert search.calls == []


def test_a_model_without_cca_layers_retrieves_nothing(tokenizer, search, prompt_of: PromptOf) -> None:
    engine = GenerationEngine(make_model(tokenizer.vocab_size, cca_layers=()), tokenizer, search)
    [result] = engine.generate([GenerationRequest(prompt=prompt_of(2 * M), max_tokens=M, sampling=GREEDY)])
    assert len(result.token_ids) == M
    assert search.calls == []


def test_the_prompts_chunks_are_one_retrieval_and_each_later_step_at_most_one(
    model, tokenizer, search, prompt_of: PromptOf
) -> None:
    engine = GenerationEngine(model, tokenizer, search, speculate=0)
    # Lengths 9 and 5 finish a chunk at the same steps; 6 does so one step earlier.
    requests = [GenerationRequest(prompt=prompt_of(n), max_tokens=2 * M, sampling=GREEDY) for n in (9, 5, 6)]
    results = engine.generate(requests)
    assert all(len(result.token_ids) == 2 * M for result in results)
    # Tokens after the last one that is generated are never asked for.
    assert [len(chunks) for chunks, _ in search.calls] == [2 + 1 + 1, 1, 2, 1, 2]
    assert {k for _, k in search.calls} == {model.config.num_neighbours}
    for result, request in zip(results, requests, strict=True):
        tokens = [tokenizer.bos_id, *tokenizer.encode(request.prompt), *result.token_ids]
        finished = [tokens[start : start + M] for start in range(0, len(tokens) - M, M)]
        asked = [chunk for chunks, _ in search.calls for chunk in chunks]
        assert all(chunk in asked for chunk in finished)


def citations_of(
    model, tokenizer, search, prompt: str, max_tokens: int
) -> tuple[GenerationResult, list[tuple[int, int, int]]]:
    request = GenerationRequest(prompt=prompt, max_tokens=max_tokens, sampling=GREEDY)
    [result] = GenerationEngine(model, tokenizer, search).generate([request])
    assert len(result.token_ids) == max_tokens, "the model ended early"
    return result, [(c.chunk, c.first_token, c.last_token) for c in result.citations]


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens", "expected"),
    [
        # (chunk, first, last): the neighbours of chunk u condition the tokens u*m .. (u+1)*m - 1.
        (1, M - 1, []),  # the last token completes a chunk, but nothing follows it
        (1, M, [(1, M, M)]),
        (M, 1, [(1, M, M)]),
        (M + 2, 7, [(1, M + 2, 2 * M - 1), (2, 2 * M, 3 * M - 1), (3, 3 * M, 3 * M)]),
        # Only the prompt's last finished chunk has a say in what is generated first.
        (3 * M + 1, 2, [(3, 3 * M + 1, 3 * M + 2)]),
    ],
)
def test_citations_name_the_chunks_that_conditioned_generated_tokens(
    model, tokenizer, search, prompt_of: PromptOf, num_prompt_tokens: int, max_tokens: int, expected
) -> None:
    _, spans = citations_of(model, tokenizer, search, prompt_of(num_prompt_tokens), max_tokens)
    assert spans == expected


def test_a_citation_holds_what_was_asked_and_what_was_found(model, tokenizer, prompt_of: PromptOf) -> None:
    search = HashSearch(tokenizer.vocab_size, missing_shards=(2, 5))
    prompt = prompt_of(2 * M)
    result, _ = citations_of(model, tokenizer, search, prompt, 3 * M)
    tokens = [tokenizer.bos_id, *tokenizer.encode(prompt).tolist(), *result.token_ids]
    assert [citation.chunk for citation in result.citations] == [2, 3, 4]
    for citation in result.citations:
        chunk = tokens[(citation.chunk - 1) * M : citation.chunk * M]
        assert citation.query == tokenizer.decode(chunk)
        assert citation.missing_shards == (2, 5)
        found = search.retrieve_chunks([chunk], model.config.num_neighbours)
        real = [j for j, document in enumerate(found.documents[0]) if document is not None]
        assert [neighbour.chunk_id for neighbour in citation.neighbours] == found.chunk_ids[0, real].tolist()
        for j, neighbour in zip(real, citation.neighbours, strict=True):
            assert neighbour.document_id == f"doc{neighbour.chunk_id}"
            assert (neighbour.title, neighbour.source, neighbour.distance) == (f"title {j}", "s", j + 0.5)
            words, seen = found.tokens[0, j], found.mask[0, j]
            assert neighbour.text == tokenizer.decode(words[:M])
            assert neighbour.continuation == (tokenizer.decode(words[M:]) if seen[M] else "")
    # The stretches of text are the whole text, one after another.
    assert "".join(result.text[c.text_start : c.text_end] for c in result.citations) == result.text


def test_generation_stops_at_a_stop_string(model, tokenizer, search, prompt_of: PromptOf) -> None:
    engine = GenerationEngine(model, tokenizer, search)
    request = GenerationRequest(prompt=prompt_of(M), max_tokens=20, sampling=GREEDY)
    [free] = engine.generate([request])
    stop = tokenizer.decode(free.token_ids[9:11])
    before = free.text.index(stop)
    request = GenerationRequest(prompt=prompt_of(M), max_tokens=20, sampling=GREEDY, stop=("not there", stop))
    [stopped] = engine.generate([request])
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[:before]
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert len(stopped.token_ids) <= 11
    assert free.finish_reason == "length"


def test_generation_stops_at_the_end_token(model, tokenizer, search, prompt_of: PromptOf) -> None:
    request = GenerationRequest(prompt=prompt_of(M), max_tokens=20, sampling=GREEDY)
    [free] = GenerationEngine(model, tokenizer, search).generate([request])
    at = next(i for i, token in enumerate(free.token_ids) if token not in free.token_ids[:i] and i > M)
    _, (content, name, bos_id, _) = tokenizer.__reduce__()
    ending = TextTokenizer(content, name, bos_id, eos_id=free.token_ids[at])
    [ended] = GenerationEngine(model, ending, search).generate([request])
    assert ended.finish_reason == "stop"
    assert ended.token_ids == free.token_ids[: at + 1]


def test_a_request_beyond_the_context_names_the_limit_and_both_numbers(model, tokenizer, search, prompt_of) -> None:
    engine = GenerationEngine(model, tokenizer, search)
    context = model.config.context_length
    [result] = engine.generate([GenerationRequest(prompt=prompt_of(context - 2), max_tokens=2, sampling=GREEDY)])
    assert len(result.token_ids) == 2
    with pytest.raises(PromptError, match=rf"the prompt has {context - 2} tokens .* max_tokens is 3.* holds {context}"):
        engine.start(GenerationRequest(prompt=prompt_of(context - 2), max_tokens=3))


def test_prompts_as_text_and_as_tokens_are_alike(model, tokenizer, search, prompt_of: PromptOf) -> None:
    engine = GenerationEngine(model, tokenizer, search)
    prompt = prompt_of(M + 2)
    tokens = tuple(tokenizer.encode(prompt).tolist())
    as_text = GenerationRequest(prompt=prompt, max_tokens=2 * M, sampling=GREEDY)
    as_tokens = [replace(as_text, prompt="", prompt_tokens=given) for given in (tokens, (tokenizer.bos_id, *tokens))]
    expected = engine.generate([as_text])[0]
    assert engine.generate(as_tokens) == [expected, expected]
    assert engine.generate([replace(as_tokens[0], prompt_tokens=())]) == engine.generate([replace(as_text, prompt="")])


@pytest.mark.parametrize("token", [-1, 280])
def test_a_token_that_the_model_does_not_know_is_named(model, tokenizer, token: int) -> None:
    assert model.config.vocab_size == 280
    with pytest.raises(PromptError, match=f"the prompt has token {token}; the model's tokens are 0 to 279"):
        GenerationEngine(model, tokenizer, None).start(GenerationRequest(prompt_tokens=(1, token)))


def test_an_echo_begins_with_the_prompt(model, tokenizer, search, prompt_of: PromptOf) -> None:
    engine = GenerationEngine(model, tokenizer, search)
    request = GenerationRequest(prompt=prompt_of(2 * M + 1), max_tokens=2 * M, sampling=GREEDY, stop=("65",))
    [plain, echoed] = engine.generate([request, replace(request, echo=True)])
    assert echoed.text == request.prompt + plain.text
    assert "65" in request.prompt
    assert echoed.token_ids == plain.token_ids
    for mine, theirs in zip(echoed.citations, plain.citations, strict=True):
        assert theirs.text_end is not None
        assert mine.text_start == theirs.text_start + len(request.prompt)
        assert mine.text_end == theirs.text_end + len(request.prompt)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1, or 0 together with echo"),
        ({"prompt": "a", "prompt_tokens": (1,)}, "both prompt and prompt_tokens are given"),
        ({"max_tokens": -1, "echo": True}, "max_tokens is -1"),
        ({"stop": ("a", "")}, "stop has an empty string"),
        ({"logprobs": 6}, "logprobs is 6; it must be from 0 to 5"),
        ({"deadline_s": 0.0}, "deadline_s is 0.0; it must be above 0"),
        ({"num_neighbours": 0}, "num_neighbours is 0; it must be from 1 to"),
        ({"num_neighbours": 65}, "num_neighbours is 65; it must be from 1 to"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        GenerationRequest(**settings)


def test_a_failed_retrieval_is_not_swallowed(model, tokenizer, search, prompt_of: PromptOf, monkeypatch) -> None:
    def fail(chunks, k):
        raise RetrievalError("shard 1 did not answer")

    engine = GenerationEngine(model, tokenizer, search)
    monkeypatch.setattr(search, "retrieve_chunks", fail)
    with pytest.raises(RetrievalError, match="shard 1 did not answer"):
        engine.generate([GenerationRequest(prompt=prompt_of(2), max_tokens=M, sampling=GREEDY)])
