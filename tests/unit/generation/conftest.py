from collections.abc import Callable, Iterator

import pytest
import torch

from retro_ray.model.retro import RetroModel
from retro_ray.text.tokenizer import TextTokenizer, train_tokenizer
from tests.fakes import tiny_texts
from tests.unit.generation.fakes import HashSearch, make_model


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Tiny products gain nothing from threads, and on a busy machine threads wait long for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    return train_tokenizer(tiny_texts(10, seed=0), 280, "train:280")


@pytest.fixture
def search(tokenizer: TextTokenizer) -> HashSearch:
    return HashSearch(tokenizer.vocab_size)


@pytest.fixture(scope="session")
def model(tokenizer: TextTokenizer) -> RetroModel:
    return make_model(tokenizer.vocab_size)


@pytest.fixture
def prompt_of(tokenizer: TextTokenizer) -> Callable[[int], str]:
    """A prompt of exactly so many tokens, the start token included."""

    def build(num_tokens: int) -> str:
        # Digits are not in the tokenizer's training texts, so each is a token of its own.
        prompt = "".join(str(i * i % 10) for i in range(num_tokens - 1))
        assert len(tokenizer.encode(prompt)) == num_tokens - 1
        return prompt

    return build
