"""A model as it generates fastest on its device."""

from __future__ import annotations

import torch

from retro_ray.model.packing import pack_weights
from retro_ray.model.retro import RetroModel
from retro_ray.precision import bf16_is_fast


def fast_model(model: RetroModel, int8: bool = True) -> RetroModel:
    """`model` itself, from now on for generation alone: bf16 where that is fast, weights packed where a
    CPU reads them faster so; with `int8`, in eight bits for new tokens.
    """
    device = model.token_embedding.weight.device
    if bf16_is_fast(device):
        model = model.bfloat16()
    pack_weights(model, int8=int8)
    model.eval()
    if device.type == "cpu":
        _compile_loops(model)
    return model


@torch.inference_mode()
def _compile_loops(model: RetroModel) -> None:
    """What Numba compiles when it is first called on a machine is not left to the first answer."""
    length = model.config.chunk_length
    tokens_BT = torch.zeros(1, length, dtype=torch.int64)
    neighbours_BKR = torch.zeros(1, 1, model.config.neighbour_length, dtype=torch.int64)
    cache = model.new_cache(1, length + 1, num_neighbours=1)
    if length > 1:
        model.prefill(tokens_BT[:, 1:], torch.tensor([length - 1]), cache)
    for _ in range(2):  # the end of a chunk, and a token that reads its neighbours
        model.decode_step(tokens_BT[:, 0], cache, neighbours_BKR)
