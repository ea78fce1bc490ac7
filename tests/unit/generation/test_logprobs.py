"""Log-probabilities in answers, against the full forward pass."""

from dataclasses import replace

import pytest
import torch

from retro_ray.generation import batch
from retro_ray.generation.engine import GenerationEngine
from retro_ray.generation.request import GenerationRequest, GenerationResult
from retro_ray.generation.sampling import SamplingConfig
from retro_ray.text.tokenizer import TextTokenizer
from tests.unit.generation.fakes import CHUNK_LENGTH, HashSearch

M = CHUNK_LENGTH


def reference_logprobs(model, search: HashSearch, tokens: list[int]) -> torch.Tensor:
    """[T, V]: row t is of the token at t + 1."""
    chunks = [tokens[start : start + M] for start in range(0, len(tokens) - M + 1, M)]
    found = search.retrieve_chunks(chunks, model.config.num_neighbours)
    logits = model(
        torch.tensor([tokens]),
        neighbours_BLKR=torch.tensor(found.tokens)[None],
        neighbour_mask_BLKR=torch.tensor(found.mask)[None],
    )
    return logits[0].float().log_softmax(-1).detach()


def assert_scored(model, tokenizer: TextTokenizer, search, tokens: list[int], result: GenerationResult, num_top: int):
    """The result's log-probabilities are those of the last of `tokens`."""
    assert result.logprobs is not None
    first = len(tokens) - len(result.logprobs)
    reference_TV = reference_logprobs(model, search, tokens)
    for position, entry in enumerate(result.logprobs, start=first):
        assert entry.token_id == tokens[position]
        if position == 0:
            assert (entry.logprob, entry.top) == (None, ())
            continue
        row_V = reference_TV[position - 1]
        assert entry.logprob == pytest.approx(float(row_V[tokens[position]]), abs=1e-5)
        expected = row_V.topk(num_top)
        assert [value for _, value in entry.top] == pytest.approx(expected.values.tolist(), abs=1e-5)
        assert [text for text, _ in entry.top] == [tokenizer.decode([token]) for token in expected.indices]
    assert "".join(entry.text for entry in result.logprobs) == result.text
    for entry in result.logprobs:
        assert result.text[entry.text_offset :].startswith(entry.text)


@pytest.mark.parametrize("num_top", [0, 3])
@pytest.mark.parametrize("echo", [False, True])
def test_logprobs_are_those_of_the_model_whatever_the_sampling(
    model, tokenizer, search, prompt_of, num_top: int, echo: bool
) -> None:
    sampling = SamplingConfig(seed=5, temperature=0.3, top_k=9, repetition_penalty=2.0)
    request = GenerationRequest(
        prompt=prompt_of(3 * M + 1), max_tokens=2 * M, sampling=sampling, logprobs=num_top, echo=echo
    )
    [result] = GenerationEngine(model, tokenizer, search).generate([request])
    prompt = tokenizer.encode(request.prompt).tolist()
    assert len(result.logprobs or ()) == len(result.token_ids) + echo * len(prompt)
    assert result.text.startswith(request.prompt) == echo
    assert_scored(model, tokenizer, search, [tokenizer.bos_id, *prompt, *result.token_ids], result, num_top)


@pytest.mark.parametrize("num_prompt_tokens", [1, 2, M, M + 1, 2 * M, 9 * M + 2])
@pytest.mark.parametrize("begins_document", [False, True])
def test_a_prompt_is_scored_without_a_token_being_generated(
    model, tokenizer, num_prompt_tokens: int, begins_document: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As lm-evaluation-harness asks: the entries are those of the tokens that were sent."""
    monkeypatch.setattr(batch, "_SCORED_TOGETHER", 5)
    search = HashSearch(tokenizer.vocab_size)
    generator = torch.Generator().manual_seed(num_prompt_tokens)
    given = torch.randint(1, tokenizer.vocab_size, (num_prompt_tokens,), generator=generator).tolist()
    given[0] = tokenizer.bos_id if begins_document else given[0]
    request = GenerationRequest(prompt_tokens=tuple(given), max_tokens=0, echo=True, logprobs=2)
    [result] = GenerationEngine(model, tokenizer, search).generate([request])
    assert (result.token_ids, result.finish_reason, result.citations) == ((), "length", ())
    assert [entry.token_id for entry in result.logprobs or ()] == given
    assert result.num_prompt_tokens == num_prompt_tokens + (not begins_document)
    assert result.text == tokenizer.decode(given)
    tokens = given if begins_document else [tokenizer.bos_id, *given]
    assert_scored(model, tokenizer, HashSearch(tokenizer.vocab_size), tokens, result, 2)
    # One generated token, which that harness asks for and drops, changes nothing about the prompt.
    [longer] = GenerationEngine(model, tokenizer, search).generate(
        [replace(request, max_tokens=1, sampling=SamplingConfig(temperature=0))]
    )
    assert [entry.logprob for entry in (longer.logprobs or ())[:-1]] == [e.logprob for e in result.logprobs or ()]


def test_tokens_after_a_stop_string_began_have_no_text(model, tokenizer, search, prompt_of) -> None:
    engine = GenerationEngine(model, tokenizer, search)
    request = GenerationRequest(prompt=prompt_of(M), max_tokens=20, sampling=SamplingConfig(temperature=0), logprobs=1)
    [free] = engine.generate([request])
    stop = free.text[5:8]
    [stopped] = engine.generate([replace(request, stop=(stop,))])
    assert stopped.finish_reason == "stop"
    assert len(stopped.logprobs or ()) == len(stopped.token_ids)
    assert "".join(entry.text for entry in stopped.logprobs or ()) == stopped.text == free.text[: free.text.index(stop)]
