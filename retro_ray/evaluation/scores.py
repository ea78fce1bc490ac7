"""What scoring gives: sums over a text, and figures per chunk and per token."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class BitsPerByte:
    """Sums that bits per byte is made of; those of parts add up to that of the whole."""

    nats: float = 0.0
    """Negative log-likelihood of the text's tokens."""
    num_tokens: int = 0
    """Tokens scored."""
    num_bytes: int = 0
    """UTF-8 bytes of the text they stand for."""
    num_last_tokens: int = 0
    """Documents whose last token was scored."""
    num_last_right: int = 0
    """Those of them whose last token the model found likeliest."""

    def __add__(self, other: BitsPerByte) -> BitsPerByte:
        return BitsPerByte(
            self.nats + other.nats,
            self.num_tokens + other.num_tokens,
            self.num_bytes + other.num_bytes,
            self.num_last_tokens + other.num_last_tokens,
            self.num_last_right + other.num_last_right,
        )

    @property
    def value(self) -> float:
        """Bits per byte; NaN where there was no text."""
        return self.nats / (math.log(2) * self.num_bytes) if self.num_bytes else math.nan

    @property
    def token_perplexity(self) -> float:
        """Of tokens, which depends on the tokenizer; NaN where there were none."""
        return math.exp(self.nats / self.num_tokens) if self.num_tokens else math.nan

    def word_perplexity(self, num_words: int) -> float:
        """Of words, which does not: for a text of so many."""
        return math.exp(self.nats / num_words) if num_words else math.nan

    @property
    def last_token_accuracy(self) -> float:
        """Share of the documents whose last token the model found likeliest (paper, section 4.1: LAMBADA)."""
        return self.num_last_right / self.num_last_tokens if self.num_last_tokens else math.nan


@dataclass(frozen=True)
class TokenScores:
    """What a model made of the tokens of some documents, in the order of `positions`."""

    positions: np.ndarray
    """int64 [n], ascending: of a token in the store, row of its chunk x m + place in the chunk."""
    nats: np.ndarray
    """float64 [n]: negative log-likelihood."""
    is_likeliest: np.ndarray
    """bool [n]: whether no other token was likelier."""

    @classmethod
    def concatenated(cls, parts: Sequence[TokenScores]) -> TokenScores:
        """The tokens of several, put in order."""
        positions = np.concatenate([np.empty(0, np.int64), *(part.positions for part in parts)])
        nats = np.concatenate([np.empty(0), *(part.nats for part in parts)])
        is_likeliest = np.concatenate([np.empty(0, bool), *(part.is_likeliest for part in parts)])
        order = np.argsort(positions)
        return cls(positions[order], nats[order], is_likeliest[order])


@dataclass(frozen=True)
class ChunkScores:
    """The same sums for every chunk of some documents, in the order of `rows`."""

    rows: np.ndarray
    """int64 [n]: rows of the chunk store."""
    nats: np.ndarray
    """float64 [n]: of the chunk's own tokens, whichever position predicted them."""
    num_tokens: np.ndarray
    """int64 [n]."""
    num_bytes: np.ndarray
    """int64 [n]."""

    @property
    def total(self) -> BitsPerByte:
        return BitsPerByte(math.fsum(self.nats), int(self.num_tokens.sum()), int(self.num_bytes.sum()))

    def by_document(self, document_of: np.ndarray) -> DocumentScores:
        """The sums of whole documents.

        Args:
            document_of: int64 [n]: the document of each chunk.
        """
        documents, place = np.unique(document_of, return_inverse=True)
        sums = [np.bincount(place, weights=each, minlength=len(documents)) for each in (self.nats, self.num_bytes)]
        return DocumentScores(documents, sums[0], sums[1].astype(np.int64))


@dataclass(frozen=True)
class DocumentScores:
    """Sums of some documents, in the order of `documents`."""

    documents: np.ndarray
    """int64 [d], ascending: of the chunk store."""
    nats: np.ndarray
    """float64 [d]."""
    num_bytes: np.ndarray
    """int64 [d]."""


@dataclass(frozen=True)
class PassScores:
    """What one pass of a model over some documents gives; those of parts of a text make up those of all of it."""

    chunks: ChunkScores
    place_nats: np.ndarray
    """float64 [m]: of the tokens at each place of their chunk."""
    place_num_tokens: np.ndarray
    """int64 [m]."""
    num_last_tokens: int
    """As in BitsPerByte."""
    num_last_right: int

    @property
    def total(self) -> BitsPerByte:
        """The sums; nats to the last bit, whatever the order in which parts were put together."""
        last = {"num_last_tokens": self.num_last_tokens, "num_last_right": self.num_last_right}
        return replace(self.chunks.total, **last)

    @property
    def nats_by_place(self) -> np.ndarray:
        """float64 [m]: mean nats of a token at each place of its chunk; NaN where no chunk is so long."""
        with np.errstate(invalid="ignore"):
            return self.place_nats / np.where(self.place_num_tokens > 0, self.place_num_tokens, np.nan)

    @classmethod
    def concatenated(cls, parts: Sequence[PassScores]) -> PassScores:
        """The scores of documents from those of groups of them, the same in whatever order they come."""
        parts = sorted(parts, key=lambda part: int(part.chunks.rows[0]) if len(part.chunks.rows) else -1)
        names = ("rows", "nats", "num_tokens", "num_bytes")
        return cls(
            ChunkScores(*(np.concatenate([getattr(part.chunks, name) for part in parts]) for name in names)),
            np.sum([part.place_nats for part in parts], axis=0),
            np.sum([part.place_num_tokens for part in parts], axis=0),
            sum(part.num_last_tokens for part in parts),
            sum(part.num_last_right for part in parts),
        )

    def write(self, path: Path) -> None:
        """Keep them in a file, which appears whole or not at all."""
        temporary = path.with_name(f".{os.getpid()}-{path.name}")
        with temporary.open("wb") as file:
            np.savez(
                file,
                **vars(self.chunks),
                place_nats=self.place_nats,
                place_num_tokens=self.place_num_tokens,
                last=np.array([self.num_last_tokens, self.num_last_right]),
            )
        os.replace(temporary, path)

    @classmethod
    def read(cls, path: Path) -> PassScores:
        """What `write` wrote."""
        with np.load(path, allow_pickle=False) as file:
            chunks = ChunkScores(*(file[name] for name in ("rows", "nats", "num_tokens", "num_bytes")))
            return cls(chunks, file["place_nats"], file["place_num_tokens"], *map(int, file["last"]))
