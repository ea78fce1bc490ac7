import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from retro_ray.generation.text_stream import TextStream
from retro_ray.text.tokenizer import TextTokenizer, train_tokenizer
from tests.fakes import tiny_texts

BYTE_LEVEL = train_tokenizer(tiny_texts(10, seed=0), 300, "train:300")


def byte_fallback_tokenizer() -> TextTokenizer:
    """As those of Llama and Mistral: words with a mark for the space in front, bytes for all else."""
    vocabulary = {"<s>": 0, "\u2581one": 1, "\u2581two": 2, "x": 3} | {
        f"<0x{byte:02X}>": 4 + byte for byte in range(256)
    }
    words = Tokenizer(models.BPE(vocabulary, [], unk_token="<s>", byte_fallback=True))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    words.add_special_tokens(["<s>"])
    return TextTokenizer(words.to_str(), "words", bos_id=0, eos_id=0)


BYTE_FALLBACK = byte_fallback_tokenizer()


def pieces(tokenizer: TextTokenizer, tokens: list[int]) -> tuple[TextStream, list[str]]:
    """What each token adds, and the flush at the end."""
    stream = TextStream(tokenizer, [tokenizer.bos_id])
    added, so_far = [], ""
    for step in [*(lambda token=token: stream.push(token) for token in tokens), stream.flush]:
        step()
        assert stream.text.startswith(so_far)
        added.append(stream.text[len(so_far) :])
        so_far = stream.text
    return stream, added


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=30))
def test_a_texts_tokens_give_it_back_without_cutting_a_character(text: str) -> None:
    tokens = BYTE_LEVEL.encode(text).tolist()
    stream, added = pieces(BYTE_LEVEL, tokens)
    assert stream.text == "".join(added) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in added)
        assert added[-1] == ""
    assert stream.num_settled == len(tokens)
    assert stream.ends == sorted(stream.ends)
    assert stream.ends[-1:] == [len(text)][: len(tokens)]


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(0, BYTE_LEVEL.vocab_size - 1), max_size=40))
def test_any_tokens_give_the_text_that_they_decode_to_at_once(tokens: list[int]) -> None:
    stream, _ = pieces(BYTE_LEVEL, tokens)
    assert stream.text == BYTE_LEVEL.decode(tokens)


@pytest.mark.parametrize("text", ["\u4e2d\u6587\U0001f600\u00e9x", "\U0001f600" * 5])
def test_bytes_of_a_tokenizer_with_words_become_characters_when_they_are_whole(text: str) -> None:
    tokens = [2, *(4 + byte for byte in text.encode()), 1]
    stream, added = pieces(BYTE_FALLBACK, tokens)
    assert stream.text == f"two{text} one"
    assert not any("\ufffd" in piece for piece in added)


def test_bytes_that_never_make_a_character_do_not_pile_up() -> None:
    stream = TextStream(BYTE_LEVEL, [])
    lead_byte = BYTE_LEVEL.encode("\u4e2d")[0]
    for _ in range(100):
        stream.push(lead_byte)
        assert len(stream.ends) - stream.num_settled <= 10
    assert set(stream.text) == {"\ufffd"}
