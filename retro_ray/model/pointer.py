"""The pointer: what neighbours say next as a part of the output's distribution.

A pointer sentinel mixture (Merity et al. 2016) over the neighbours' tokens: a position's attention to them is
probability given to these tokens, and what it gives to a sentinel remains for the softmax over the vocabulary. A
position without neighbours gives all to the sentinel, and has the logits of a model without a pointer, to the bit.

Shapes: B sequences, T tokens, C chunks with neighbours, M chunk length, S rows of encoded neighbours, D width, V
vocabulary; [...] any positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import EllipsisType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retro_ray.config import ModelConfig
from retro_ray.model.attending import Attending
from retro_ray.model.encoder import EncodedNeighbours
from retro_ray.model.layers import Linear, start_normal
from retro_ray.model.ngrams import match_lengths

_SENTINEL_START = 8.0
"""Logit of the sentinel at the start: well above what a few hundred tokens that do not fit come to together, below what
one gets that fits."""
_MATCH_START = 2.0
"""What each further token of a match adds to a row's logit at the start: four of them come up to the sentinel."""

Where = Tensor | slice | int | tuple[Tensor | slice | int | EllipsisType, ...]


@dataclass(frozen=True)
class Pointed:
    """Shares of probability that positions [...] give to neighbour tokens."""

    shares: Tensor
    """[..., S], float32 or wider."""
    log_kept: Tensor
    """[...]: the logarithm of what remains for the vocabulary."""
    chunks: Tensor
    """int64 [...]: whose neighbours they are."""
    tokens_CS: Tensor
    """int64: the neighbours' tokens, chunk by chunk."""

    def __getitem__(self, where: Where) -> Pointed:
        return Pointed(self.shares[where], self.log_kept[where], self.chunks[where], self.tokens_CS)

    def given_to(self, tokens: Tensor) -> Tensor:
        """What is given to one token [...] of each position, [...]."""
        return (self.shares * (self.tokens_CS[self.chunks] == tokens[..., None])).sum(-1)

    def mixed_with(self, logits: Tensor) -> Tensor:
        """Logits [..., V] of the mixture with those of the vocabulary, which they are to the bit where nothing is
        pointed at.
        """
        mass = torch.zeros_like(logits).scatter_add(-1, self.tokens_CS[self.chunks], self.shares.to(logits.dtype))
        kept = logits + self.log_kept[..., None].to(logits.dtype)
        # The logarithm of nothing would spoil the gradients, although it is not chosen.
        log_mass = mass.clamp_min(torch.finfo(mass.dtype).tiny).log() + _log_sum(logits, logits.log_softmax(-1))
        return torch.where(mass > 0, torch.logaddexp(kept, log_mass), kept)


@dataclass(frozen=True)
class DecoderOutput:
    """What READ makes logits of, for positions [...]."""

    hidden: Tensor
    """Final normalised activations [..., D]."""
    pointed: Pointed | None = None

    def flatten(self) -> DecoderOutput:
        """Of positions [B, T] as [B * T]."""
        pointed = self.pointed
        if pointed is not None:
            shares, log_kept, chunks = (x.flatten(0, 1) for x in (pointed.shares, pointed.log_kept, pointed.chunks))
            pointed = Pointed(shares, log_kept, chunks, pointed.tokens_CS)
        return DecoderOutput(self.hidden.flatten(0, 1), pointed)

    def __getitem__(self, where: Where) -> DecoderOutput:
        return DecoderOutput(self.hidden[where], None if self.pointed is None else self.pointed[where])

    def split(self, size: int) -> Iterator[DecoderOutput]:
        """Parts of so many rows of the first dimension; of none, one without any, as of a tensor."""
        return (self[start : start + size] for start in range(0, max(1, len(self.hidden)), size))


@dataclass(frozen=True)
class PointedRows:
    """The S neighbour tokens that each of N positions may point at."""

    keys_NSD: Tensor
    mask_NS: Tensor
    """bool: True for those that are there."""
    tokens_NS: Tensor
    """int64."""
    preceding_NSW: Tensor | None
    """int64, those in front of each, the nearest first; for a model that looks at matches."""


class NeighbourPointer(nn.Module):
    """How much each position gives to the tokens of its neighbours.

    A neighbour's token is found by what stands before it, and by what it is: its key comes from the encodings of its
    predecessor and of itself. At first the predecessor alone counts, and the query starts as its key does, so that a
    position looks for what is like itself. How many tokens it has in common with a position exactly, going back from
    the predecessor, adds to its logit by as much as the position sees fit.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.query = Linear(config.hidden_dim, config.hidden_dim, bias=False)
        self.previous_key = Linear(config.encoder_dim, config.hidden_dim, bias=False)
        self.own_key = Linear(config.encoder_dim, config.hidden_dim, bias=False)
        self.sentinel = nn.Linear(config.hidden_dim, 1)
        self.match = nn.Linear(config.hidden_dim, config.pointer_max_ngram) if config.pointer_max_ngram else None
        start_normal(self.query)
        start_normal(self.previous_key)
        nn.init.zeros_(self.own_key.weight)
        if config.encoder_dim == config.hidden_dim:
            with torch.no_grad():
                self.previous_key.weight.copy_(self.query.weight)
        nn.init.zeros_(self.sentinel.weight)
        nn.init.constant_(self.sentinel.bias, _SENTINEL_START)
        if self.match is not None:
            nn.init.zeros_(self.match.weight)
            nn.init.constant_(self.match.bias, _MATCH_START)

    def keys(self, encoded: EncodedNeighbours) -> Tensor:
        """[C, S, D]."""
        assert encoded.previous_NSD is not None
        return self.previous_key(encoded.previous_NSD) + self.own_key(encoded.states_NSD)

    def forward(
        self,
        h_BTD: Tensor,
        last_BTW: Tensor | None,
        encoded: EncodedNeighbours,
        attending: Attending,
        sees_BT: Tensor | None,
    ) -> Pointed:
        """For whole sequences.

        Args:
            h_BTD: final activations.
            last_BTW: the last tokens up to each position; for a model that looks at matches.
            encoded: the neighbours.
            attending: which positions read which of them.
            sees_BT: bool, the positions that may see what they would attend to; None: all.
        """
        last_CMW = None if last_BTW is None else attending.of_chunks(last_BTW)
        h_CMD, keys_CSD = attending.of_chunks(h_BTD), self.keys(encoded)
        log_kept_CM, shares_CMS = self._shares(h_CMD, last_CMW, keys_CSD, encoded.token_mask_NS, encoded.preceding_NSW)
        log_kept_BT = attending.of_sequences(log_kept_CM[..., None])[..., 0]
        shares_BTS = attending.of_sequences(shares_CMS)
        if sees_BT is not None:
            shares_BTS = shares_BTS.masked_fill(~sees_BT[..., None], 0)
            log_kept_BT = log_kept_BT.masked_fill(~sees_BT, 0)
        return Pointed(shares_BTS, log_kept_BT, attending.chunk_numbers(h_BTD.device), encoded.tokens_NS)

    def step(self, h_ND: Tensor, last_NW: Tensor | None, rows: PointedRows) -> Pointed:
        """For new tokens, each with its own rows; a token without neighbours has an all-False mask."""
        last_N1W = None if last_NW is None else last_NW[:, None]
        log_kept_N1, shares_N1S = self._shares(h_ND[:, None], last_N1W, rows.keys_NSD, rows.mask_NS, rows.preceding_NSW)
        numbers_N = torch.arange(len(h_ND), device=h_ND.device)
        return Pointed(shares_N1S[:, 0], log_kept_N1[:, 0], numbers_N, rows.tokens_NS)

    def _shares(
        self,
        h_CMD: Tensor,
        last_CMW: Tensor | None,
        keys_CSD: Tensor,
        mask_CS: Tensor,
        preceding_CSW: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The logarithm of the sentinel's share [C, M], and the tokens' shares [C, M, S]; float32 or wider."""
        scores_CMS = (self.query(h_CMD) * h_CMD.shape[-1] ** -0.5) @ keys_CSD.transpose(-1, -2)
        scores_CMS = scores_CMS.to(torch.promote_types(scores_CMS.dtype, torch.float32))
        if self.match is not None:
            assert last_CMW is not None
            assert preceding_CSW is not None
            of_length = F.pad(self.match(h_CMD).to(scores_CMS.dtype).cumsum(-1), (1, 0))
            scores_CMS = scores_CMS + of_length.gather(-1, match_lengths(last_CMW, preceding_CSW))
        scores_CMS = scores_CMS.masked_fill(~mask_CS[:, None], torch.finfo(scores_CMS.dtype).min)
        sentinel_CM1 = self.sentinel(h_CMD).to(scores_CMS.dtype)
        # Among the tokens first, in rows that fill vectors where a cache holds them: see `ROW_BLOCK`.
        log_among_CMS = scores_CMS.log_softmax(-1)
        log_sum_CM1 = _log_sum(scores_CMS, log_among_CMS)
        log_all_CM1 = torch.logaddexp(sentinel_CM1, log_sum_CM1)
        return (sentinel_CM1 - log_all_CM1)[..., 0], (log_among_CMS + (log_sum_CM1 - log_all_CM1)).exp()


def _log_sum(x: Tensor, log_softmax_of_x: Tensor) -> Tensor:
    """The logarithm of the sum of e^x over the last dimension, which is kept. (torch's logsumexp may add up in another
    order for one row than for several.)
    """
    return x.amax(-1, keepdim=True) - log_softmax_of_x.amax(-1, keepdim=True)
