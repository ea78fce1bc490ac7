import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from retro_ray.building.edit import DatabaseEditor
from retro_ray.config import ModelConfig
from retro_ray.database.store import Database
from retro_ray.errors import ConfigError
from retro_ray.evaluation.bits_per_byte import (
    BitsPerByte,
    _windows,
    choose_documents,
    last_tokens,
    score_chunks,
    score_documents,
    score_tokens,
)
from retro_ray.model.pointer import DecoderOutput
from retro_ray.model.retro import RetroModel
from tests.fakes import tiny_run_config, write_tiny_database


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return write_tiny_database(tmp_path_factory.mktemp("home"), num_validation_documents=12)


@pytest.fixture(scope="module")
def store(database):
    return database.validation


class BigramModel(nn.Module):
    """Knows the probability of every token after every other, and looks at nothing else."""

    def __init__(self, config: ModelConfig, log_probabilities_VV: torch.Tensor) -> None:
        super().__init__()
        self.config = config
        self.table_VV = nn.Parameter(log_probabilities_VV)
        self.calls: list[dict] = []

    def output(self, tokens_BT, **inputs):
        self.calls.append({"tokens_BT": tokens_BT, **inputs})
        return DecoderOutput(self.table_VV[tokens_BT])

    @property
    def read_out_weight(self):
        return torch.eye(self.config.vocab_size)


def bigram_model(database, seed: int = 0, num_chunks: int = 4) -> BigramModel:
    config = dataclasses.replace(tiny_run_config(database).model, num_chunks=num_chunks)
    generator = torch.Generator().manual_seed(seed)
    return BigramModel(config, torch.randn(config.vocab_size, config.vocab_size, generator=generator).log_softmax(-1))


def text_tokens(store, document: int) -> list[int]:
    """The document-start token and the text's, read chunk by chunk."""
    first, stop = store.document_rows(document)
    rows = np.arange(first, stop)
    return [int(t) for tokens, n in zip(store.tokens(rows), store.lengths(rows), strict=True) for t in tokens[:n]]


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 4, 50])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_every_text_token_counts_once_whatever_the_windows(database, store, num_chunks, batch_size):
    model = bigram_model(database, num_chunks=num_chunks)
    documents = range(store.num_documents)
    nats = num_tokens = 0
    for document in documents:
        tokens = text_tokens(store, document)
        nats -= sum(model.table_VV[a, b].item() for a, b in itertools.pairwise(tokens))
        num_tokens += len(tokens) - 1
    score = score_documents(model, store, database, documents, mode="off", batch_size=batch_size, precision="fp32")
    assert (score.num_tokens, score.num_bytes) == (num_tokens, int(store.document_num_bytes.sum()))
    assert score.nats == pytest.approx(nats, rel=1e-5)
    assert score.value == pytest.approx(nats / math.log(2) / score.num_bytes, rel=1e-5)


def test_a_uniform_model_needs_log2_of_the_vocabulary_per_token(database, store):
    model = bigram_model(database)
    model.table_VV.data.zero_()
    score = score_documents(model, store, database, [3], mode="off", precision="fp32")
    num_tokens = len(text_tokens(store, 3)) - 1
    want = num_tokens * math.log2(model.config.vocab_size) / store.document_num_bytes[3]
    assert score.value == pytest.approx(want, rel=1e-6)


def test_a_chunk_is_charged_for_its_own_tokens(database, store):
    model, document = bigram_model(database), int(store.document_num_chunks.argmax())
    scores = score_chunks(model, store, database, [document], mode="off", precision="fp32")
    first, stop = store.document_rows(document)
    assert scores.rows.tolist() == list(range(first, stop))
    tokens, m = text_tokens(store, document), store.chunk_length
    for i in range(stop - first):
        own = range(max(1, i * m), min((i + 1) * m, len(tokens)))
        want = -sum(model.table_VV[tokens[t - 1], tokens[t]].item() for t in own)
        assert scores.nats[i] == pytest.approx(want, rel=1e-5)
        assert scores.num_tokens[i] == len(own)
    assert scores.num_bytes.sum() == store.document_num_bytes[document]


@pytest.mark.parametrize("num_chunks", [1, 2, 5, 8])
def test_windows_are_scored_where_the_one_before_did_not_reach_with_half_a_window_of_context(store, num_chunks):
    for document in range(store.num_documents):
        first, stop = store.document_rows(document)
        windows = sorted(_windows(store, [document], num_chunks))
        scored = [w.first_row + u for w in windows for u in range(w.num_context_chunks, w.num_chunks)]
        assert sorted(scored) == list(range(first, stop))
        assert all(w.num_chunks <= num_chunks for w in windows)
        later = [w for w in windows if w.first_row > first or w.num_context_chunks]
        assert all(w.num_context_chunks == num_chunks - max(1, num_chunks // 2) for w in later)


def test_parts_add_up_to_the_whole(database, store):
    model = bigram_model(database)
    documents = choose_documents(store, 10**9)
    whole = score_documents(model, store, database, documents, mode="off", precision="fp32")
    parts = [score_documents(model, store, database, documents[w::3], mode="off", precision="fp32") for w in range(3)]
    total = sum(parts, BitsPerByte())
    assert (total.num_tokens, total.num_bytes) == (whole.num_tokens, whole.num_bytes)
    assert total.value == pytest.approx(whole.value, rel=1e-6)


def test_nothing_scored_is_not_a_number(database, store):
    score = score_documents(bigram_model(database), store, database, [], mode="off")
    assert score == BitsPerByte()
    assert math.isnan(score.value)


def seen_neighbours(model: BigramModel) -> list[torch.Tensor]:
    return [call["neighbours_BLKR"] for call in model.calls]


def test_modes_differ_in_the_neighbours_the_model_is_given(database, store):
    def given(mode, **settings):
        model = bigram_model(database)
        score_documents(model, store, database, [2, 4], mode=mode, **settings)
        return model.calls

    assert [call["neighbours_BLKR"] for call in given("off")] == [None] * len(given("off"))
    on, random = given("on"), given("random")
    assert on[0]["neighbours_BLKR"].shape[2] == 2, "as in training"
    assert not torch.equal(on[0]["neighbours_BLKR"], random[0]["neighbours_BLKR"])
    assert torch.equal(random[0]["neighbours_BLKR"], given("random")[0]["neighbours_BLKR"])
    assert not torch.equal(random[0]["neighbours_BLKR"], given("random", seed=1)[0]["neighbours_BLKR"])
    assert given("on", num_neighbours=4)[0]["neighbours_BLKR"].shape[2] == 4
    with pytest.raises(ConfigError, match="the database stores 4"):
        given("on", num_neighbours=5)


def test_stored_neighbours_are_given_in_their_order(database, store):
    model = bigram_model(database)
    document = int(store.document_num_chunks.argmax())
    score_documents(model, store, database, [document], mode="on", num_neighbours=3)
    first, _ = store.document_rows(document)
    ids = store.neighbours.gather("chunk_ids", np.arange(first, first + 4))[:, :3]
    tokens, mask = database.neighbour_tokens(ids)
    assert model.calls[0]["neighbours_BLKR"][0].tolist() == tokens.tolist()
    assert model.calls[0]["neighbour_mask_BLKR"][0].tolist() == mask.tolist()


def test_neighbours_of_ones_own_can_be_given(database, store):
    model = bigram_model(database)
    asked = []

    def nothing_found(rows: np.ndarray) -> np.ndarray:
        asked.extend(rows.tolist())
        return np.full((len(rows), 7), -1)

    score_documents(model, store, database, [1], mode="on", neighbours=nothing_found)
    assert set(asked) == set(range(*store.document_rows(1)))
    assert not any(call["neighbour_mask_BLKR"].any() for call in model.calls)
    assert model.calls[0]["neighbours_BLKR"].shape[2] == 7


def test_random_neighbours_are_drawn_from_what_is_not_deleted(tmp_path):
    whole = write_tiny_database(tmp_path, num_documents=8, num_validation_documents=2)
    editor = DatabaseEditor(tmp_path)

    def drawn(database):
        model = bigram_model(database)
        store = database.validation
        score_documents(model, store, database, range(store.num_documents), mode="random", num_neighbours=60)
        return {tuple(tokens) for call in model.calls for tokens in call["neighbours_BLKR"].flatten(0, 2).tolist()}

    def neighbours_of(database, chunk_ids):
        return {tuple(tokens) for tokens in database.neighbour_tokens(chunk_ids)[0].tolist()}

    nothing = tuple([0] * 2 * whole.chunk_length)
    everything = np.arange(whole.manifest.num_chunks)
    assert drawn(whole) == neighbours_of(whole, everything) | {nothing}
    deleted = ["shard-00000/1", "shard-00000/2", "shard-00001/3"]
    editor.delete(deleted)
    edited = Database.open(tmp_path)
    assert drawn(edited) == neighbours_of(edited, everything[~edited.is_deleted(everything)]) | {nothing}
    editor.delete(
        [f"shard-{shard:05d}/{i}" for shard in (0, 1) for i in range(4) if f"shard-{shard:05d}/{i}" not in deleted]
    )
    assert drawn(Database.open(tmp_path)) == {nothing}


def test_random_neighbours_of_a_document_do_not_depend_on_what_else_is_scored(database, store):
    torch.manual_seed(0)
    model = RetroModel(tiny_run_config(database).model)
    alone = score_chunks(model, store, database, [5], mode="random", precision="fp32")
    together = score_chunks(model, store, database, range(store.num_documents), mode="random", precision="fp32")
    mine = np.isin(together.rows, alone.rows)
    assert alone.nats == pytest.approx(together.nats[mine], rel=1e-5)


def test_retrieval_changes_a_models_score_and_off_does_not_depend_on_neighbours(database, store):
    torch.manual_seed(0)
    model = RetroModel(tiny_run_config(database).model).train()
    documents = range(store.num_documents)
    on, off, random = (
        score_documents(model, store, database, documents, mode=mode, precision="fp32")
        for mode in ("on", "off", "random")
    )
    assert len({on.value, off.value, random.value}) == 3
    missing = score_documents(
        model,
        store,
        database,
        documents,
        mode="on",
        precision="fp32",
        neighbours=lambda rows: np.full((len(rows), 2), -1),
    )
    assert missing.nats == pytest.approx(off.nats, rel=1e-5), "nothing found is retrieval off"
    assert model.training, "the model is left as it was"


def test_documents_are_chosen_always_alike_until_there_are_chunks_enough(store):
    chosen = choose_documents(store, 20)
    assert chosen.tolist() == choose_documents(store, 20).tolist() == sorted(set(chosen.tolist()))
    sizes = store.document_num_chunks[chosen]
    assert sizes.sum() >= 20
    assert len(chosen) < store.num_documents
    assert choose_documents(store, 10**9).tolist() == list(range(store.num_documents))
    assert choose_documents(store, 0).tolist() == []
    assert any(choose_documents(store, 20, seed).tolist() != chosen.tolist() for seed in range(1, 5))


def test_tokens_one_by_one(database, store):
    """Position, nats, and whether the model found no other token likelier, against the table itself."""
    model, m = bigram_model(database), store.chunk_length
    documents = [5, 2, 9]
    scores = score_tokens(model, store, database, documents, mode="off", precision="fp32")
    want = []
    for document in sorted(documents):
        start = store.document_rows(document)[0] * m
        for t, (before, token) in enumerate(itertools.pairwise(text_tokens(store, document))):
            row = model.table_VV[before]
            want.append((start + t + 1, -row[token].item(), bool(row[token] == row.max())))
    assert scores.positions.tolist() == [position for position, _, _ in want]
    assert scores.nats == pytest.approx([nats for _, nats, _ in want], rel=1e-5)
    assert scores.is_likeliest.tolist() == [likeliest for _, _, likeliest in want]


@pytest.mark.parametrize("num_chunks", [1, 3, 4])
def test_some_tokens_alone_score_as_they_do_among_all(database, store, num_chunks):
    config = dataclasses.replace(tiny_run_config(database).model, num_chunks=num_chunks)
    torch.manual_seed(0)
    model = RetroModel(config)
    documents = choose_documents(store, 10**9)
    whole = score_tokens(model, store, database, documents, mode="on", precision="fp32")
    only = np.zeros(store.num_chunks * store.chunk_length, bool)
    chosen = np.random.default_rng(1).choice(len(whole.positions), size=9, replace=False)
    only[whole.positions[chosen]] = True
    some = score_tokens(model, store, database, documents, mode="on", precision="fp32", only=only)
    kept = only[whole.positions]
    assert some.positions.tolist() == whole.positions[kept].tolist()
    assert some.nats == pytest.approx(whole.nats[kept], rel=1e-5)
    assert some.is_likeliest.tolist() == whole.is_likeliest[kept].tolist()


def test_no_window_is_read_that_scores_nothing_asked_for(database, store):
    model, document = bigram_model(database, num_chunks=2), int(store.document_num_chunks.argmax())
    only = np.zeros(store.num_chunks * store.chunk_length, bool)
    only[last_tokens(store, [document])] = True
    scores = score_tokens(model, store, database, [document], mode="off", precision="fp32", only=only)
    assert len(scores.nats) == 1
    assert len(model.calls) == 1
    assert len(model.calls[0]["tokens_BT"]) == 1


def test_last_tokens_that_the_model_gets_right(database, store):
    model = bigram_model(database)
    documents = range(store.num_documents)
    ends = [text_tokens(store, document)[-2:] for document in documents]
    known = ends[::2]
    with torch.no_grad():
        for before, last in known:
            model.table_VV[before, last] = 50
    score = score_documents(model, store, database, documents, mode="off", precision="fp32")
    right = sum(bool(model.table_VV[before].argmax() == last) for before, last in ends)
    assert right >= len({tuple(end) for end in known}) / 2
    assert (score.num_last_tokens, score.num_last_right) == (store.num_documents, right)
    assert score.last_token_accuracy == right / store.num_documents


def test_perplexities_are_of_the_same_nats():
    score = BitsPerByte(nats=math.log(8) * 10, num_tokens=10, num_bytes=40)
    assert score.token_perplexity == pytest.approx(8)
    assert score.word_perplexity(5) == pytest.approx(64)
    assert score.value == pytest.approx(30 / 40)
    assert all(map(math.isnan, (BitsPerByte().token_perplexity, BitsPerByte().word_perplexity(0))))
    assert math.isnan(BitsPerByte().last_token_accuracy)
