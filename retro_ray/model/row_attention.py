"""What new tokens read in a cache on a CPU, each alone: tensors for the loops of compiled_rows.py."""

from __future__ import annotations

import torch
from torch import Tensor

from retro_ray.model import compiled_rows
from retro_ray.model.compiled_loops import as_array, use_threads_of_torch


def read_rows(
    q_NHE: Tensor, keys: Tensor, values: Tensor, slots_N: Tensor, positions_N: Tensor, refusal_BS: Tensor | None = None
) -> Tensor:
    """Attention of new tokens over what a cache holds for their slots: [N, H * E], of the queries' type.

    Args:
        q_NHE: queries, rotated.
        keys: [B, G, S, E]; each of the G heads is for H / G consecutive heads of queries.
        values: [B, G, S, E].
        slots_N: int64, of the tokens.
        positions_N: int64; a token reads the rows up to its own.
        refusal_BS: in place of that: a token reads those of its slot's first rows for which this is 0.
    """
    precise = torch.promote_types(q_NHE.dtype, torch.float32)
    read_NHE = torch.empty(q_NHE.shape, dtype=precise)
    cached = as_array(q_NHE.to(precise).contiguous()), as_array(keys), as_array(values), as_array(slots_N)
    use_threads_of_torch()
    if refusal_BS is None:
        compiled_rows.read_past(*cached, as_array(positions_N), as_array(read_NHE))
    else:
        compiled_rows.read_allowed(*cached, as_array(refusal_BS.to(precise)), as_array(read_NHE))
    return read_NHE.flatten(1).to(q_NHE.dtype)
