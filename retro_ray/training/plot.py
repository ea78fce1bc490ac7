"""RUN/loss.png: the training loss, and validation bits per byte with retrieval on and off."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

PLOT_NAME = "loss.png"
_COLOURS = {"on": "tab:green", "off": "tab:red"}


def plot_metrics(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the rows of metrics.jsonl; the file is replaced whole."""
    # Imported here: it takes a second, which a training step that draws nothing need not wait for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axis, bits_axis = figure.subplots(1, 2)
    steps = [row["step"] for row in rows if "loss" in row]
    losses = np.array([row["loss"] for row in rows if "loss" in row])
    loss_axis.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="each step")
    loss_axis.plot(steps, _smoothed(losses), color="tab:blue", label="mean of the last 2 % of the steps")
    loss_axis.set(title="training loss", xlabel="step", ylabel="nats per token")
    for mode, colour in _COLOURS.items():
        points = [(row["step"], row[key]) for row in rows if (key := f"validation_bpb_{mode}") in row]
        if points:
            label = f"retrieval {mode}: {points[-1][1]:.4f}"
            bits_axis.plot(*zip(*points, strict=True), "o-", color=colour, label=label, markersize=4)
    bits_axis.set(title="validation", xlabel="step", ylabel="bits per byte", xlim=loss_axis.get_xlim())
    bits_axis.margins(y=0.2)
    for axis in (loss_axis, bits_axis):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="upper right")
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    figure.savefig(temporary, dpi=120, format="png")
    os.replace(temporary, path)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Mean of the last fiftieth of the run's values at each place."""
    width = max(1, len(values) // 50)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(0, stop - width)
    return (sums[stop] - sums[start]) / (stop - start)
