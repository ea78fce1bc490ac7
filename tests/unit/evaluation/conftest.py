"""Evaluations without Ray."""

from __future__ import annotations

import pytest

from retro_ray.evaluation import evaluate, sweeps, update
from retro_ray.evaluation.passes import PassScorer
from retro_ray.evaluation.scores import PassScores


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes are made here, document by document, from the last to the first."""

    def score(subject, passes, num_workers=None) -> dict[str, PassScores]:
        scorer = PassScorer(subject.text, passes)
        parts = {name: [scorer.score(name, [d]) for d in subject.documents[::-1]] for name in passes}
        return {name: PassScores.concatenated(some) for name, some in parts.items()}

    for module in (evaluate, sweeps, update):
        monkeypatch.setattr(module, "score_passes", score)
