import itertools

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from retro_ray.generation.neighbours import ChunkQuery, RetrievedChunk
from retro_ray.generation.request import GenerationRequest
from retro_ray.generation.sequence import SequenceState
from retro_ray.text.tokenizer import TextTokenizer
from tests.unit.generation.fakes import CHUNK_LENGTH, HashSearch

M = CHUNK_LENGTH


def state_of(tokenizer: TextTokenizer, prompt: str, **settings) -> SequenceState:
    tokens = [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]
    request = GenerationRequest(prompt=prompt, max_tokens=1000, **settings)
    return SequenceState(request, tokens, tokenizer, chunk_length=M, num_neighbours=2)


def test_text_is_cut_at_the_first_stop_string_wherever_it_starts_in_a_token(tokenizer) -> None:
    state = state_of(tokenizer, "x", stop=("0", "pha b"))
    for token in tokenizer.encode(" alpha beta 0 gamma").tolist():
        state.append(token)
        if state.finish_reason:
            break
    assert state.finish_reason == "stop"
    assert state.text() == " al"
    # It ends with the token that completes the stop string, not later.
    assert tokenizer.decode(state.generated[:-1]) in " alpha b"


def test_a_stop_string_in_the_prompt_stops_nothing(tokenizer) -> None:
    state = state_of(tokenizer, "stop", stop=("stop", "pa"))
    state.append(tokenizer.encode("a")[0])
    assert state.finish_reason is None


@pytest.mark.parametrize(
    "text", ["ab\U0001f600cd\U0001f600\u00e9", "\u4e2d\u6587\u4e2d\u6587\u4e2d", "abcdefghijklmnop"]
)
def test_cited_stretches_cut_no_character_and_lose_none(tokenizer, text: str) -> None:
    search = HashSearch(tokenizer.vocab_size)
    state = state_of(tokenizer, "123")  # with the start token exactly one chunk
    for token in tokenizer.encode(text).tolist():
        if len(state.tokens) % M == 0:
            u = len(state.tokens) // M
            query = ChunkQuery(u, tuple(state.tokens[-M:]), 2, None)
            state.retrieved.append(RetrievedChunk(query, search.retrieve_chunks([query.tokens], 2)))
        state.append(token)
    state.finish("length")
    citations = state.citations()
    assert len(citations) == -(-len(state.generated) // M)
    stretches = [text[citation.text_start : citation.text_end] for citation in citations]
    assert "".join(stretches) == text == state.text()
    assert all(a.text_end == b.text_start for a, b in itertools.pairwise(citations))


def test_a_tokenizer_that_drops_the_first_space_keeps_the_one_after_the_prompt() -> None:
    words = Tokenizer(models.WordLevel({"<s>": 0, "\u2581one": 1, "\u2581two": 2}, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    words.add_special_tokens(["<s>"])
    tokenizer = TextTokenizer(words.to_str(), "words", bos_id=0, eos_id=0)
    assert tokenizer.decode([2, 1]) == "two one"
    state = state_of(tokenizer, "one")
    for token in (2, 1):
        state.append(token)
    assert state.text() == " two one"
    # At the start of a document there is no space to keep.
    state = state_of(tokenizer, "")
    for token in (2, 1):
        state.append(token)
    assert state.text() == "two one"
