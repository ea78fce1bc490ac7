import hashlib
import threading
from collections.abc import Sequence

import numpy as np
import torch

from retro_ray.config import ModelConfig
from retro_ray.database.store import DocumentRef
from retro_ray.errors import RetrievalError
from retro_ray.model.retro import RetroModel
from retro_ray.retrieval.retriever import NeighbourSet

CHUNK_LENGTH = 4


class HashSearch:
    """Neighbours that are a function of the chunk alone; remembers what it was asked.

    The k nearest are the first k of the k + 1 nearest. Every third neighbour has no continuation,
    and a chunk whose hash is even has only one neighbour.
    """

    def __init__(self, vocab_size: int, missing_shards: tuple[int, ...] = ()) -> None:
        self.calls: list[tuple[list[list[int]], int]] = []
        self._vocab_size = vocab_size
        self._missing_shards = missing_shards

    def retrieve_chunks(self, chunks: Sequence[Sequence[int]], k: int) -> NeighbourSet:
        self.calls.append(([list(chunk) for chunk in chunks], k))
        shape = (len(chunks), k, 2 * CHUNK_LENGTH)
        tokens, mask = np.zeros(shape, np.int64), np.zeros(shape, bool)
        distances, chunk_ids = np.full(shape[:2], np.inf, np.float32), np.full(shape[:2], -1)
        documents: list[tuple[DocumentRef | None, ...]] = []
        for row, chunk in enumerate(chunks):
            seed = int.from_bytes(hashlib.sha256(repr(list(chunk)).encode()).digest()[:4])
            rng = np.random.default_rng(seed)
            drawn = rng.integers(1, self._vocab_size, size=(64, 2 * CHUNK_LENGTH))
            num_found = min(k, 1 if seed % 2 == 0 else 64)
            for j in range(num_found):
                real = CHUNK_LENGTH if (seed + j) % 3 == 0 else 2 * CHUNK_LENGTH
                tokens[row, j, :real], mask[row, j, :real] = drawn[j, :real], True
                distances[row, j], chunk_ids[row, j] = j + 0.5, seed % 1000 + j
            documents.append(
                tuple(
                    DocumentRef(id=f"doc{chunk_ids[row, j]}", title=f"title {j}", source="s") if j < num_found else None
                    for j in range(k)
                )
            )
        for array in (tokens, mask, distances, chunk_ids):
            array.setflags(write=False)  # as arrays that Ray shares are
        return NeighbourSet(distances, chunk_ids, tokens, mask, tuple(documents), self._missing_shards)


class GatedSearch(HashSearch):
    """A HashSearch that answers only while its gate is open; fails for chunks with a forbidden token."""

    def __init__(self, vocab_size: int, missing_shards: tuple[int, ...] = ()) -> None:
        super().__init__(vocab_size, missing_shards)
        self.gate = threading.Event()
        self.was_asked = threading.Event()
        self.forbidden: int | None = None
        self.reranks: list[str | None] = []

    def retrieve_chunks(self, chunks: Sequence[Sequence[int]], k: int, rerank: str | None = None) -> NeighbourSet:
        self.was_asked.set()
        assert self.gate.wait(60), "the gate was never opened"
        self.reranks.append(rerank)
        if any(self.forbidden in chunk for chunk in chunks):
            raise RetrievalError("shard 1 did not answer")
        return super().retrieve_chunks(chunks, k)


def make_model(vocab_size: int, **changes) -> RetroModel:
    """A tiny model with random weights everywhere, so that neighbours matter, in float64, so that the
    order of a sum does not."""
    settings = {
        "vocab_size": vocab_size,
        "chunk_length": CHUNK_LENGTH,
        "num_chunks": 10,
        "hidden_dim": 16,
        "num_layers": 3,
        "num_heads": 2,
        "head_dim": 8,
        "ffn_dim": 32,
        "cca_layers": (2, 3),
        "encoder_dim": 16,
        "encoder_layers": 2,
        "encoder_heads": 2,
        "encoder_ffn_dim": 32,
        "pointer": True,
    }
    model = RetroModel(ModelConfig(**(settings | changes))).double().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model
