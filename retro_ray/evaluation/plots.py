"""Pictures of an evaluation as SVG that stands in a page: no background, text in the page's own colour."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np

LABELS = {"on": "RETRO[ON]", "off": "RETRO[OFF]", "baseline": "baseline", "random": "random neighbours"}
COLOURS = {"on": "#2a9d5c", "off": "#d1495b", "baseline": "#7a7a8c", "random": "#c98a1b"}
_LINES = "#8a8a8a"


def leakage_plot(result: dict[str, Any]) -> str:
    """bpb(alpha), and how many chunks are under each alpha (paper, figure 5)."""

    def draw(figure: Any) -> None:
        bits, counts = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        points = [point for point in result["leakage"] if point["chunks"]]
        alphas = [point["alpha"] for point in points]
        for name in ("baseline", "off", "on"):
            if name in result["bits_per_byte"]:
                values = [point["bits_per_byte"][name] for point in points]
                bits.plot(alphas, values, "o-", color=COLOURS[name], label=LABELS[name], markersize=4)
        bits.set(ylabel="bits per byte")
        bits.legend(frameon=False)
        counts.bar(alphas, [point["chunks"] for point in points], width=0.045, color=_LINES)
        counts.set(xlabel="alpha: most of a chunk that may stand in its neighbours word for word", ylabel="chunks")
        counts.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")

    return _svg(draw, height=4.6)


def place_plot(result: dict[str, Any]) -> str:
    """Loss by place in the chunk."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for name in ("off", "random", "on"):
            nats = np.array(result["nats_by_place"][name], float)
            axes.plot(np.arange(1, len(nats) + 1), nats, color=COLOURS[name], label=LABELS[name], linewidth=1.4)
        axes.set(xlabel="place of the token in its chunk", ylabel="nats per token")
        figure.legend(loc="outside upper center", ncols=3, frameon=False)

    return _svg(draw)


def sweep_plot(result: dict[str, Any], axis: str) -> str:
    """Bits per byte along one axis, with the saving over retrieval off and its interval."""
    points = [point for point in result["points"] if point["axis"] == axis]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        places = np.arange(len(points))
        gains = np.array([point["gain_over_off"] for point in points], float) * 100
        bounds = np.array([point["gain_interval"] for point in points], float) * 100
        errors = np.abs(np.nan_to_num(bounds.T - gains, nan=0.0))
        axes.errorbar(places, gains, yerr=errors, fmt="o-" if axis in _ORDERED else "o", color=COLOURS["on"], capsize=4)
        axes.margins(x=0.15)
        axes.axhline(0, color=COLOURS["off"], linewidth=1)
        axes.set_xticks(places, [point["value"] for point in points])
        axes.set(xlabel=AXIS_NAMES[axis], ylabel="bits saved over\nretrieval off, %")

    return _svg(draw, width=5.2, height=2.8)


_ORDERED = ("k", "share", "nprobe")
AXIS_NAMES = {
    "k": "neighbours per chunk",
    "share": "share of the database's documents",
    "nprobe": "lists of the index that are visited, or rows of a graph in view",
    "parts": "what of the neighbours is shown",
    "rerank": "reranking of the neighbours",
}


def training_plot(rows: list[dict[str, Any]]) -> str:
    """Training loss and validation bits per byte."""

    def draw(figure: Any) -> None:
        loss, bits = figure.subplots(1, 2)
        steps = [row["step"] for row in rows if "loss" in row]
        loss.plot(steps, [row["loss"] for row in rows if "loss" in row], color="#3a7ebf", linewidth=0.8)
        loss.set(xlabel="step", ylabel="training loss, nats per token")
        for mode in ("off", "on"):
            points = [(row["step"], row[f"validation_bpb_{mode}"]) for row in rows if f"validation_bpb_{mode}" in row]
            if points:
                bits.plot(*zip(*points, strict=True), "o-", color=COLOURS[mode], label=LABELS[mode], markersize=4)
        bits.set(xlabel="step", ylabel="validation, bits per byte")
        if bits.get_legend_handles_labels()[0]:
            bits.legend(frameon=False)

    return _svg(draw, width=9.5)


def _svg(draw: Callable[[Any], None], width: float = 7.5, height: float = 3.2) -> str:
    # Imported here: it takes a second.
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
    style |= dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "axes.labelcolor"), _LINES)
    style |= {"axes.grid": True, "grid.color": _LINES, "grid.alpha": 0.25, "axes.facecolor": "none"}
    style |= {"axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        target = io.StringIO()
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = target.getvalue()
    return text[text.index("<svg") :]
