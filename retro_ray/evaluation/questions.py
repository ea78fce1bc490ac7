r"""Questions answered in the paper's format (section 4.3): the question is the first chunk, passages its neighbours.

    question: {question} \nanswer:      left-padded, so that it ends with the first chunk
    title: {title}, source: {passage}   a neighbour, at most 2m tokens

The answer is what the model goes on with, greedily; it is compared with the true ones as SQuAD's own script does.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from retro_ray.config import Precision
from retro_ray.errors import InputError
from retro_ray.model.retro import RetroModel
from retro_ray.precision import arithmetic
from retro_ray.text.tokenizer import TextTokenizer

Passages = Literal["given", "retrieved"]
"""The paragraph that the file gives with a question, or what the database has for it."""
MAX_PASSAGES = 20
"""Neighbours of a question (paper, section 4.3)."""
_MAX_ANSWER_TOKENS = 32
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class Question:
    """One question of a SQuAD file."""

    id: str
    text: str
    answers: tuple[str, ...]
    """Any of them is right; none: it cannot be answered from the passage, and only an empty answer is right."""
    title: str
    passage: str


@dataclass(frozen=True)
class PassageTokens:
    """Passages of some questions as neighbours."""

    tokens_BKR: np.ndarray
    """int64."""
    mask_BKR: np.ndarray
    """bool: True where a token is real."""


def read_questions(path: Path) -> list[Question]:
    """The questions of a file in SQuAD's format (1.1 or 2.0).

    Raises:
        InputError: it cannot be read, or holds none.
    """
    try:
        articles = json.loads(path.read_text(encoding="utf-8"))["data"]
        found = [
            Question(
                id=str(asked["id"]),
                text=asked["question"].strip(),
                answers=tuple(dict.fromkeys(answer["text"] for answer in asked.get("answers", []))),
                title=article.get("title", ""),
                passage=paragraph["context"],
            )
            for article in articles
            for paragraph in article["paragraphs"]
            for asked in paragraph["qas"]
        ]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"--questions {path} is no file in SQuAD's format ({error!r})") from error
    if not found:
        raise InputError(f"--questions {path} holds no question")
    return found


def question_tokens(question: str, tokenizer: TextTokenizer, chunk_length: int) -> tuple[np.ndarray, int]:
    """The first chunk, int64 [m], and how many tokens of padding it begins with; of a long question, its end."""
    tokens = tokenizer.encode(f"question: {question} \nanswer:")[-chunk_length:]
    padding = chunk_length - len(tokens)
    return np.concatenate([np.zeros(padding, np.int64), tokens]), padding


def passage_tokens(questions: Sequence[Question], tokenizer: TextTokenizer, chunk_length: int) -> PassageTokens:
    """The given passages, each in pieces of 2m tokens that begin with its title."""
    width = 2 * chunk_length
    pieces_of = []
    for question in questions:
        head = tokenizer.encode(f"title: {question.title}, source: ")[:chunk_length]
        body = tokenizer.encode(question.passage)
        step = width - len(head)
        starts = range(0, max(1, len(body)), step)
        pieces_of.append([np.concatenate([head, body[start : start + step]]) for start in starts][:MAX_PASSAGES])
    tokens = np.zeros((len(questions), max(len(pieces) for pieces in pieces_of), width), np.int64)
    mask = np.zeros(tokens.shape, bool)
    for row, pieces in enumerate(pieces_of):
        for column, piece in enumerate(pieces):
            tokens[row, column, : len(piece)], mask[row, column, : len(piece)] = piece, True
    return PassageTokens(tokens, mask)


@torch.no_grad()
def answer(
    model: RetroModel,
    tokenizer: TextTokenizer,
    questions: Sequence[str],
    passages: PassageTokens | None,
    *,
    precision: Precision = "auto",
) -> list[str]:
    """What the model answers, up to the end of the line.

    Args:
        model: on the device to compute on.
        tokenizer: of the model.
        questions: [B].
        passages: of the same questions; None: retrieval off.
        precision: of the arithmetic.
    """
    m, device = model.config.chunk_length, next(model.parameters()).device
    first = [question_tokens(question, tokenizer, m) for question in questions]
    tokens_BT = torch.from_numpy(np.stack([tokens for tokens, _ in first])).to(device)
    padding_B1 = torch.tensor([[padding] for _, padding in first], device=device)
    neighbours = mask = None
    if passages is not None:
        neighbours, mask = (torch.from_numpy(a[:, None]).to(device) for a in (passages.tokens_BKR, passages.mask_BKR))
    with arithmetic(precision, device):
        for _ in range(min(_MAX_ANSWER_TOKENS, m)):
            place_T = torch.arange(tokens_BT.shape[1], device=device)
            output = model.output(
                tokens_BT,
                neighbours_BLKR=neighbours,
                neighbour_mask_BLKR=mask,
                segments_BT=torch.where(place_T >= padding_B1, 0, -1),
            )
            likeliest_B1 = model.read_out(output[:, -1]).float().argmax(-1, keepdim=True)
            tokens_BT = torch.cat([tokens_BT, likeliest_B1], dim=1)
    return [_one_line(row, tokenizer) for row in tokens_BT[:, m:].tolist()]


def normalized(text: str) -> str:
    """An answer as SQuAD compares it: lower case, without punctuation, articles and superfluous spaces."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(predicted: str, answers: Sequence[str]) -> bool:
    """Whether an answer is one of the right ones."""
    return any(normalized(predicted) == normalized(right) for right in answers or [""])


def f1(predicted: str, answers: Sequence[str]) -> float:
    """Words shared with the closest right answer: the harmonic mean of precision and recall."""
    return max(_f1(normalized(predicted).split(), normalized(right).split()) for right in answers or [""])


def score_answers(questions: Sequence[Question], predicted: Sequence[str]) -> dict[str, Any]:
    """Means over all questions."""
    pairs = list(zip(predicted, questions, strict=True))
    return {
        "questions": len(pairs),
        "exact_match": sum(exact_match(text, question.answers) for text, question in pairs) / len(pairs),
        "f1": sum(f1(text, question.answers) for text, question in pairs) / len(pairs),
    }


def _f1(predicted: list[str], right: list[str]) -> float:
    if not predicted or not right:
        return float(predicted == right)
    shared = sum((Counter(predicted) & Counter(right)).values())
    return 2 * shared / (len(predicted) + len(right))


def _one_line(tokens: list[int], tokenizer: TextTokenizer) -> str:
    if tokenizer.eos_id in tokens:
        tokens = tokens[: tokens.index(tokenizer.eos_id)]
    return tokenizer.decode(tokens).split("\n")[0].strip()
