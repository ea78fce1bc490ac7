"""What benchmarks/learning.py makes of the scores that there are: means over seeds, and every seed's own."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.learning_plan import Plan
from benchmarks.learning_training import TrainingRun

Scores = Mapping[str, float]
"""Bits per byte by mode, of the modes that are scored."""
ScoresOf = Callable[[TrainingRun, Path], Scores]
"""Those of a run with the database of a home."""


def corpus_metrics(plan: Plan, seeds: Iterable[int], scores_of: ScoresOf) -> dict[str, Any]:
    """Baseline, paper's start and default; the fitted baseline; what retrieval costs."""
    by_seed = []
    for seed in seeds:
        baseline, paper, default, longer, fitted = (
            scores_of(one, plan.home)
            for one in (plan.baseline(seed), plan.paper(seed), plan.default(seed), plan.longer(seed), plan.fitted(seed))
        )
        one = {f"{mode}_bpb": default[mode] for mode in ("off", "on") if mode in default}
        one |= {f"paper_{mode}_bpb": paper[mode] for mode in ("off", "on") if mode in paper}
        if "random" in default:
            one["on_random_bpb"] = default["random"]
            one["random_gain"] = 1 - default["random"] / default["off"]
        if "off" in baseline:
            one["baseline_bpb"] = baseline["off"]
            one |= _gain("gain_on_over_baseline", baseline["off"], default.get("on"))
            one |= _gain("gain_paper_over_baseline", baseline["off"], paper.get("on"))
            one |= _loss("loss_off_over_baseline", baseline["off"], default.get("off"))
            one |= _loss("loss_paper_off_over_baseline", baseline["off"], paper.get("off"))
        if {"off", "on"} <= set(fitted) and "off" in longer:
            one |= {"longer_bpb": longer["off"], "fitted_on_bpb": fitted["on"]}
            one |= _gain("retrofit_gain", longer["off"], fitted["on"])
            one["retrofit_off_difference"] = fitted["off"] - longer["off"]
        by_seed.append(one)
    return _over_seeds(by_seed) | ({} if plan.cost is None else {"cost": plan.cost})


def update_metrics(plan: Plan, updated_home: Path, seeds: Iterable[int], scores_of: ScoresOf) -> dict[str, Any]:
    """The same checkpoints in front of a database that holds newer versions of the held-out documents."""
    by_seed = []
    for seed in seeds:
        baseline = scores_of(plan.baseline(seed), plan.home)
        updated = scores_of(plan.default(seed), updated_home)
        names = {"on": "updated_on_bpb", "on-1": "updated_on_1_neighbour_bpb"}
        one = {name: updated[mode] for mode, name in names.items() if mode in updated}
        if "off" in baseline:
            one |= _gain("gain_updated_over_baseline", baseline["off"], updated.get("on"))
            one |= _gain("gain_updated_1_neighbour_over_baseline", baseline["off"], updated.get("on-1"))
        by_seed.append(one)
    return _over_seeds(by_seed)


def python_docs_metrics(plan: Plan, seeds: Iterable[int], scores_of: ScoresOf) -> dict[str, Any]:
    """At equal tokens, and against a baseline that was trained for as long."""
    by_seed = []
    for seed in seeds:
        baseline, default = (scores_of(one, plan.home) for one in (plan.baseline(seed), plan.default(seed)))
        one = {f"{mode}_bpb": default[mode] for mode in ("off", "on") if mode in default}
        if "off" in baseline:
            one |= {"baseline_bpb": baseline["off"]} | _gain("gain", baseline["off"], default.get("on"))
            one |= _loss("loss_off_over_baseline", baseline["off"], default.get("off"))
        if plan.cost is not None:
            equal = scores_of(plan.equal_time(seed, plan.cost), plan.home)
            if "off" in equal:
                one |= {"equal_time_bpb": equal["off"]} | _gain("gain_equal_time", equal["off"], default.get("on"))
        by_seed.append(one)
    metrics = _over_seeds(by_seed) | ({} if plan.cost is None else {"cost": plan.cost})
    return {f"python_docs_{name}": value for name, value in metrics.items()}


def _gain(name: str, before: float, after: float | None) -> dict[str, float]:
    return {} if after is None else {name: 1 - after / before}


def _loss(name: str, before: float, after: float | None) -> dict[str, float]:
    return {} if after is None else {name: after / before - 1}


def _over_seeds(by_seed: list[dict[str, float]]) -> dict[str, Any]:
    """The mean of each metric, and `<name>_seeds`: its value for every seed that has it."""
    names = dict.fromkeys(name for one in by_seed for name in one)
    values = {name: [one[name] for one in by_seed if name in one] for name in names}
    means = {name: statistics.fmean(some) for name, some in values.items()}
    return means | {f"{name}_seeds": some for name, some in values.items()}
