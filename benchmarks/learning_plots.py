"""Pictures of benchmarks/learning.py: validation while the models train, and the end of every seed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.learning_plan import Plan
from retro_ray.training.progress import METRICS_NAME, read_metrics

_CURVES = (
    ("baseline", "off", "black"),
    ("paper", "off", "tab:orange"),
    ("paper", "on", "tab:blue"),
    ("default", "off", "tab:red"),
    ("default", "on", "tab:green"),
)
_BARS = ("baseline_bpb", "paper_off_bpb", "paper_on_bpb", "off_bpb", "on_random_bpb", "on_bpb", "updated_on_bpb")


def plot_curves(plan: Plan, seeds: Iterable[int], path: Path) -> None:
    """Bits per byte of some held-out documents by tokens trained on: mean of the seeds, and their range."""
    figure, axis = _figure()
    for kind, mode, colour in _CURVES:
        values: dict[int, list[float]] = defaultdict(list)
        for seed in seeds:
            rows = read_metrics(getattr(plan, kind)(seed).folder / METRICS_NAME)
            for row in rows:
                if (value := row.get(f"validation_bpb_{mode}")) is not None:
                    values[row["step"]].append(value)
        if not values:
            continue
        # Where a seed has not come so far, the mean of the others would jump.
        num_seeds = max(map(len, values.values()))
        steps = sorted(step for step, some in values.items() if len(some) == num_seeds)
        means = [sum(values[step]) / len(values[step]) for step in steps]
        axis.plot(steps, means, "o-", color=colour, markersize=3, label=f"{kind}, retrieval {mode}: {means[-1]:.3f}")
        lowest, highest = ([pick(values[step]) for step in steps] for pick in (min, max))
        axis.fill_between(steps, lowest, highest, color=colour, alpha=0.2)
    axis.set(title="held-out documents while training", xlabel="step of 2,048 tokens", ylabel="bits per byte")
    if axis.get_legend_handles_labels()[0]:
        axis.legend()
    figure.savefig(path, dpi=120, format="png")


def plot_spread(metrics: Mapping[str, Any], path: Path) -> None:
    """Bits per byte of all held-out documents at the end: a point for each seed."""
    figure, axis = _figure()
    names = [name for name in _BARS if f"{name}_seeds" in metrics]
    for place, name in enumerate(names):
        values = metrics[f"{name}_seeds"]
        axis.plot([place] * len(values), values, "o", color="tab:blue", alpha=0.7)
        axis.hlines(metrics[name], place - 0.25, place + 0.25, color="black")
        axis.annotate(f"{metrics[name]:.4f}", (place + 0.28, metrics[name]), fontsize=8, va="center")
    axis.set(title="held-out documents, every seed and the mean", ylabel="bits per byte")
    axis.set_xticks(range(len(names)), [name.removesuffix("_bpb").replace("_", "\n") for name in names], fontsize=8)
    axis.margins(x=0.12)
    figure.savefig(path, dpi=120, format="png")


def _figure() -> tuple[Figure, Any]:
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.grid(alpha=0.3)
    return figure, axis
