from __future__ import annotations

from pydoc_data import topics

import pytest

from retro_ray.text.tokenizer import TextTokenizer, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    """A small byte-level BPE, trained on real English."""
    return train_tokenizer(sorted(topics.topics.values())[:20], 1024, "train:1024")
