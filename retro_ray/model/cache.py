"""What incremental decoding remembers: one slot per sequence, each at its own length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from retro_ray.config import ModelConfig
from retro_ray.errors import ConfigError
from retro_ray.model.attention_kernels import KeysValues, open_empty_rows
from retro_ray.model.cached_rows import CachedRows, resized, rows_to_read, whole_blocks
from retro_ray.model.causal_attention import refusal
from retro_ray.model.encoder import EncodedNeighbours
from retro_ray.model.ngrams import NO_TOKEN
from retro_ray.model.pass_graph import PassGraphs
from retro_ray.model.pointer import PointedRows


class DecodeCache:
    """Slots for `batch_size` sequences of up to `max_tokens` tokens.

    Per slot: the keys and values of self-attention in every layer; those of the newest complete
    chunk's encoded neighbours in every CCA layer; and the activations that condition the encoding of
    the next chunk's neighbours. A slot without neighbours has an all-False `cca_mask` row and zero
    values, so that CCA reads zero from it.

    Keys and values of self-attention take memory for the slots and tokens in use, and grow with them.
    With `rows_dtype` int8, they and those of neighbours are held in eight bits; the default is `dtype`.
    """

    records_passes = True
    """Whether passes over it are recorded, on a GPU."""

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_tokens: int,
        num_neighbours: int,
        device: torch.device,
        dtype: torch.dtype,
        rows_dtype: torch.dtype | None = None,
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(batch_size, *shape, device=device, dtype=dtype)

        self._config = config
        self.max_tokens = max_tokens
        self.num_neighbours = num_neighbours
        # On the CPU, because lengths steer the decoding and reading them must not wait for a GPU.
        self.lengths = torch.zeros(batch_size, dtype=torch.int64)

        def rows(num_slots: int, num_heads: int, num_rows: int) -> CachedRows:
            shape = num_slots, num_heads, num_rows, config.head_dim
            return CachedRows.zeros(*shape, device=device, dtype=rows_dtype or dtype)

        self.keys = [rows(0, config.kv_heads, 0)] * config.num_layers
        self.values = [rows(0, config.kv_heads, 0)] * config.num_layers
        of_neighbours = batch_size, config.num_heads, self.num_cca_rows
        self.cca_keys = {layer: rows(*of_neighbours) for layer in config.cca_layers}
        self.cca_values = {layer: rows(*of_neighbours) for layer in config.cca_layers}
        self.cca_mask = torch.zeros(batch_size, self.num_cca_rows, device=device, dtype=torch.bool)
        # Of the pointer, if the model has one.
        self._has_pointer = config.pointer and bool(config.cca_layers)
        self._max_ngram = config.pointer_max_ngram if self._has_pointer else 0
        num_pointed_rows = self._num_pointed_rows

        def none(*shape: int) -> Tensor:
            return torch.full((batch_size, *shape), NO_TOKEN, device=device, dtype=torch.int64)

        self.pointer_keys = zeros(num_pointed_rows, config.hidden_dim)
        self.pointer_mask = torch.zeros(batch_size, num_pointed_rows, device=device, dtype=torch.bool)
        self.neighbour_tokens = torch.zeros(batch_size, num_pointed_rows, device=device, dtype=torch.int64)
        self.preceding_tokens = none(num_pointed_rows, self._max_ngram)
        self.tokens = none(max_tokens if self._max_ngram else 0)
        """[B, T], int64: those read so far; what is behind a slot's length means nothing."""
        self.num_neighbour_rows = torch.zeros(batch_size, dtype=torch.int64)
        """[B], on the CPU: rows of the CCA keys that hold something; 0 without neighbours."""
        self.chunk_hidden = zeros(config.chunk_length, config.hidden_dim)
        """[B, M, D]: H of the unfinished chunk in layer min(P), position t at row t modulo m."""
        self.pass_graphs = PassGraphs() if self.records_passes and device.type == "cuda" else None
        """Of passes over these tensors; None: passes are not recorded."""

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def held_slots(self) -> int:
        """Slots that there are keys and values for at the moment."""
        return self.keys[0].shape[0]

    @property
    def held_rows(self) -> int:
        """Tokens per slot that there are keys and values for at the moment."""
        return self.keys[0].shape[2]

    @property
    def num_cca_rows(self) -> int:
        """Rows that CCA reads per slot: all tokens of all neighbours, with "copy" a null row, and what
        fills the last block.
        """
        return whole_blocks(self.num_neighbours * self._config.neighbour_length + (self._config.cca_start == "copy"))

    @property
    def _num_pointed_rows(self) -> int:
        """Rows per slot that the pointer may point at."""
        return self.num_cca_rows if self._has_pointer else 0

    def make_room(self, num_slots: int, num_tokens: int) -> None:
        """Let the first slots have room for the keys and values of so many tokens; no slot loses any."""
        held_slots = self.held_slots
        if num_slots > held_slots or num_tokens > self.held_rows:
            if self.pass_graphs is not None:  # which are forgotten with every step of growth
                num_tokens = min(1 << (num_tokens - 1).bit_length(), self.max_tokens)
            self._hold(max(num_slots, held_slots), max(whole_blocks(num_tokens), self.held_rows))

    def give_back(self, num_tokens: int) -> None:
        """Keep no more rows than for so many tokens in a slot, if that is less than half of them."""
        if self.held_rows > 2 * whole_blocks(num_tokens):
            self._hold(self.held_slots, whole_blocks(num_tokens))

    def _hold(self, num_slots: int, num_rows: int) -> None:
        """Keys and values of self-attention for so many slots and tokens. Tensor by tensor, so that old and new are
        never there together.
        """
        if self.pass_graphs is not None:
            self.pass_graphs.clear()
        for store in (self.keys, self.values):
            for number, old in enumerate(store):
                store[number] = old.resized(num_slots, num_rows)

    def move(self, source: int, target: int) -> None:
        """Copy slot `source` over slot `target`."""
        num_tokens = int(self.lengths[source])
        for rows in (*self.keys, *self.values):
            rows.move(source, target, num_tokens)
        for rows in (*self.cca_keys.values(), *self.cca_values.values()):
            rows.move(source, target, self.num_cca_rows)
        neighbours = self.cca_mask, self.num_neighbour_rows
        pointer = self.pointer_keys, self.pointer_mask, self.neighbour_tokens, self.preceding_tokens
        for store in (self.lengths, self.tokens, self.chunk_hidden, *neighbours, *pointer):
            store[target] = store[source]

    def resize(self, batch_size: int, max_tokens: int, num_neighbours: int) -> None:
        """Make room for more, or for less: what does not fit any longer is lost."""
        self.max_tokens, self.num_neighbours = max_tokens, num_neighbours
        self._hold(min(self.held_slots, batch_size), min(self.held_rows, whole_blocks(max_tokens)))
        for store in (self.cca_keys, self.cca_values):
            for layer, old in store.items():
                store[layer] = old.resized(batch_size, self.num_cca_rows)
        self.cca_mask = resized(self.cca_mask, batch_size, self.num_cca_rows)
        num_pointed_rows = self._num_pointed_rows
        self.pointer_keys = resized(self.pointer_keys, batch_size, num_pointed_rows, self.pointer_keys.shape[2])
        self.pointer_mask = resized(self.pointer_mask, batch_size, num_pointed_rows)
        self.neighbour_tokens = resized(self.neighbour_tokens, batch_size, num_pointed_rows)
        self.preceding_tokens = resized(self.preceding_tokens, batch_size, num_pointed_rows, self._max_ngram)
        self.tokens = resized(self.tokens, batch_size, max_tokens if self._max_ngram else 0)
        self.chunk_hidden = resized(self.chunk_hidden, batch_size, *self.chunk_hidden.shape[1:])
        self.num_neighbour_rows = resized(self.num_neighbour_rows, batch_size)
        self.lengths = resized(self.lengths, batch_size)

    def reset(self, slots: int | Tensor) -> None:
        """Empty one slot, or those numbered in an int64 tensor."""
        self.lengths[slots.cpu() if isinstance(slots, Tensor) else slots] = 0
        self.clear_neighbours(slots)

    def clear_neighbours(self, slots: int | Tensor) -> None:
        """Forget the newest chunk's neighbours: CCA contributes zero until others are written."""
        self.cca_mask[slots] = False
        self.pointer_mask[slots] = False
        self.num_neighbour_rows[slots.cpu() if isinstance(slots, Tensor) else slots] = 0
        for values in self.cca_values.values():
            values.clear(slots)

    def write_prompt(self, number: int, slots: Tensor, keys_values: KeysValues) -> None:
        """Store the keys and values of whole prompts, [len(slots), G, T, E], in layer `number`."""
        for store, new in zip((self.keys, self.values), keys_values, strict=True):
            store[number - 1].write(slots, new)

    def truncate(self, lengths_B: Sequence[int]) -> None:
        """Forget tokens behind these lengths of the first slots: drafts that were not accepted.

        Not the first token of a pass: neighbours that it brought stay.
        """
        kept_B = torch.tensor(lengths_B)
        assert bool((kept_B <= self.lengths[: len(kept_B)]).all()), "a sequence does not grow by being cut"
        self.lengths[: len(kept_B)] = kept_B

    def refused_rows(self, num_slots: int) -> Tensor | None:
        """What is added to the scores of the first S rows in the first slots, [num_slots, S]: 0 where CCA may read;
        None: no slot has neighbours.
        """
        num_rows = self.num_rows_to_see(num_slots)
        if not num_rows:
            return None
        return refusal(~open_empty_rows(self.cca_mask[:num_slots, :num_rows]), self.chunk_hidden.dtype)

    def num_rows_to_see(self, num_slots: int) -> int:
        """S of `refused_rows`; 0: no slot has neighbours."""
        num_rows = int(self.num_neighbour_rows[:num_slots].max())
        return rows_to_read(num_rows, self.num_cca_rows) if num_rows else 0

    def pointed_rows(self, slots_N: Tensor, num_rows: int) -> PointedRows:
        """The first S rows that the pointer may point at in some slots."""
        stores = self.pointer_keys, self.pointer_mask, self.neighbour_tokens, self.preceding_tokens
        return PointedRows(*(store[slots_N, :num_rows] for store in stores))

    def write_tokens(self, slots: Tensor, positions: Tensor, tokens: Tensor) -> None:
        """Note tokens at positions of slots, three shapes that fit each other, for a pointer that looks at them."""
        if self._max_ngram:
            self.tokens[slots, positions] = tokens

    def last_tokens(self, slots_N: Tensor, positions_N: Tensor) -> Tensor | None:
        """The last tokens up to some positions, the newest first: int64 [N, W]; None if the pointer does not look at
        any.
        """
        if not self._max_ngram:
            return None
        positions_NW = positions_N[:, None] - torch.arange(self._max_ngram, device=positions_N.device)
        last_NW = self.tokens[slots_N[:, None], positions_NW.clamp_min(0)]
        return last_NW.masked_fill(positions_NW < 0, NO_TOKEN)

    def write_neighbours(
        self,
        slots: Tensor,
        encoded: EncodedNeighbours,
        keys_values: Mapping[int, KeysValues],
        pointer_keys: Tensor | None,
    ) -> None:
        """Store encoded neighbours in cleared slots: by CCA layer, keys and values [len(slots), H, S, E]; and the
        pointer's keys [len(slots), S, D].
        """
        num_rows = encoded.states_NSD.shape[1]
        self.cca_mask[slots, :num_rows] = True if encoded.mask_NS is None else encoded.mask_NS
        self.num_neighbour_rows[slots.cpu()] = num_rows
        for number, of_layer in keys_values.items():
            for store, new in zip((self.cca_keys[number], self.cca_values[number]), of_layer, strict=True):
                store.write(slots, new)
        if pointer_keys is not None:
            self.pointer_keys[slots, :num_rows] = pointer_keys.to(self.pointer_keys.dtype)
            self.pointer_mask[slots, :num_rows] = encoded.token_mask_NS
            self.neighbour_tokens[slots, :num_rows] = encoded.tokens_NS
        if encoded.preceding_NSW is not None:
            self.preceding_tokens[slots, :num_rows] = encoded.preceding_NSW

    def require_room(self, num_tokens: int, num_neighbours: int) -> None:
        """Raises ConfigError if sequences of `num_tokens` or so many neighbours do not fit."""
        if num_tokens > self.max_tokens:
            raise ConfigError(
                f"a sequence of {num_tokens} tokens does not fit a cache of max_tokens = {self.max_tokens}: "
                "make the cache longer or the sequence shorter"
            )
        if num_neighbours > self.num_neighbours:
            raise ConfigError(
                f"{num_neighbours} neighbours per chunk do not fit a cache of num_neighbours = "
                f"{self.num_neighbours}: make the cache with num_neighbours={num_neighbours}"
            )


class PromptRecorder:
    """Writes what one pass over prompts computes into their slots of a cache."""

    def __init__(self, cache: DecodeCache, slots_B: Tensor, lengths_B: Tensor, chunk_length: int) -> None:
        self._cache = cache
        self._slots_B = slots_B
        self._lengths_B = lengths_B
        self._chunk_length = chunk_length

    def keys_values(self, number: int, k_BHTE: Tensor, v_BHTE: Tensor) -> KeysValues:
        self._cache.write_prompt(number, self._slots_B, (k_BHTE, v_BHTE))
        return k_BHTE, v_BHTE

    def chunk_hidden(self, h_BTD: Tensor) -> None:
        """Keep H of each prompt's unfinished chunk; what is behind the prompt's end there is
        overwritten before it is read.
        """
        starts_B = self._lengths_B // self._chunk_length * self._chunk_length
        positions_BM = (starts_B[:, None] + torch.arange(self._chunk_length)).clamp(max=h_BTD.shape[1] - 1)
        rows_B1 = torch.arange(len(h_BTD))[:, None]
        self._cache.chunk_hidden[self._slots_B] = h_BTD[rows_B1, positions_BM].to(self._cache.chunk_hidden.dtype)

    def newest_chunks(self, encoded: EncodedNeighbours) -> tuple[Tensor, EncodedNeighbours]:
        """The slots whose newest complete chunk is among those encoded, and its neighbours."""
        num_chunks = encoded.states_NSD.shape[0] // len(self._lengths_B)
        newest_B = self._lengths_B // self._chunk_length - 1
        rows = torch.nonzero((newest_B >= 0) & (newest_B < num_chunks))[:, 0]
        return self._slots_B[rows.to(self._slots_B.device)], encoded.chunks(rows * num_chunks + newest_B[rows])
