"""How likely the model found the tokens that were read or chosen. Shape letters: T tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TokenScore:
    """Natural logarithms of the model's own distribution; see TokenLogprob, which this becomes."""

    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability) of the likeliest tokens, likeliest first."""


def token_scores(logits_TV: torch.Tensor, tokens: Sequence[int], num_top: int) -> list[TokenScore]:
    """Scores of `tokens`, each under its row of logits, with `num_top` alternatives."""
    logprobs_TV = torch.log_softmax(logits_TV, dim=-1)
    chosen_T = logprobs_TV.gather(1, torch.tensor(tokens, device=logits_TV.device)[:, None])[:, 0].tolist()
    likeliest = logprobs_TV.topk(min(num_top, logits_TV.shape[1]), dim=-1)
    rows = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    return [
        TokenScore(logprob, tuple(zip(ids, values, strict=True)))
        for logprob, (ids, values) in zip(chosen_T, rows, strict=True)
    ]
