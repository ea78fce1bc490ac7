"""Chunked cross-attention (CCA): how the decoder reads the encoded neighbours of earlier chunks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retro_ray.config import ModelConfig
from retro_ray.model.attention import CrossAttention
from retro_ray.model.attention_kernels import KeysValues, open_empty_rows, split_heads
from retro_ray.model.cached_rows import CachedRows
from retro_ray.model.encoder import EncodedNeighbours, NeighbourEncoder
from retro_ray.model.layers import Rotary, rotary_at, rotate, rotate_rows
from retro_ray.model.new_tokens import NewTokens


def query_rotary(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Rotary:
    """Rotations of the m queries that attend to a chunk's neighbours, the same in every layer."""
    positions = torch.arange(config.chunk_length, 2 * config.chunk_length, device=device)
    return rotary_at(positions, config.head_dim, config.rope_base, dtype)


class ChunkedCrossAttention(CrossAttention):
    """CCA(H, E), residual: the paper's section 2.4 and listing 1.

    The m positions that start at the last token of chunk u attend to E_u, all its neighbours in one
    softmax. Query i in 1..m and neighbour token i' in 1..r are i - i' + m - 1 apart (equation 6),
    the same for every neighbour: the query is rotated to position i + m - 1, the key to i'.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.hidden_dim, config.encoder_dim, config.num_heads, config.head_dim, config.norm_eps)
        self.config = config
        if config.cca_start == "copy":
            self.own_share = nn.Parameter(torch.zeros(config.encoder_dim))
            self.previous_share = nn.Parameter(torch.ones(config.encoder_dim))
        self._start()

    def encoded_keys_values(self, encoded: EncodedNeighbours) -> KeysValues:
        """Keys and values of encoded neighbours, each [N, H, S, E].

        With `cca_start` "copy" the key of a token says which token came before it: a query that
        looks for its own token then finds what followed it there.
        """
        states_NSD, previous_NSD = encoded.states_NSD, encoded.previous_NSD
        if self.config.cca_start == "paper" or previous_NSD is None:
            return self.keys_values(states_NSD, states_NSD, encoded.rotary)
        if not (torch.is_grad_enabled() and isinstance(self.key, nn.Linear)):
            key_input_NSD = self.own_share * states_NSD + self.previous_share * previous_NSD
            return self.keys_values(key_input_NSD, states_NSD, encoded.rotary)
        # The same with the shares multiplied to the weights, which are fewer than the states to be trained through.
        key_NSX = F.linear(states_NSD, self.key.weight * self.own_share)
        key_NSX = key_NSX + F.linear(previous_NSD, self.key.weight * self.previous_share)
        k_NHSE = rotate(split_heads(key_NSX, self.head_dim), encoded.rotary)
        return k_NHSE, split_heads(self.value(states_NSD), self.head_dim)

    def forward(
        self, h_BTD: Tensor, encoded: EncodedNeighbours, rotary: Rotary, sees_BT: Tensor | None = None
    ) -> Tensor:
        """CCA(H, E) for `encoded` neighbours of the first L chunks of every sequence, N = B * L.

        `rotary` is `query_rotary`; `sees_BT` (bool) says which positions may read the neighbours they would attend to.
        """
        attending = encoded.attending(h_BTD, self.config.chunk_length)
        mask = None if encoded.mask_NS is None else open_empty_rows(encoded.mask_NS)[:, None, None]
        x_CMD = self.norm(attending.of_chunks(h_BTD))
        read_BTD = attending.of_sequences(self.read(x_CMD, rotary, self.encoded_keys_values(encoded), mask))
        if sees_BT is not None:
            read_BTD = read_BTD.masked_fill(~sees_BT[..., None], 0)
        return h_BTD + read_BTD

    def step(self, h_ND: Tensor, new: NewTokens, keys: CachedRows, values: CachedRows, refusal_BS: Tensor) -> Tensor:
        """CCA for new tokens, from cached keys and values; of their rows only those not refused."""
        q_NHE = rotate_rows(self.query(self.norm(h_ND)).unflatten(-1, (-1, self.head_dim)), new.neighbour_rotation)
        return h_ND + self.out(new.read_neighbours(q_NHE, keys.of, values.of, refusal_BS))

    def _start(self) -> None:
        """An output of zero, so that the decoder starts as it is without retrieval.

        Or, with `cca_start` "copy", heads that find their own token and add its successor.
        """
        self.initialise(self.config.num_layers)
        nn.init.zeros_(self.out.weight)
        # Copying compares encoder outputs with decoder activations as they are. Between different
        # widths there is nothing to compare, and only the shifted keys and the null key remain.
        if self.config.cca_start == "copy" and self.config.encoder_dim == self.config.hidden_dim:
            with torch.no_grad():
                self.key.weight.copy_(self.query.weight)
                self.out.weight.copy_(0.3 * self.value.weight.T)


@dataclass(frozen=True)
class NeighbourEncoding:
    """What takes neighbours to the keys and values that new tokens read."""

    encoder: NeighbourEncoder
    ccas: Mapping[int, ChunkedCrossAttention]
    """By the number of the layer."""
