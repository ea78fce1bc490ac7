"""Questions in the paper's format, and answers compared as SQuAD compares them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from retro_ray.errors import InputError
from retro_ray.evaluation.answering import answer_file
from retro_ray.evaluation.questions import (
    Passages,
    Question,
    answer,
    exact_match,
    f1,
    passage_tokens,
    question_tokens,
    read_questions,
    score_answers,
)
from retro_ray.evaluation.tables import answers_table
from retro_ray.model.retro import RetroModel
from retro_ray.retrieval import retriever
from retro_ray.text.tokenizer import TextTokenizer, train_tokenizer
from tests.fakes import tiny_texts
from tests.unit.building.editing import HashEmbedder, document, write_database
from tests.unit.evaluation.trained import save_run
from tests.unit.model.models import random_model, small_config

M = 16


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_tokenizer([*tiny_texts(20, seed=1), "question: answer: title: source:"], 300, "train:300")


@pytest.fixture(scope="module")
def model(tokenizer: TextTokenizer) -> RetroModel:
    config = small_config(vocab_size=tokenizer.vocab_size, chunk_length=M)
    return random_model(config, dtype=torch.float32).eval()


def question(text: str = "which?", passage: str = "alpha", answers: tuple[str, ...] = ("x",)) -> Question:
    return Question("1", text, answers, "beta", passage)


@pytest.mark.parametrize(
    ("predicted", "answers", "exact", "overlap"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], True, 1.0),
        ("an old tower", ["Eiffel Tower", "the big old house"], False, 0.5),
        ("tower of London", ["Tower"], False, 0.5),
        ("", [], True, 1.0),
        ("something", [], False, 0.0),
        ("", ["x"], False, 0.0),
        ("no no yes", ["no yes yes"], False, 2 / 3),
    ],
)
def test_known_answers(predicted: str, answers: list[str], exact: bool, overlap: float) -> None:
    assert exact_match(predicted, answers) is exact
    assert f1(predicted, answers) == pytest.approx(overlap)


def test_means() -> None:
    questions = [question(answers=("alpha beta",)), question(answers=())]
    assert score_answers(questions, ["beta", ""]) == {
        "questions": 2,
        "exact_match": 0.5,
        "f1": pytest.approx((2 / 3 + 1) / 2),
    }


def test_a_file_in_squads_format(tmp_path: Path) -> None:
    asked = [
        {"id": "a", "question": " Who? ", "answers": [{"text": "I"}, {"text": "I"}, {"text": "me"}]},
        {"id": "b", "question": "Why?", "answers": [], "is_impossible": True},
    ]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"title": "T", "paragraphs": [{"context": "C", "qas": asked}]}]}))
    assert read_questions(path) == [Question("a", "Who?", ("I", "me"), "T", "C"), Question("b", "Why?", (), "T", "C")]
    for content, message in (("{", "no file in SQuAD's format"), ('{"data": []}', "holds no question")):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            read_questions(path)


def test_the_question_ends_with_the_first_chunk(tokenizer: TextTokenizer) -> None:
    tokens, padding = question_tokens("a?", tokenizer, 64)
    assert len(tokens) == 64
    assert tokenizer.decode(tokens[padding:]) == "question: a? \nanswer:"
    tokens, padding = question_tokens("alpha beta " * 30, tokenizer, M)
    assert (len(tokens), padding) == (M, 0)
    assert tokenizer.decode(tokens).endswith(" \nanswer:")


def test_passages_are_neighbours_with_their_title(tokenizer: TextTokenizer) -> None:
    long = " ".join(tiny_texts(5, seed=3))
    passages = passage_tokens([question(passage=long), question(passage="alpha")], tokenizer, M)
    head = tokenizer.encode("title: beta, source: ")[:M].tolist()
    found, body = passages.tokens_BKR[0], []
    for piece, mask in zip(found, passages.mask_BKR[0], strict=True):
        assert piece[: len(head)].tolist() == head
        body += piece[mask][len(head) :].tolist()
    assert body == tokenizer.encode(long)[: len(body)].tolist()
    assert passages.mask_BKR[1].sum() == len(head) + len(tokenizer.encode("alpha"))
    assert passages.tokens_BKR.shape[2] == 2 * M


def test_answers_in_a_batch_are_those_alone_and_depend_on_the_passages(
    model: RetroModel, tokenizer: TextTokenizer
) -> None:
    texts = ["alpha?", "which of beta and gamma delta?", "x"]
    questions = [question(text, passage) for text, passage in zip(texts, tiny_texts(3, seed=4), strict=True)]
    passages = passage_tokens(questions, tokenizer, M)
    together = answer(model, tokenizer, texts, passages, precision="fp32")
    for text, one, expected in zip(texts, questions, together, strict=True):
        assert answer(model, tokenizer, [text], passage_tokens([one], tokenizer, M), precision="fp32") == [expected]
    off = answer(model, tokenizer, texts, None, precision="fp32")
    assert off != together
    nothing = type(passages)(passages.tokens_BKR, np.zeros_like(passages.mask_BKR))
    assert answer(model, tokenizer, texts, nothing, precision="fp32") == off


@pytest.mark.parametrize("passages", ["given", "retrieved"])
def test_answers_to_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passages: Passages) -> None:
    database = write_database(tmp_path, [document(f"d{number}") for number in range(6)])
    save_run(tmp_path, database)
    asked = [{"id": str(number), "question": f"q{number}?", "answers": [{"text": "I"}]} for number in range(20)]
    path = tmp_path / "squad.json"
    content = {"data": [{"title": "T", "paragraphs": [{"context": "alpha beta", "qas": asked}]}]}
    path.write_text(json.dumps(content))
    monkeypatch.setattr(retriever, "open_embedder", lambda database, device=None: HashEmbedder())
    result = answer_file(tmp_path / "runs" / "default", database, path, passages, num_neighbours=3)
    assert [one["id"] for one in result["answers"]] == [str(number) for number in range(20)]
    assert result["scores"]["on"]["questions"] == 20
    assert any(one["on"] != one["off"] for one in result["answers"])
    assert f"20 questions, passages {passages}" in answers_table(result)
