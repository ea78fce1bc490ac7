"""The neighbour encoder: ENCODER of Algorithm 1, for all chunks of all sequences as one batch.

N stands for B * L, the chunks of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retro_ray.config import ModelConfig
from retro_ray.model.attending import Attending
from retro_ray.model.attention import CrossAttention, SelfAttention
from retro_ray.model.attention_kernels import open_empty_rows
from retro_ray.model.layers import FeedForward, Rotary, rotary_at
from retro_ray.model.ngrams import NO_TOKEN, last_tokens
from retro_ray.model.rms_norm import RMSNorm


@dataclass(frozen=True)
class EncodedNeighbours:
    """The E_u of N chunks, as the chunked cross-attention reads them: S = K * R rows per chunk, the
    neighbours one behind the other; with `cca_start` "copy" a row of zeros in front.

    Masked tokens are zero. No projection has a bias, so their values are zero too, and so are key
    and value of the row in front: to attend to it is to attend to nothing.
    """

    states_NSD: Tensor
    previous_NSD: Tensor | None
    """Each row's predecessor in its neighbour, zero for the first; only for what looks at it: `cca_start` "copy" and
    the pointer."""
    mask_NS: Tensor | None
    """bool, True for rows that may be attended to; None: all of them."""
    rotary: Rotary
    """Rotations of the S rows at positions 1..R of each neighbour."""
    tokens_NS: Tensor
    """int64, the neighbours' own; 0 in the row in front."""
    token_mask_NS: Tensor
    """bool, True for rows of real tokens, which the row in front is not."""
    preceding_NSW: Tensor | None = None
    """int64, the tokens in front of each in its neighbour, the nearest first; only for a pointer that looks at them."""
    numbers_N: Tensor | None = None
    """int64, ascending: which chunks of the batch these N are, if the others have no neighbours; None: all."""
    num_without: int = 0
    """The others."""

    @property
    def num_chunks(self) -> int:
        """Of the batch."""
        return len(self.states_NSD) + self.num_without

    def chunks(self, rows: Tensor) -> EncodedNeighbours:
        """Those of the chunks numbered `rows`, of all chunks."""
        rows = rows.to(self.states_NSD.device)
        return EncodedNeighbours(
            states_NSD=self.states_NSD[rows],
            previous_NSD=None if self.previous_NSD is None else self.previous_NSD[rows],
            mask_NS=None if self.mask_NS is None else self.mask_NS[rows],
            rotary=self.rotary,
            tokens_NS=self.tokens_NS[rows],
            token_mask_NS=self.token_mask_NS[rows],
            preceding_NSW=None if self.preceding_NSW is None else self.preceding_NSW[rows],
        )

    def attending(self, h_BTD: Tensor, chunk_length: int) -> Attending:
        """Which positions of the sequences that `h` is of attend to these."""
        batch_size, num_tokens = h_BTD.shape[:2]
        return Attending(batch_size, num_tokens, self.num_chunks // batch_size, chunk_length, self.numbers_N)


@dataclass(frozen=True)
class EncoderInputs:
    """What every layer of the encoder sees besides E."""

    token_rotary: Rotary
    """Of a neighbour's R tokens."""
    query_rotary: Rotary
    """The same K times over."""
    chunk_rotary: Rotary
    """Of a chunk's M tokens."""
    token_mask: Tensor | None
    """bool [N * K, 1, 1, R]."""
    context_mask: Tensor | None
    """bool [N, 1, 1, M]."""


class EncoderLayer(nn.Module):
    """One layer p' of the encoder; it has a cross-attention if p' is in P_enc."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__()
        dim, heads, eps = config.encoder_dim, config.encoder_heads, config.norm_eps
        self.self_attention = SelfAttention(dim, heads, config.head_dim, eps)
        self.cross_attention = (
            CrossAttention(dim, config.hidden_dim, heads, config.head_dim, eps)
            if number in config.encoder_ca_layers
            else None
        )
        self.feed_forward = FeedForward(dim, config.encoder_ffn_dim, eps)
        for block in (self.self_attention, self.cross_attention, self.feed_forward):
            if block is not None:
                block.initialise(config.encoder_layers)

    def forward(self, e_JRD: Tensor, context_NMD: Tensor, inputs: EncoderInputs) -> Tensor:
        """Of J = N * K neighbours, K for each chunk; `context` is its H_u, normalised."""
        e_JRD = self.self_attention(e_JRD, inputs.token_rotary, inputs.token_mask)
        if (attention := self.cross_attention) is not None:
            # All neighbours of a chunk query its H_u together, so that the keys need not be repeated.
            x_NSD = attention.norm(e_JRD).view(len(context_NMD), -1, e_JRD.shape[-1])
            keys_values = attention.keys_values(context_NMD, context_NMD, inputs.chunk_rotary)
            read_NSD = attention.read(x_NSD, inputs.query_rotary, keys_values, inputs.context_mask)
            e_JRD = e_JRD + read_NSD.view_as(e_JRD)
        return self.feed_forward(e_JRD)


class NeighbourEncoder(nn.Module):
    """Encodes neighbours, conditioned on the activations H_u of the chunk that retrieved them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        layers = nn.ModuleList(EncoderLayer(config, number) for number in range(1, config.encoder_layers + 1))
        self.layers = cast("Sequence[EncoderLayer]", layers)  # a ModuleList forgets its modules' type
        self.context_norm = RMSNorm(config.hidden_dim, eps=config.norm_eps)
        self.norm = RMSNorm(config.encoder_dim, eps=config.norm_eps)

    def forward(
        self,
        tokens_NKR: Tensor,
        e_NKRD: Tensor,
        mask_NKR: Tensor | None,
        h_NMD: Tensor,
        context_mask_NM: Tensor | None = None,
    ) -> EncodedNeighbours:
        """ENCODER(RET(C_u), H_u) for N chunks.

        Args:
            tokens_NKR: int64, neighbour tokens, RET(C_u)^j.
            e_NKRD: the same embedded, EMB_enc(RET(C_u)^j).
            mask_NKR: bool, True for real tokens; None: all are real.
            h_NMD: H_u, the decoder's activations in the chunk.
            context_mask_NM: bool, True for the positions of H_u to look at; at least one per chunk.
        """
        _, num_neighbours, length, _ = e_NKRD.shape
        positions = torch.arange(1, length + 1, device=e_NKRD.device)
        inputs = EncoderInputs(
            token_rotary=self._rotary(positions, e_NKRD.dtype),
            query_rotary=self._rotary(positions.repeat(num_neighbours), e_NKRD.dtype),
            chunk_rotary=self._rotary(positions[: h_NMD.shape[1]], e_NKRD.dtype),
            token_mask=None if mask_NKR is None else open_empty_rows(mask_NKR.flatten(0, 1)[:, None, None]),
            context_mask=None if context_mask_NM is None else context_mask_NM[:, None, None],
        )
        context_NMD = self.context_norm(h_NMD)
        e_JRD = e_NKRD.flatten(0, 1)
        for layer in self.layers:
            e_JRD = layer(e_JRD, context_NMD, inputs)
        return self._as_encoded(tokens_NKR, self.norm(e_JRD).view_as(e_NKRD), mask_NKR)

    def _as_encoded(self, tokens_NKR: Tensor, e_NKRD: Tensor, mask_NKR: Tensor | None) -> EncodedNeighbours:
        _, num_neighbours, length, _ = e_NKRD.shape
        positions = torch.arange(1, length + 1, device=e_NKRD.device).repeat(num_neighbours)
        if mask_NKR is not None:
            e_NKRD = e_NKRD.masked_fill(~mask_NKR[..., None], 0)
        mask_NS = None if mask_NKR is None else mask_NKR.flatten(1)
        states_NSD, previous_NSD = e_NKRD.flatten(1, 2), None
        tokens_NS = tokens_NKR.flatten(1)
        token_mask_NS = torch.ones_like(tokens_NS, dtype=torch.bool) if mask_NS is None else mask_NS
        preceding_NSW = None
        if self.config.pointer and self.config.pointer_max_ngram:
            real_NKR = tokens_NKR if mask_NKR is None else tokens_NKR.masked_fill(~mask_NKR, NO_TOKEN)
            preceding_NSW = last_tokens(real_NKR, self.config.pointer_max_ngram, skipped=1).flatten(1, 2)
        if self.config.cca_start == "copy" or self.config.pointer:
            previous_NSD = F.pad(e_NKRD[:, :, :-1], (0, 0, 1, 0)).flatten(1, 2)
        if self.config.cca_start == "copy":
            states_NSD = F.pad(states_NSD, (0, 0, 1, 0))
            previous_NSD = None if previous_NSD is None else F.pad(previous_NSD, (0, 0, 1, 0))
            positions, tokens_NS, token_mask_NS = (F.pad(x, (1, 0)) for x in (positions, tokens_NS, token_mask_NS))
            mask_NS = None if mask_NS is None else F.pad(mask_NS, (1, 0), value=True)
            preceding_NSW = None if preceding_NSW is None else F.pad(preceding_NSW, (0, 0, 1, 0), value=NO_TOKEN)
        return EncodedNeighbours(
            states_NSD=states_NSD,
            previous_NSD=previous_NSD,
            mask_NS=mask_NS,
            rotary=self._rotary(positions, e_NKRD.dtype),
            tokens_NS=tokens_NS,
            token_mask_NS=token_mask_NS,
            preceding_NSW=preceding_NSW,
        )

    def _rotary(self, positions: Tensor, dtype: torch.dtype) -> Rotary:
        return rotary_at(positions, self.config.head_dim, self.config.rope_base, dtype)
