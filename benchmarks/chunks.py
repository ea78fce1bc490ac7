"""Real chunks to measure on: texts of 64 tokens, as the index job embeds them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from retro_ray.config import CorpusConfig
from retro_ray.text.chunking import chunk_document, chunk_texts
from retro_ray.text.corpus import Document, plan_units
from retro_ray.text.readers import read_unit
from retro_ray.text.tokenizer import train_tokenizer

_VOCAB_SIZE = 16_384
_TOKENIZER_DOCUMENTS = 3_000


@dataclass(frozen=True)
class SampleChunks:
    """Chunks drawn at random from a corpus."""

    texts: list[str]
    num_tokens: int
    """Real tokens of all of them."""


def read_documents(inputs: tuple[str, ...]) -> Iterator[Document]:
    """All documents of a corpus, in order."""
    config = CorpusConfig(input=inputs)
    for unit in plan_units(config):
        yield from (record for record in read_unit(unit, config) if isinstance(record, Document))


def sample_chunks(inputs: tuple[str, ...], num_chunks: int, seed: int = 0) -> SampleChunks:
    """`num_chunks` chunks of 64 tokens from random documents of a corpus."""
    documents = list(itertools.islice(read_documents(inputs), _TOKENIZER_DOCUMENTS))
    tokenizer = train_tokenizer((document.text for document in documents), _VOCAB_SIZE, f"train:{_VOCAB_SIZE}")
    texts: list[str] = []
    lengths: list[int] = []
    for number in np.random.default_rng(seed).permutation(len(documents)):
        chunked = chunk_document(documents[number], tokenizer, 64)
        texts += chunk_texts(chunked, tokenizer)
        lengths += chunked.lengths.tolist()
        if len(texts) >= num_chunks:
            break
    return SampleChunks(texts[:num_chunks], sum(lengths[:num_chunks]))
