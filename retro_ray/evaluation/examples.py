"""A few chunks to look at: what retrieval found for them, what of it they repeat, and what it was worth by token."""

from __future__ import annotations

from typing import Any

import numpy as np

from retro_ray.evaluation.copyable import NGRAM_LENGTH
from retro_ray.evaluation.evaluate import LN_2, Evaluation, describe_subject
from retro_ray.evaluation.own_text import first_neighbours
from retro_ray.evaluation.passes import PassScorer
from retro_ray.evaluation.scores import TokenScores
from retro_ray.retrieval.lookup import documents_of
from retro_ray.text.ngrams import ngram_codes
from retro_ray.text.tokenizer import TextTokenizer

_LITTLE_COPIED = 0.25
_LEVELS = (-1.0, -0.2, 0.2, 1.0)
"""Bits saved at a token, between which it is shown as much worse, worse, alike, better, much better."""


def find_examples(evaluation: Evaluation) -> dict[str, Any]:
    """Chunks of four kinds, where the evaluated documents have them."""
    subject = evaluation.subject
    store, rows = subject.store, subject.rows
    saved = (evaluation.passes["off"].chunks.nats - evaluation.passes["on"].chunks.nats) / LN_2
    chosen = choose_chunks(saved, evaluation.overlaps, store.document_of(rows))
    documents = sorted({int(store.document_of(rows[[place]])[0]) for place in chosen.values()})
    scorer = PassScorer(subject.text, {"on": subject.on(), "off": subject.off()})
    tokens = {name: scorer.score_tokens(name, documents) for name in ("on", "off")}
    return {
        **describe_subject(subject),
        "examples": [
            {"kind": kind, **_describe(evaluation, int(rows[place]), float(evaluation.overlaps[place]), tokens)}
            for kind, place in chosen.items()
        ],
    }


def choose_chunks(saved: np.ndarray, overlaps: np.ndarray, document_of: np.ndarray) -> dict[str, int]:
    """Places of chunks to show, by what they are an example of.

    Args:
        saved: float64 [n], bits that retrieval saved in each chunk.
        overlaps: float64 [n], r(C).
        document_of: int64 [n]; the first chunk of a document has no neighbours before it.
    """
    eligible = np.zeros(len(saved), bool)
    eligible[1:] = document_of[1:] == document_of[:-1]
    chosen: dict[str, int] = {}
    wanted = (
        ("gained most", eligible, -saved),
        ("gained with little to copy", eligible & (overlaps <= _LITTLE_COPIED), -saved),
        ("typical", eligible, np.abs(saved - np.median(saved[eligible])) if eligible.any() else saved),
        ("lost most", eligible, saved),
    )
    for kind, allowed, order in wanted:
        free = allowed & ~np.isin(np.arange(len(saved)), list(chosen.values()))
        if free.any():
            chosen[kind] = int(np.flatnonzero(free)[np.argmin(order[free])])
    return chosen


def _describe(evaluation: Evaluation, row: int, overlap: float, tokens: dict[str, TokenScores]) -> dict[str, Any]:
    """One chunk, the chunk before it, and the neighbours that were retrieved with that one."""
    subject = evaluation.subject
    store, database, tokenizer = subject.store, subject.database, subject.database.tokenizer
    document = int(store.document_of(np.array([row]))[0])
    before, own = (store.tokens(np.array([r]))[0][: int(store.lengths(np.array([r]))[0])] for r in (row - 1, row))
    one = subject.on()
    if one.neighbours is None:
        raise ValueError("a pass with retrieval has neighbours")
    ids = first_neighbours(one.neighbours, one.num_neighbours)(np.array([row - 1]))
    found, mask = database.neighbour_tokens(ids)
    offered = np.where(mask[0], found[0], -1)
    bits = {name: _bits_of(scores, row, store.chunk_length, len(own)) for name, scores in tokens.items()}
    levels = np.digitize(bits["off"] - bits["on"], _LEVELS) - 2
    ref = store.document_ref(document)
    m = store.chunk_length
    neighbours = []
    for column, neighbour in enumerate(documents_of(database, ids)[0]):
        if neighbour is not None:
            shared = shared_places(offered[column], own[None])
            parts = [(offered[column][part], shared[part]) for part in (slice(m), slice(m, None))]
            neighbours.append(
                {
                    "document": neighbour.id,
                    "title": neighbour.title,
                    "chunk": _pieces(tokenizer, parts[0][0], np.zeros(m, int), parts[0][1]),
                    "continuation": _pieces(tokenizer, parts[1][0], np.zeros(m, int), parts[1][1]),
                }
            )
    return {
        "document": ref.id,
        "title": ref.title,
        "chunk": row - store.document_rows(document)[0] + 1,
        "overlap": overlap,
        "bits_off": float(bits["off"].sum()),
        "bits_on": float(bits["on"].sum()),
        "before": tokenizer.decode(before),
        "pieces": _pieces(tokenizer, own, levels, shared_places(own, offered)),
        "neighbours": neighbours,
    }


def shared_places(tokens_T: np.ndarray, others_KR: np.ndarray) -> np.ndarray:
    """Which tokens stand in an n-gram that one of the others has, too: bool [T]; negative tokens are none."""
    shared = np.zeros(len(tokens_T), bool)
    codes = ngram_codes(tokens_T, NGRAM_LENGTH)
    held = np.isin(codes, ngram_codes(others_KR, NGRAM_LENGTH)) & (codes > 0)
    for offset in range(NGRAM_LENGTH):
        shared[offset : offset + len(held)] |= held
    return shared


def _bits_of(scores: TokenScores, row: int, chunk_length: int, length: int) -> np.ndarray:
    """float64 [length]: bits of each token of a chunk; 0 for a document-start token."""
    bits = np.zeros(length)
    first, stop = np.searchsorted(scores.positions, [row * chunk_length, row * chunk_length + length])
    bits[scores.positions[first:stop] - row * chunk_length] = scores.nats[first:stop] / LN_2
    return bits


def _pieces(
    tokenizer: TextTokenizer, tokens: np.ndarray, levels: np.ndarray, shared: np.ndarray
) -> list[dict[str, Any]]:
    """Runs of tokens of the same look, as text."""
    real = tokens >= 0
    tokens, levels, shared = tokens[real], levels[real], shared[real]
    if not len(tokens):
        return []
    changes = np.flatnonzero((np.diff(levels) != 0) | (np.diff(shared.astype(int)) != 0)) + 1
    runs = np.split(np.arange(len(tokens)), changes)
    return [
        {"text": tokenizer.decode(tokens[run]), "level": int(levels[run[0]]), "shared": bool(shared[run[0]])}
        for run in runs
    ]
