"""A checkpoint's answers to the questions of a file, with passages as neighbours and without."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from retro_ray.config import RetrievalConfig
from retro_ray.database.store import Database
from retro_ray.evaluation.questions import (
    MAX_PASSAGES,
    Passages,
    PassageTokens,
    Question,
    answer,
    passage_tokens,
    read_questions,
    score_answers,
)
from retro_ray.progress import progress_bar
from retro_ray.retrieval.local import LocalRetriever
from retro_ray.retrieval.retriever import ChunkRetriever
from retro_ray.training.checkpoint import load_model

_QUESTIONS_AT_A_TIME = 16


def answer_file(
    run: Path, database: Database, path: Path, passages: Passages = "given", num_neighbours: int | None = None
) -> dict[str, Any]:
    """Exact match and F1 with passages and without.

    Args:
        run: whose newest checkpoint answers.
        database: whose tokenizer the model has; it is searched for passages that are retrieved.
        path: file in SQuAD's format.
        passages: where they come from.
        num_neighbours: passages that are retrieved. Default: 20.

    Raises:
        InputError: the file is not of that format.
        CheckpointError: the run has no checkpoint.
        MismatchError: checkpoint, database and embedder do not belong together.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    questions = read_questions(path)
    model, _, meta = load_model(run, database.manifest, device)
    retriever = None
    if passages == "retrieved":
        local = LocalRetriever.open(database, RetrievalConfig(mmap=True), pinned=True)
        retriever = ChunkRetriever.open(database, local)
    found: dict[str, list[str]] = {"on": [], "off": []}
    starts = progress_bar(None, "answer", iterable=range(0, len(questions), _QUESTIONS_AT_A_TIME))
    for start in starts:
        some = questions[start : start + _QUESTIONS_AT_A_TIME]
        offered = _passages(some, database, retriever, num_neighbours or MAX_PASSAGES)
        texts = [question.text for question in some]
        found["on"] += answer(model, database.tokenizer, texts, offered)
        found["off"] += answer(model, database.tokenizer, texts, None)
    return {
        "questions_file": str(path),
        "step": meta.step,
        "database_version": database.manifest.version,
        "passages": passages,
        "scores": {mode: score_answers(questions, predicted) for mode, predicted in found.items()},
        "answers": [
            {"id": one.id, "question": one.text, "right": list(one.answers), "on": on, "off": off}
            for one, on, off in zip(questions, found["on"], found["off"], strict=True)
        ],
    }


def _passages(
    questions: Sequence[Question], database: Database, retriever: ChunkRetriever | None, num_neighbours: int
) -> PassageTokens:
    if retriever is None:
        return passage_tokens(questions, database.tokenizer, database.chunk_length)
    found = retriever.retrieve_texts([question.text for question in questions], num_neighbours)
    return PassageTokens(found.tokens, found.mask)
