"""From a row of logits to a token: repetition penalty, temperature, top-k, top-p, min-p, and a
generator per request.

Shape letters: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from retro_ray.errors import PromptError


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How one request chooses its tokens."""

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens; 0: all. Equal logits go to the lower token id."""
    top_p: float = 1.0
    """Only the smallest set of likeliest tokens that holds at least this much probability."""
    min_p: float = 0.0
    """Only tokens at least this many times as likely as the likeliest one."""
    repetition_penalty: float = 1.0
    """Logits of tokens that are in the prompt or the text so far are divided by it where they are
    positive, multiplied where negative (Keskar et al. 2019, section 4.1); 1 changes nothing."""
    seed: int | None = None
    """Same seed, same request: same tokens. None: a fresh one each time."""

    def __post_init__(self) -> None:
        _require(0 <= self.temperature <= 100, "temperature", self.temperature, "from 0 to 100")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (all) or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0, at most 1")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 to 1")
        _require(0 < self.repetition_penalty <= 10, "repetition_penalty", self.repetition_penalty, "above 0, up to 10")
        if self.seed is not None:
            _require(0 <= self.seed < 2**63, "seed", self.seed, "from 0 to 2**63 - 1")

    def new_generator(self) -> torch.Generator:
        """A source of randomness for one request alone, so that its neighbours in a batch change nothing."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def penalise_repetition(logits_V: torch.Tensor, seen: Sequence[int], config: SamplingConfig) -> torch.Tensor:
    """`logits_V` as the distribution is made of them, where the text so far is `seen`."""
    if config.repetition_penalty == 1:
        return logits_V
    tokens = torch.tensor(sorted(set(seen)), device=logits_V.device)
    of_seen = logits_V[tokens]
    penalty, bounds = config.repetition_penalty, torch.finfo(logits_V.dtype)
    penalised = torch.where(of_seen > 0, of_seen / penalty, of_seen * penalty)
    # Finite for the smallest penalty, too: infinities have no differences.
    return logits_V.index_copy(0, tokens, penalised.clamp(bounds.min, bounds.max))


def token_probabilities(logits_V: torch.Tensor, config: SamplingConfig) -> np.ndarray:
    """The distribution that a token is drawn from.

    Filters apply one after another to what the former has left, renormalised: temperature, top-k,
    top-p, min-p.

    Args:
        logits_V: [V], any float dtype and device.
        config: its temperature must not be 0, where there is nothing to draw.

    Returns:
        float64 [V], zero outside the kept set; sums to 1.
    """
    tokens, probabilities = _kept_tokens(logits_V, config)
    probabilities_V = np.zeros(len(logits_V))
    probabilities_V[tokens] = probabilities
    return probabilities_V


def sample_token(logits_V: torch.Tensor, config: SamplingConfig, generator: torch.Generator) -> int:
    """The next token of one sequence, drawn with exactly one number of its `generator`.

    Args:
        logits_V: [V].
        config: how to choose.
        generator: the request's own; not used at temperature 0.
    """
    if config.temperature == 0:
        return int(logits_V.argmax())
    tokens, probabilities = _kept_tokens(logits_V, config)
    cumulative = np.cumsum(probabilities)
    drawn = torch.rand(1, generator=generator, dtype=torch.float64).item() * cumulative[-1]
    # The first token whose cumulative mass exceeds the draw. Rounding may push the draw up to the
    # total, which none exceeds: then the one that reaches it.
    place = min(np.searchsorted(cumulative, drawn, side="right"), np.searchsorted(cumulative, cumulative[-1]))
    return int(tokens[place])


def _kept_tokens(logits_V: torch.Tensor, config: SamplingConfig) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that the filters leave, int64 ascending, and their probabilities, float64."""
    logits_V = logits_V.detach().cpu()
    tokens = np.arange(len(logits_V))
    if 0 < config.top_k < len(logits_V):
        lowest = float(logits_V.topk(config.top_k).values[-1])
        tokens = _largest(logits_V.float().numpy(), config.top_k, lowest)
        logits_V = logits_V[torch.from_numpy(tokens)]
    # float64 keeps a cumulative sum over a large vocabulary exact enough for top_p's "at least".
    below_V = logits_V.double() - logits_V.max()  # so that the smallest temperature makes no infinity of the largest
    probabilities = torch.softmax(below_V / config.temperature, dim=-1).numpy()
    if config.top_p < 1:
        kept = _nucleus(probabilities, config.top_p)
        tokens, probabilities = tokens[kept], probabilities[kept]
    if config.min_p > 0:
        kept = probabilities >= config.min_p * probabilities.max()
        tokens, probabilities = tokens[kept], probabilities[kept]
    return tokens, probabilities / probabilities.sum()


def _nucleus(probabilities: np.ndarray, top_p: float) -> np.ndarray:
    """Places, ascending, of the fewest of the largest that hold `top_p` together."""
    # All those below this bound hold less than 1 - top_p together, so that none of them is needed,
    # and only what is left, mostly little, has to be sorted.
    likely = np.flatnonzero(probabilities >= (1 - top_p) / len(probabilities))
    largest = np.sort(probabilities[likely])[::-1]
    count = min(int(np.searchsorted(np.cumsum(largest), top_p)) + 1, len(largest))
    return likely[_largest(probabilities[likely], count, largest[count - 1])]


def _largest(values: np.ndarray, count: int, lowest: float) -> np.ndarray:
    """Places, ascending, of the `count` largest values, the last of which is `lowest`; of equal ones the first."""
    places = np.flatnonzero(values >= lowest)
    excess = len(places) - count
    return np.delete(places, np.flatnonzero(values[places] == lowest)[-excess:]) if excess else places


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise PromptError(f"{name} is {value!r}; it must be {wanted}")
