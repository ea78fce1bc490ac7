import asyncio
from unittest import mock

import pytest

from retro_ray.commands.generate import as_text, print_as_it_comes
from retro_ray.generation.engine import GenerationEngine
from retro_ray.generation.request import GenerationRequest
from retro_ray.generation.sampling import SamplingConfig
from retro_ray.text.tokenizer import train_tokenizer
from tests.fakes import tiny_texts
from tests.unit.generation.fakes import HashSearch, make_model


@pytest.fixture
def engine() -> GenerationEngine:
    tokenizer = train_tokenizer(tiny_texts(10, seed=0), 280, "train:280")
    return GenerationEngine(make_model(tokenizer.vocab_size), tokenizer, HashSearch(tokenizer.vocab_size))


def test_text_is_printed_as_it_comes(engine: GenerationEngine, capsys: pytest.CaptureFixture) -> None:
    request = GenerationRequest(prompt="a prompt", max_tokens=12, sampling=SamplingConfig(seed=1))
    expected = engine.generate([request])  # and all is compiled by then, which prints, too
    with mock.patch("builtins.print", wraps=print) as printed:
        result = asyncio.run(print_as_it_comes(engine, request))
    assert [result] == expected
    assert capsys.readouterr().out == result.text + "\n"
    assert printed.call_count > 3
    assert all(call.kwargs.get("flush") for call in printed.call_args_list[:-1])


def test_every_stretch_is_shown_with_its_neighbours(engine: GenerationEngine) -> None:
    request = GenerationRequest(prompt="a prompt", max_tokens=12, sampling=SamplingConfig(seed=1))
    [result] = engine.generate([request])
    shown = as_text("a prompt", result)
    assert shown.startswith("a prompt" + result.text)
    assert shown.count("was conditioned on") == len(result.citations) > 1
    for citation in result.citations:
        for neighbour in citation.neighbours:
            assert f"{neighbour.title} [{neighbour.document_id}], distance {neighbour.distance:.2f}" in shown
