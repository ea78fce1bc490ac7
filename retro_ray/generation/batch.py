"""Sequences that are decoded together, over one KV cache.

Between two steps every sequence has one token that the model has not read yet, its newest. A step
reads it and chooses the next one. Where that token ends a chunk, the chunk's neighbours condition
what is chosen (paper, sections 2.1 and 2.4): until they are there, the sequence is left out.

Shape letters: B batch, T tokens, D dim, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from retro_ray.config import ModelConfig
from retro_ray.generation.logprobs import TokenScore, token_scores
from retro_ray.generation.neighbours import neighbour_tensors
from retro_ray.generation.sampling import penalise_repetition, sample_token
from retro_ray.generation.sequence import SequenceState
from retro_ray.model.cache import DecodeCache
from retro_ray.model.pointer import DecoderOutput
from retro_ray.model.retro import RetroModel

_SCORED_TOGETHER = 256
"""Positions of a prompt whose logits are there at the same time."""
_MOST_ROWS = 32
"""Tokens of all sequences in one pass, the drafted ones among them: on a CPU, what more would cost is
more than they save."""


class DecodingBatch:
    """Slots in which sequences are decoded together; what a scheduler admits into and steps.

    Args:
        model: in eval mode, on its device, in the dtype to compute in.
        max_batch_size: sequences at most.
    """

    def __init__(self, model: RetroModel, *, max_batch_size: int) -> None:
        self.active: list[SequenceState] = []
        """The sequences that have not finished; each has the slot of its place here."""
        self._model = model
        self._max_batch_size = max_batch_size
        self._device = next(model.parameters()).device
        self._cache: DecodeCache | None = None

    @property
    def num_cached_tokens(self) -> int:
        """Tokens that the cache has memory for."""
        cache, config = self._cache, self._model.config
        if cache is None:
            return 0
        return cache.batch_size * slot_size(config, cache.max_tokens, cache.num_neighbours)

    def fits(self, states: Sequence[SequenceState], max_cached_tokens: int) -> bool:
        """Whether `states` can join without more memory than for so many tokens."""
        together = [*self.active, *states]
        return len(together) <= self._max_batch_size and self._plan(together, max_cached_tokens) is not None

    def admit(self, states: Sequence[SequenceState], max_cached_tokens: int) -> None:
        """Read the prompts of `states`, whose neighbours have arrived, in one pass; choose their first tokens."""
        plan = self._plan([*self.active, *states], max_cached_tokens)
        assert plan is not None, "the sequences do not fit"
        cache = self._with_room(*plan)
        lengths_B = torch.tensor([state.num_prompt_tokens for state in states])
        tokens_BT = torch.zeros(len(states), int(lengths_B.max()), dtype=torch.long)
        for row, state in enumerate(states):
            tokens_BT[row, : state.num_prompt_tokens] = torch.tensor(state.tokens)
        m = self._model.config.chunk_length
        retrieved = [state.retrieved[: state.num_prompt_tokens // m] for state in states]
        neighbours = neighbour_tensors(retrieved, self._model.config.neighbour_length, self._device)
        cache.give_back(max([len(state.tokens) for state in self.active] + lengths_B.tolist()))
        first = len(self.active)
        outputs = self._model.prefill_outputs(
            tokens_BT.to(self._device),
            lengths_B,
            cache,
            *neighbours,
            slots_B=torch.arange(first, first + len(states)),
        )
        for state, output in zip(states, outputs, strict=True):
            self._score_prompt(state, output)
        self.active += states
        for state, output in zip(states, outputs, strict=True):
            self._choose(state, self._model.read_out(output[-1:]).float().cpu())
        self._remove_finished()

    def step(self) -> list[SequenceState]:
        """One more token for every sequence that does not wait for neighbours, or several where its draft
        was right; returns these sequences.

        Those that finish are active no longer.
        """
        running = [slot for slot, state in enumerate(self.active) if not state.is_waiting]
        if not running:
            return []
        assert self._cache is not None
        self._cache.give_back(max(len(state.tokens) for state in self.active))
        # Slots behind the last one that runs need not be computed; those that wait in between are left out.
        states = self.active[: running[-1] + 1]
        most_drafted = max(0, _MOST_ROWS // len(running) - 1)
        drafts = [[] if state.is_waiting else self._draft(state, most_drafted) for state in states]
        read = [
            [] if state.is_waiting else [state.tokens[-1], *draft] for state, draft in zip(states, drafts, strict=True)
        ]
        num_new = [len(tokens) for tokens in read]
        arrived = [[] if state.is_waiting or state.arrived is None else [state.arrived] for state in states]
        neighbours_BLKR, mask_BLKR = neighbour_tensors(arrived, self._model.config.neighbour_length, self._device)
        logits_NV = self._model.decode_tokens(
            torch.tensor([token for tokens in read for token in tokens]),
            num_new,
            self._cache,
            None if neighbours_BLKR is None else neighbours_BLKR[:, 0],
            None if mask_BLKR is None else mask_BLKR[:, 0],
            torch.tensor([bool(row) for row in arrived]),
        )
        for state, logits_TV, draft in zip(states, logits_NV.float().cpu().split(num_new), drafts, strict=True):
            if len(logits_TV):
                self._choose(state, logits_TV, draft)
        if any(drafts):
            self._cache.truncate([len(state.tokens) - 1 for state in states])
        produced = [states[slot] for slot in running]
        self._remove_finished()
        return produced

    def remove(self, state: SequenceState) -> None:
        """Give up a sequence. The last slot takes its place, so that there are no gaps to compute."""
        slot, last = self.active.index(state), len(self.active) - 1
        if slot != last and self._cache is not None:
            self._cache.move(last, slot)
        self.active[slot] = self.active[last]
        self.active.pop()

    def release(self) -> None:
        """Keep no more memory than the active sequences need."""
        if not self.active:
            self._cache = None
        elif self._cache is not None and self._cache.batch_size > len(self.active):
            self._cache.resize(len(self.active), *self._needs(self.active))

    def _draft(self, state: SequenceState, most: int) -> list[int]:
        if state.drafter is None:
            return []
        # The newest token is read with the draft, of which nothing may end a chunk: it would need
        # neighbours that nobody has asked for. A further token is chosen after the last that is right.
        room = self._model.most_new_tokens(len(state.tokens) - 1) - 1
        most = min(most, room, state.max_length - len(state.tokens) - 1)
        return state.drafter.draft(state.tokens, state.retrieved, most)

    def _choose(self, state: SequenceState, logits_TV: torch.Tensor, draft: Sequence[int] = ()) -> None:
        """The tokens that follow in a sequence, under the logits after its newest token and after each
        drafted one: as long as they are the drafted ones, and one more. Or its end, where the prompt is
        all that was asked for.
        """
        request = state.request
        if request.max_tokens == 0:
            state.finish("length")
            return
        num_right = 0
        for position, logits_V in enumerate(logits_TV):
            penalised_V = penalise_repetition(logits_V, state.tokens, request.sampling)
            token = sample_token(penalised_V, request.sampling, state.generator)
            num_top = request.logprobs
            state.append(token, None if num_top is None else token_scores(logits_V[None], [token], num_top)[0])
            if list(draft[position : position + 1]) != [token]:
                break
            num_right += 1
            if state.finish_reason is not None:
                break
        if state.drafter is not None:
            state.drafter.learn(len(draft), num_right)

    def _remove_finished(self) -> None:
        for state in [state for state in self.active if state.finish_reason is not None]:
            self.remove(state)

    def _score_prompt(self, state: SequenceState, output: DecoderOutput) -> None:
        """The log-probabilities of an echoed prompt's tokens; those at t are read at t - 1."""
        num_top = state.request.logprobs
        if num_top is None:
            return
        if state.first_shown == 0:
            state.scores.append(TokenScore(None))
        for start in range(max(state.first_shown, 1), state.num_prompt_tokens, _SCORED_TOGETHER):
            end = min(start + _SCORED_TOGETHER, state.num_prompt_tokens)
            logits_TV = self._model.read_out(output[start - 1 : end - 1]).float()
            state.scores += token_scores(logits_TV, state.tokens[start:end], num_top)

    def _with_room(self, num_slots: int, max_tokens: int, num_neighbours: int) -> DecodeCache:
        """The cache, with slots of that shape; those of the active sequences as they were."""
        shape, cache = (num_slots, max_tokens, num_neighbours), self._cache
        if cache is None or (not self.active and shape != _shape(cache)):
            cache = self._cache = None  # before there is another
            cache = self._cache = self._model.new_cache(num_slots, max_tokens, num_neighbours=num_neighbours)
        elif shape != _shape(cache):
            cache.resize(*shape)
        return cache

    def _plan(self, states: Sequence[SequenceState], max_cached_tokens: int) -> tuple[int, int, int] | None:
        """(slots, tokens, neighbours) of a cache for `states`: the present one's, if it is large enough;
        None if there is too little memory.
        """
        max_tokens, num_neighbours = self._needs(states)
        if self._cache is not None and self.num_cached_tokens <= max_cached_tokens:
            shape = _shape(self._cache)
            if len(states) <= shape[0] and max_tokens <= shape[1] and num_neighbours <= shape[2]:
                return shape
        # A power of two, where there is memory for it: a cache that grows is copied.
        config = self._model.config
        rounded = min(config.context_length, 1 << (max_tokens - 1).bit_length())
        for num_tokens in (rounded, max_tokens):
            num_slots = max_cached_tokens // slot_size(config, num_tokens, num_neighbours)
            if num_slots >= len(states):
                return min(num_slots, self._max_batch_size), num_tokens, num_neighbours
        return None

    @staticmethod
    def _needs(states: Sequence[SequenceState]) -> tuple[int, int]:
        """Tokens and neighbours per chunk of the largest of `states`."""
        return max(state.max_length for state in states), max(state.num_neighbours for state in states)


def slot_size(config: ModelConfig, max_tokens: int, num_neighbours: int) -> int:
    """Memory of one slot, in that of a token in all layers: neighbours are kept in those with CCA, and by the pointer,
    which has keys alone.
    """
    num_rows = num_neighbours * config.neighbour_length * config.num_heads // config.kv_heads
    num_stores = len(config.cca_layers) + (0.5 if config.pointer and config.cca_layers else 0)
    return max_tokens + math.ceil(num_rows * num_stores / config.num_layers)


def _shape(cache: DecodeCache) -> tuple[int, int, int]:
    """(slots, tokens, neighbours)."""
    return cache.batch_size, cache.max_tokens, cache.num_neighbours
