"""What a model made of the tokens that are asked for, without more of the distribution than that takes."""

from __future__ import annotations

import math

import torch

from retro_ray.model.pointer import DecoderOutput
from retro_ray.model.retro import RetroModel
from retro_ray.training.vocabulary_loss import LOGITS_AT_ONCE


def target_nats(model: RetroModel, output: DecoderOutput, targets_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats of targets under `model.read_out(output)`, and whether no other token is likelier.

    With a pointer the distributions are not mixed for that: a target's probability is what is pointed at it and what
    the vocabulary gives it; and a target of less than a half is likeliest only if it is so against the vocabulary's
    first, so that few have to be compared with all.

    Args:
        model: whose read-out it is.
        output: of N positions.
        targets_N: int64.

    Returns:
        float32 [N] or wider, and bool [N].
    """
    log_share_N, log_first_N = _of_vocabulary(model, output, targets_N)
    if (pointed := output.pointed) is None:
        return -log_share_N, log_share_N >= log_first_N
    log_kept_N = pointed.log_kept.to(log_share_N.dtype)
    given_N = pointed.given_to(targets_N).to(log_share_N.dtype)
    log_share_N = torch.logaddexp(log_kept_N + log_share_N, given_N.log())
    is_likeliest_N = log_share_N >= log_kept_N + log_first_N
    unsure = torch.nonzero(is_likeliest_N & (log_share_N < math.log(0.5)))[:, 0]
    for rows in unsure.split(_positions_at_once(model)):
        logits = model.read_out(output[rows])
        is_likeliest_N[rows] = logits.gather(1, targets_N[rows, None])[:, 0] >= logits.amax(1)
    return -log_share_N, is_likeliest_N


def _of_vocabulary(
    model: RetroModel, output: DecoderOutput, targets_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logarithms of the shares of targets and of the likeliest tokens in the softmax over the vocabulary, each [N]."""
    h_ND, device = output.hidden, output.hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h_ND.dtype
    wide = torch.promote_types(dtype, torch.float32)
    log_share_N, log_first_N = (torch.empty(len(h_ND), dtype=wide, device=h_ND.device) for _ in range(2))
    size = _positions_at_once(model)
    with torch.autocast(device, enabled=False):
        weight_VD = model.read_out_weight.to(dtype)
        for start in range(0, len(h_ND), size):
            part = slice(start, start + size)
            # Positions are columns, as in the training loss: the order that a CPU's bf16 multiplies fastest.
            logits_VN = (weight_VD @ h_ND[part].to(dtype).T).to(wide)
            of_targets = logits_VN.gather(0, targets_N[None, part])[0]
            first = logits_VN.amax(0)
            log_total = logits_VN.sub_(first).exp_().sum(0).log_()
            log_share_N[part] = of_targets - first - log_total
            log_first_N[part] = -log_total
    return log_share_N, log_first_N


def _positions_at_once(model: RetroModel) -> int:
    device = model.read_out_weight.device.type
    return max(1, LOGITS_AT_ONCE["cpu" if device == "cpu" else "cuda"] // model.config.vocab_size)
