"""What one pass over whole sequences is given: checked, and turned into masks and rotations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from retro_ray.config import ModelConfig
from retro_ray.errors import ConfigError
from retro_ray.model.attention_kernels import FLEX_HEAD_DIMS, Mask, causal_within
from retro_ray.model.chunked import query_rotary
from retro_ray.model.layers import Rotary, decoder_rotary
from retro_ray.model.ngrams import last_tokens


@dataclass(frozen=True)
class SequenceInputs:
    """What every layer of one pass sees besides H."""

    rotary: Rotary
    query_rotary: Rotary
    """Of the m positions that attend to a chunk's neighbours."""
    mask: Mask | None
    """[B, 1, T, T], where a position may look; None: plain causal."""
    neighbours_BLKR: Tensor | None
    neighbour_mask_BLKR: Tensor | None
    context_mask_NM: Tensor | None
    """bool, the positions of a chunk that the encoding of its neighbours may look at; None: all."""
    sees_BT: Tensor | None
    """bool, the positions that may read the neighbours they would attend to; None: all."""
    last_BTW: Tensor | None = None
    """int64, the last tokens up to each position; only for a pointer that looks at them."""


def sequence_inputs(
    config: ModelConfig,
    tokens_BT: Tensor,
    h_BTD: Tensor,
    neighbours_BLKR: Tensor | None,
    neighbour_mask_BLKR: Tensor | None,
    segments_BT: Tensor | None,
    in_blocks: bool = False,
) -> SequenceInputs:
    """Inputs of a pass over tokens, embedded as `h`; no neighbours at all become None.

    `in_blocks` gives a mask that FlexAttention passes over in blocks, where `head_dim` is one that it takes.

    Raises:
        ConfigError: the neighbours' shape does not fit the tokens or the model.
    """
    num_tokens, device = h_BTD.shape[1], h_BTD.device
    if neighbours_BLKR is not None:
        _require_fit(config, h_BTD, neighbours_BLKR, neighbour_mask_BLKR)
        if neighbours_BLKR.numel() == 0 or not config.cca_layers:
            neighbours_BLKR = neighbour_mask_BLKR = None
    mask = context_mask_NM = sees_BT = None
    if segments_BT is not None:
        mask = causal_within(segments_BT, in_blocks=in_blocks and config.head_dim in FLEX_HEAD_DIMS)
        if neighbours_BLKR is not None:
            context_mask_NM, sees_BT = _segment_masks(segments_BT, neighbours_BLKR.shape[1], config.chunk_length)
    positions = torch.arange(num_tokens, device=device)
    rotary = decoder_rotary(config, positions, h_BTD.dtype)
    last_BTW = None
    if neighbours_BLKR is not None and config.pointer and config.pointer_max_ngram:
        last_BTW = last_tokens(tokens_BT, config.pointer_max_ngram, segments=segments_BT)
    return SequenceInputs(
        rotary=rotary,
        query_rotary=query_rotary(config, device, h_BTD.dtype),
        mask=mask,
        neighbours_BLKR=neighbours_BLKR,
        neighbour_mask_BLKR=neighbour_mask_BLKR,
        context_mask_NM=context_mask_NM,
        sees_BT=sees_BT,
        last_BTW=last_BTW,
    )


def split_chunks(x: Tensor, num_chunks: int, chunk_length: int) -> Tensor:
    """SPLIT: [B, T, ...] -> the first L chunks of each sequence as one batch, [B * L, M, ...]."""
    return x[:, : num_chunks * chunk_length].unflatten(1, (num_chunks, chunk_length)).flatten(0, 1)


def chunks_with_neighbours(mask_NKR: Tensor | None) -> Tensor | None:
    """Numbers of the chunks that have a neighbour, at least one; None: take all.

    To leave out the others saves what retrieval costs in sequences that are to see none. On a GPU all
    are taken: to count them it would have to be waited for.
    """
    if mask_NKR is None or mask_NKR.device.type != "cpu":
        return None
    has_some = mask_NKR.flatten(1).any(1)
    has_some[0] |= ~has_some.any()  # so that the weights get gradients, of zero
    return None if has_some.all() else has_some.nonzero()[:, 0]


def _segment_masks(segments_BT: Tensor, num_chunks: int, chunk_length: int) -> tuple[Tensor, Tensor]:
    """The neighbours of a chunk belong to the document of its last token.

    Their encoding looks at that document's part of the chunk (first mask), and only that document's
    tokens read them (second mask).
    """
    batch_size, num_tokens = segments_BT.shape
    segments_NM = split_chunks(segments_BT, num_chunks, chunk_length)
    owners_BT = segments_NM[:, -1:].expand(-1, chunk_length).reshape(batch_size, -1)
    # Attending positions start at the last token of the first chunk. What is in front and behind
    # reads nothing anyhow.
    owners_BT = F.pad(owners_BT, (chunk_length - 1, num_tokens))[:, :num_tokens]
    return segments_NM == segments_NM[:, -1:], owners_BT == segments_BT


def _require_fit(config: ModelConfig, h_BTD: Tensor, neighbours_BLKR: Tensor, mask_BLKR: Tensor | None) -> None:
    batch_size, num_tokens = h_BTD.shape[:2]
    most_chunks, length = num_tokens // config.chunk_length, config.neighbour_length
    shape = tuple(neighbours_BLKR.shape)
    if len(shape) != 4 or shape[0] != batch_size or shape[1] > most_chunks or shape[3] != length:
        raise ConfigError(
            f"neighbours of shape {shape} do not fit tokens of shape {(batch_size, num_tokens)}: with chunk_length "
            f"{config.chunk_length} they must be [{batch_size}, at most {most_chunks}, any, {length}]"
        )
    if mask_BLKR is not None and tuple(mask_BLKR.shape) != shape:
        raise ConfigError(f"neighbour mask has shape {tuple(mask_BLKR.shape)}; it must be its neighbours', {shape}")
