"""Text that no database holds is scored as the validation split is, and continuations as the text that they are of."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_ray.database.store import Database
from retro_ray.errors import InputError
from retro_ray.evaluation.bits_per_byte import score_documents
from retro_ray.evaluation.own_text import (
    NeighbourSearch,
    count_document_words,
    count_words,
    document_tokens,
    first_neighbours,
    write_own_text,
)
from retro_ray.evaluation.text_scorer import TextScorer
from retro_ray.model.retro import RetroModel
from retro_ray.text.chunking import chunk_document
from tests.fakes import tiny_run_config, tiny_texts
from tests.unit.building.editing import CHUNK_LENGTH, NUM_NEIGHBOURS, HashEmbedder, document, write_database
from tests.unit.model.models import random_model

HELD_OUT = [document(f"held out {i}", text) for i, text in enumerate(tiny_texts(8, seed=5, max_words=60))]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Database:
    documents = [document(f"d{number}") for number in range(12)]
    return write_database(tmp_path_factory.mktemp("home"), documents, validation=HELD_OUT)


@pytest.fixture(scope="module")
def model(database: Database) -> RetroModel:
    return random_model(tiny_run_config(database).model, dtype=torch.float32).eval()


def scorer(model: RetroModel, database: Database, **options) -> TextScorer:
    return TextScorer(model, database, HashEmbedder, **{"precision": "fp32", **options})


def test_own_text_is_written_as_a_build_writes_the_validation_split(database: Database, tmp_path) -> None:
    chunked = [chunk_document(one, database.tokenizer, CHUNK_LENGTH) for one in HELD_OUT]
    search = NeighbourSearch(database, HashEmbedder())
    text = write_own_text(tmp_path, iter(chunked), database, search, num_neighbours=5)
    mine, stored = text.open(CHUNK_LENGTH), database.validation
    assert stored is not None
    assert text.neighbours is not None
    rows = np.arange(stored.num_chunks)
    for read in ("tokens", "lengths", "num_bytes", "document_of"):
        np.testing.assert_array_equal(getattr(mine, read)(rows), getattr(stored, read)(rows))
    np.testing.assert_array_equal(mine.keys, stored.keys)
    np.testing.assert_array_equal(mine.document_num_bytes, stored.document_num_bytes)
    found = first_neighbours(text.neighbours, 5)(rows)
    assert found.shape == (len(rows), 5)  # more than the database stores
    np.testing.assert_array_equal(found[:, :NUM_NEIGHBOURS], stored.neighbours.column("chunk_ids"))


def test_no_documents_are_an_error(database: Database, tmp_path) -> None:
    with pytest.raises(InputError, match="no documents to score"):
        write_own_text(tmp_path, [], database, None)


@pytest.mark.parametrize("mode", ["on", "off", "random"])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_texts_have_the_nats_of_the_same_documents_in_the_validation_split(
    database: Database, model: RetroModel, mode, batch_size: int
) -> None:
    store = database.validation
    assert store is not None
    assert store.document_num_chunks.max() > 2 * model.config.num_chunks  # several windows
    want = [
        score_documents(model, store, database, [number], mode=mode, precision="fp32", batch_size=1).nats
        for number in range(store.num_documents)
    ]
    found = scorer(model, database, mode=mode, batch_size=batch_size).score_texts([one.text for one in HELD_OUT])
    assert found.tolist() == pytest.approx([-nats for nats in want], rel=1e-6)


def test_retrieval_changes_the_score(database: Database, model: RetroModel) -> None:
    texts = [one.text for one in HELD_OUT]
    on, off = (scorer(model, database, mode=mode).score_texts(texts).sum() for mode in ("on", "off"))
    assert on != pytest.approx(off, rel=1e-3)
    none = scorer(model, database, mode="on", num_neighbours=0).score_texts(texts).sum()
    assert none == pytest.approx(off, rel=1e-6)


def test_texts_without_a_token_and_no_texts(database: Database, model: RetroModel) -> None:
    assert scorer(model, database).score_texts(["", "alpha"])[0] == 0
    assert scorer(model, database).score_texts([]).tolist() == []
    assert scorer(model, database).score_continuations([]) == []


@settings(max_examples=10)
@given(data=st.data())
def test_a_continuation_is_what_the_whole_has_more_than_its_context(
    database: Database, model: RetroModel, data: st.DataObject
) -> None:
    """log p(context, continuation) = log p(context) + log p(continuation | context), wherever the cut is."""
    text = data.draw(st.sampled_from([one.text for one in HELD_OUT]))
    tokens = database.tokenizer.encode(text).tolist()
    cut = data.draw(st.integers(0, len(tokens)))
    mine = scorer(model, database)
    (whole, _), (rest, _) = mine.score_continuations([([], tokens), (tokens[:cut], tokens[cut:])])
    assert whole == pytest.approx(mine.score_texts([text])[0], rel=1e-5)
    # A context that ends within a window is read with the stride of its own end: compared where there is one window.
    if len(tokens) < model.config.context_length:
        (context, _) = mine.score_continuations([([], tokens[:cut])])[0]
        assert rest == pytest.approx(whole - context, rel=1e-4, abs=1e-4)


def test_a_start_token_that_is_there_is_not_put_in_front_again(database: Database, model: RetroModel) -> None:
    tokens, bos = database.tokenizer.encode(HELD_OUT[3].text).tolist(), database.tokenizer.bos_id
    without, with_start = scorer(model, database).score_continuations([([], tokens), ([bos], tokens)])
    assert without == with_start


def test_what_generates_greedily_is_likeliest(database: Database, model: RetroModel) -> None:
    """Token by token the likeliest one, by the scorer's own word; then one that is not."""
    mine = scorer(model, database)
    context = database.tokenizer.encode("alpha beta").tolist()
    vocabulary = range(database.manifest.vocab_size)
    greedy: list[int] = []
    for _ in range(2):
        answers = mine.score_continuations([([*context, *greedy], [token]) for token in vocabulary])
        assert sum(is_likeliest for _, is_likeliest in answers) == 1
        assert np.exp([nats for nats, _ in answers]).sum() == pytest.approx(1, rel=1e-4)
        greedy.append(int(np.argmax([nats for nats, _ in answers])))
    assert mine.score_continuations([(context, greedy)])[0][1]
    worse = [*greedy[:-1], (greedy[-1] + 1) % database.manifest.vocab_size]
    assert not mine.score_continuations([(context, worse)])[0][1]
    assert mine.score_continuations([(context, [])]) == [(0, True)]


def test_words_are_counted_in_the_text_that_the_tokens_stand_for(database: Database) -> None:
    store = database.validation
    assert store is not None
    for number, one in enumerate(HELD_OUT):
        assert database.tokenizer.decode(document_tokens(store, number)) == one.text
    assert count_document_words(database, store, [2, 5]) == sum(len(HELD_OUT[number].text.split()) for number in (2, 5))
    assert count_words("two  words\nthree") == 3
    assert count_words("a last line\n") == 4  # as lm_eval does
