"""How much of what stands last in a sequence also stands in front of a neighbour's token.

Shapes: C chunks, M positions of a chunk, S rows of neighbours, W longest n-gram; [...] any.
"""

from __future__ import annotations

import torch
from torch import Tensor

NO_TOKEN = -1
"""In place of a token where there is none."""


def last_tokens(tokens: Tensor, count: int, *, skipped: int = 0, segments: Tensor | None = None) -> Tensor:
    """The last tokens up to each position [..., T], the newest first: [..., T, W].

    Args:
        tokens: [..., T], integers.
        count: W.
        skipped: how many to leave out first; 1 leaves out the position's own.
        segments: [..., T], numbers of packed documents; tokens of others are none.
    """
    length = tokens.shape[-1]
    last = tokens.new_full((*tokens.shape, count), NO_TOKEN)
    for n in range(count):
        back = n + skipped
        if back >= length:
            break
        last[..., back:, n] = tokens[..., : length - back]
        if segments is not None:
            last[..., back:, n].masked_fill_(segments[..., : length - back] != segments[..., back:], NO_TOKEN)
    return last


def match_lengths(last_CMW: Tensor, preceding_CSW: Tensor) -> Tensor:
    """How many of a position's last tokens stand in the same order in front of a row: int64 [C, M, S], from 0 to W."""
    # What is missing on both sides is not the same.
    last_CMW = last_CMW.masked_fill(last_CMW == NO_TOKEN, NO_TOKEN - 1)
    # Compared token by token, each of which lies in one piece; counted in bytes.
    last_WCM, preceding_WCS = (x.movedim(-1, 0).contiguous() for x in (last_CMW, preceding_CSW))
    matches_CMS = last_WCM[0, :, :, None] == preceding_WCS[0, :, None]
    lengths_CMS = matches_CMS.to(torch.int8)
    for last_CM, preceding_CS in zip(last_WCM[1:], preceding_WCS[1:], strict=True):
        matches_CMS &= last_CM[:, :, None] == preceding_CS[:, None]
        # The compiler knows no view of bool, and needs none: it makes one pass of all this.
        lengths_CMS += matches_CMS.to(torch.int8) if torch.compiler.is_compiling() else matches_CMS.view(torch.int8)
    return lengths_CMS.long()
