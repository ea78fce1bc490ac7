"""Batched generation with retrieval in the loop, over a KV cache. Knows no Ray.

A prompt is read in one pass, with the neighbours of all its finished chunks retrieved in one call.
After that every step adds a token to each sequence of the batch; where that token finishes a chunk,
the chunk is embedded and its neighbours are retrieved *before* the next logits are computed, because
they condition the next token already (paper, sections 2.1 and 2.4).

Shape letters: B batch, T tokens, L chunks, K neighbours, R neighbour length (2M), V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

import torch

from retro_ray.errors import PromptError
from retro_ray.generation.request import GenerationRequest, GenerationResult, RetrievedChunk, SequenceState
from retro_ray.generation.sampling import sample_token
from retro_ray.model.retro import RetroModel
from retro_ray.retrieval.retriever import NeighbourSet
from retro_ray.text.tokenizer import TextTokenizer


class ChunkSearch(Protocol):
    """What the engine asks of retrieval; a ChunkRetriever does it."""

    def retrieve_chunks(self, chunks: Sequence[Sequence[int]], k: int) -> NeighbourSet:
        """The `k` nearest chunks of each chunk of token ids."""
        ...


class GenerationEngine:
    """Generates with one model; not for use by several threads at once.

    Args:
        model: in eval mode, on its device, in the dtype to compute in.
        tokenizer: the one that the model was trained with.
        retriever: None: every request runs without retrieval, as if it had turned it off.
    """

    def __init__(self, model: RetroModel, tokenizer: TextTokenizer, retriever: ChunkSearch | None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.retriever = retriever if model.config.cca_layers else None

    def start(self, request: GenerationRequest) -> SequenceState:
        """The request's tokens, checked against the model's limits; nothing is computed yet.

        Raises:
            PromptError: prompt and max_tokens do not fit into the model's context.
        """
        config = self.model.config
        tokens = [self.tokenizer.bos_id, *self.tokenizer.encode(request.prompt).tolist()]
        if len(tokens) + request.max_tokens > config.context_length:
            raise PromptError(
                f"the prompt has {len(tokens)} tokens (the start-of-document token included) and max_tokens is "
                f"{request.max_tokens}, together {len(tokens) + request.max_tokens}: the model's context holds "
                f"{config.context_length}; shorten the prompt or lower max_tokens"
            )
        num_neighbours = 0
        if request.retrieval and self.retriever is not None:
            num_neighbours = request.num_neighbours or config.num_neighbours
        return SequenceState(request, tokens, self.tokenizer, num_neighbours)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """Decode `requests` together; each gets what it would get alone.

        Raises:
            PromptError: a request cannot be served (see `start`).
            RetrievalError: a chunk's neighbours could not be retrieved.
        """
        states = [self.start(request) for request in requests]
        batch = DecodingBatch(
            self,
            num_slots=len(states),
            max_tokens=max((len(state.tokens) + state.request.max_tokens for state in states), default=1),
            num_neighbours=max((state.num_neighbours for state in states), default=1),
        )
        batch.admit(states)
        while batch.active:
            batch.step()
        return [state.result(self.model.config.chunk_length) for state in states]


class DecodingBatch:
    """Slots in which sequences are decoded together; what a scheduler admits into and steps.

    Args:
        engine: whose model, tokenizer and retriever to use.
        num_slots: sequences at most (B).
        max_tokens: of the longest sequence, prompt and generated ones together.
        num_neighbours: most that a sequence asks for.
    """

    def __init__(self, engine: GenerationEngine, *, num_slots: int, max_tokens: int, num_neighbours: int) -> None:
        self._model = engine.model
        self._retriever = engine.retriever
        self._device = next(engine.model.parameters()).device
        self._slots: list[SequenceState | None] = [None] * num_slots
        self._cache = engine.model.new_cache(num_slots, max_tokens, num_neighbours=max(1, num_neighbours))
        self._logits_BV = torch.zeros(num_slots, engine.model.config.vocab_size)

    @property
    def active(self) -> list[SequenceState]:
        """The sequences that have not finished."""
        return [state for state in self._slots if state is not None]

    @property
    def num_free_slots(self) -> int:
        return self._slots.count(None)

    def admit(self, states: Sequence[SequenceState]) -> None:
        """Read the prompts of `states` into free slots, with their chunks' neighbours from one retrieval."""
        if not states:
            return
        m = self._model.config.chunk_length
        slots = [slot for slot, state in enumerate(self._slots) if state is None][: len(states)]
        assert len(slots) == len(states), "more sequences than free slots"
        self._retrieve([(state, u) for state in states for u in range(1, len(state.tokens) // m + 1)])
        lengths_B = torch.tensor([len(state.tokens) for state in states])
        tokens_BT = torch.zeros(len(states), int(lengths_B.max()), dtype=torch.long)
        for row, state in enumerate(states):
            tokens_BT[row, : len(state.tokens)] = torch.tensor(state.tokens)
        neighbours_BLKR, mask_BLKR = self._neighbour_tensors([state.retrieved for state in states])
        slots_B = torch.tensor(slots)
        logits_BV = self._model.prefill(
            tokens_BT.to(self._device), lengths_B, self._cache, neighbours_BLKR, mask_BLKR, slots_B=slots_B
        )
        self._logits_BV[slots_B] = logits_BV.float().cpu()
        for slot, state in zip(slots, states, strict=True):
            self._slots[slot] = state

    def step(self) -> list[tuple[SequenceState, int]]:
        """One more token for every active sequence; returns them. Finished ones leave their slots."""
        produced = []
        for slot, state in enumerate(self._slots):
            if state is None:
                continue
            token = sample_token(self._logits_BV[slot], state.request.sampling, state.generator)
            state.append(token)
            produced.append((state, token))
            if state.finish_reason is not None:
                self._slots[slot] = None
        if self.active:
            self._advance()
        return produced

    def _advance(self) -> None:
        """Feed the newest token of every active sequence to the model."""
        m = self._model.config.chunk_length
        completed = [state for state in self.active if state.num_neighbours and len(state.tokens) % m == 0]
        self._retrieve([(state, len(state.tokens) // m) for state in completed])
        arrived = [state.retrieved[-1:] if state in completed else [] for state in self._slots]
        neighbours_BLKR, mask_BLKR = self._neighbour_tensors(arrived)
        logits_BV = self._model.decode_step(
            torch.tensor([0 if state is None else state.tokens[-1] for state in self._slots], device=self._device),
            self._cache,
            None if neighbours_BLKR is None else neighbours_BLKR[:, 0],
            None if mask_BLKR is None else mask_BLKR[:, 0],
            torch.tensor([bool(row) for row in arrived]),
            active_B=torch.tensor([state is not None for state in self._slots]),
        )
        self._logits_BV = logits_BV.float().cpu()

    def _retrieve(self, chunks: Sequence[tuple[SequenceState, int]]) -> None:
        """Retrieve for chunks u (from 1) of sequences, all in one call.

        Sequences that ask for different numbers of neighbours go into one call each: an approximate
        index may answer otherwise when asked for more, and no request may change another's answer.
        """
        m = self._model.config.chunk_length
        by_number: dict[int, list[tuple[SequenceState, int]]] = defaultdict(list)
        for state, u in chunks:
            by_number[state.num_neighbours].append((state, u))
        for num_neighbours, places in by_number.items():
            if num_neighbours == 0 or self._retriever is None:
                continue
            queries = [state.tokens[(u - 1) * m : u * m] for state, u in places]
            found = self._retriever.retrieve_chunks(queries, num_neighbours)
            for row, (state, u) in enumerate(places):
                state.retrieved.append(RetrievedChunk(u, found, row))

    def _neighbour_tensors(
        self, retrieved: Sequence[Sequence[RetrievedChunk]]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What was retrieved, as the model takes it: tokens int64 and mask bool, [B, L, K, R].

        Takes for each of B rows what was retrieved for its L, or fewer, chunks; all is masked where
        nothing was. None if nothing was at all.
        """
        answers = [answer for row in retrieved for answer in row]
        if not answers:
            return None, None
        num_neighbours = max(answer.neighbours.tokens.shape[1] for answer in answers)
        num_chunks = max(len(row) for row in retrieved)
        shape = (len(retrieved), num_chunks, num_neighbours, self._model.config.neighbour_length)
        tokens_BLKR, mask_BLKR = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
        for b, row in enumerate(retrieved):
            for u, answer in enumerate(row):
                k = answer.neighbours.tokens.shape[1]
                tokens_BLKR[b, u, :k] = torch.tensor(answer.neighbours.tokens[answer.row])
                mask_BLKR[b, u, :k] = torch.tensor(answer.neighbours.mask[answer.row])
        return tokens_BLKR.to(self._device), mask_BLKR.to(self._device)
