"""The openai package, unmodified, against a replica of a tiny model behind a real server."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from retro_ray.database.store import Database
from retro_ray.generation.engine import GenerationEngine
from retro_ray.generation.request import GenerationRequest, GenerationResult
from retro_ray.generation.sampling import SamplingConfig
from retro_ray.serve.api import ApiSettings, build_api
from retro_ray.serve.keys import KeyRing, parse_keys
from retro_ray.training.checkpoint import load_model
from retro_ray.training.run_folder import run_directory
from tests.unit.serve.tiny_replica import TextHashSearch, listening, new_replica, write_home

KEY = "k" * 32
PROMPT = "alpha beta gamma"
GREEDY = SamplingConfig(temperature=0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    write_home(home)
    return home


@pytest.fixture(scope="module")
def client(home: Path) -> Iterator[openai.OpenAI]:
    api_settings = ApiSettings(keys=KeyRing(parse_keys(f"{KEY} generate", "keys")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retro_ray.generation.fast_model.bf16_is_fast", lambda device: False)
        api = build_api(new_replica(home), settings=api_settings)
    with (
        listening(api) as port,
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def engine(home: Path) -> GenerationEngine:
    """The same model, asked directly."""
    database = Database.open(home)
    model, _, _ = load_model(run_directory(home, "default"))
    search = TextHashSearch(database.manifest.vocab_size, missing_shards=(1,))
    return GenerationEngine(model, database.tokenizer, search)


def expected(engine: GenerationEngine, **settings) -> GenerationResult:
    return engine.generate([GenerationRequest(**{"prompt": PROMPT, "sampling": GREEDY, **settings})])[0]


def test_a_completion(client: openai.OpenAI, engine: GenerationEngine) -> None:
    completion = client.completions.create(model="default", prompt=PROMPT, max_tokens=16, temperature=0)
    result = expected(engine, max_tokens=16)
    [choice] = completion.choices
    assert (choice.text, choice.finish_reason) == (result.text, result.finish_reason)
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == result.num_prompt_tokens
    assert completion.usage.completion_tokens == len(result.token_ids)
    assert (completion.object, completion.model) == ("text_completion", "default")
    # What is ours comes through as well.
    extra = choice.model_extra
    assert extra is not None
    assert [citation["chunk"] for citation in extra["citations"]] == [one.chunk for one in result.citations]
    assert completion._request_id


def test_prompts_of_every_kind(client: openai.OpenAI, engine: GenerationEngine) -> None:
    tokens = engine.tokenizer.encode(PROMPT).tolist()
    alone, several = expected(engine, max_tokens=6).text, [expected(engine, prompt=p, max_tokens=6).text for p in "ab"]

    def texts(prompt, **settings) -> list[str]:
        answer = client.completions.create(model="default", prompt=prompt, max_tokens=6, temperature=0, **settings)
        return [choice.text for choice in answer.choices]

    assert texts(tokens) == texts(PROMPT) == [alone]
    assert texts([tokens, tokens]) == [alone] * 2
    assert texts(["a", "b"]) == several
    assert texts(["a", "b"], n=2) == [several[0]] * 2 + [several[1]] * 2


def test_every_setting(client: openai.OpenAI, engine: GenerationEngine) -> None:
    answer = client.completions.create(
        model="default", prompt=PROMPT, max_tokens=20, temperature=0.9, top_p=0.8, seed=5, n=2, stop=["q", "z"],
        extra_body={"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.2, "retrieval": {"num_neighbours": 1}},
    )  # fmt: skip
    for i, choice in enumerate(answer.choices):
        sampling = SamplingConfig(temperature=0.9, top_p=0.8, seed=5 + i, top_k=50, min_p=0.01, repetition_penalty=1.2)
        result = expected(engine, max_tokens=20, sampling=sampling, stop=("q", "z"), num_neighbours=1)
        assert (choice.text, choice.finish_reason) == (result.text, result.finish_reason)


def test_a_stream(client: openai.OpenAI, engine: GenerationEngine) -> None:
    stream = client.completions.create(
        model="default",
        prompt=PROMPT,
        max_tokens=16,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, usage = list(stream)
    result = expected(engine, max_tokens=16)
    assert "".join(chunk.choices[0].text for chunk in chunks) == result.text
    assert len([chunk for chunk in chunks if chunk.choices[0].text]) > 4
    assert chunks[-1].choices[0].finish_reason == result.finish_reason
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == len(result.token_ids)


def test_a_prompt_is_scored_by_echo(client: openai.OpenAI, engine: GenerationEngine) -> None:
    """As evaluation harnesses ask for it."""
    tokens = engine.tokenizer.encode(PROMPT).tolist()
    for prompt, settings in ((PROMPT, {"prompt": PROMPT}), (tokens, {"prompt": "", "prompt_tokens": tuple(tokens)})):
        answer = client.completions.create(
            model="default", prompt=prompt, max_tokens=0, temperature=0, logprobs=2, echo=True
        )
        [choice] = answer.choices
        result = expected(engine, max_tokens=0, logprobs=2, echo=True, **settings)
        assert choice.text == result.text == PROMPT
        logprobs = choice.logprobs
        assert logprobs is not None
        assert result.logprobs is not None
        assert "".join(logprobs.tokens or ()) == PROMPT
        assert logprobs.token_logprobs == pytest.approx([one.logprob for one in result.logprobs], abs=1e-4)
        assert logprobs.text_offset == [one.text_offset for one in result.logprobs]
        assert logprobs.top_logprobs is not None
        for token, value, top in zip(
            logprobs.tokens or (), logprobs.token_logprobs or (), logprobs.top_logprobs, strict=True
        ):
            assert top[token] == value
            assert 2 <= len(top) <= 3


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    def ask(client: openai.OpenAI = client, **settings) -> None:
        client.completions.create(**{"model": "default", "prompt": "a", **settings})

    with pytest.raises(openai.BadRequestError, match="parameter 'suffix' is not supported") as caught:
        ask(suffix="b")
    assert caught.value.param == "suffix"
    assert caught.value.code == "unsupported_parameter"
    with pytest.raises(openai.BadRequestError, match="the model's context holds 40"):
        ask(max_tokens=41)
    with pytest.raises(openai.BadRequestError, match="the model's context holds 40"):
        ask(max_tokens=41, stream=True)
    with pytest.raises(openai.NotFoundError, match="model 'gpt-4' is not served here"):
        ask(model="gpt-4")
    with pytest.raises(openai.AuthenticationError, match="a valid API key is needed"):
        ask(client.with_options(api_key="x" * 32))
    with pytest.raises(openai.APIStatusError, match="passed after") as late:
        ask(client.with_options(max_retries=2), extra_body={"deadline_s": 1e-6})
    assert late.value.status_code == 408


def test_models(client: openai.OpenAI) -> None:
    [model] = list(client.models.list())
    assert (model.id, model.owned_by) == ("default", "retro_ray")
