"""The recall-throughput curve that an index was chosen by, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from retro_ray.index.spec import IndexSpec, OperatingPoint


def chosen_point(points: Sequence[OperatingPoint], spec: IndexSpec) -> OperatingPoint | None:
    """The point that is the setting that a database is searched with: on all its keys, which are measured last."""
    setting = spec.factory, spec.nprobe, spec.refine_factor
    same = [point for point in points if (point.factory, point.nprobe, point.refine_factor) == setting]
    return same[-1] if same else None


def curve_table(points: Sequence[OperatingPoint], spec: IndexSpec) -> str:
    """One line per measured setting, the chosen one marked."""
    head = f"{'index':<32} {'keys':>10} {'nprobe':>6} {'refine':>6} {'recall@10':>9} {'queries/s':>10}"
    lines = [f"  {head} {'bytes/chunk':>11}"]
    chosen = chosen_point(points, spec)
    for point in points:
        mark = "*" if point is chosen else " "
        lines.append(
            f"{mark} {point.factory:<32} {point.num_chunks:>10,} {point.nprobe:>6} {point.refine_factor:>6.1f} "
            f"{point.recall:>9.4f} {point.queries_per_s:>10,.0f} {point.bytes_per_chunk:>11.0f}"
        )
    return "\n".join(lines)


def plot_curve(points: Sequence[OperatingPoint], spec: IndexSpec, target_recall: float | None, path: Path) -> None:
    """Draw recall against throughput for every index that was measured, into an image file."""
    # Imported here: it takes a second, which those who only look at the table need not wait for.
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_prop_cycle(color=colormaps["tab20"](range(20)))  # more families than colours by default
    # An index of one piece and the same one in its shards differ in what a chunk takes.
    curves: dict[tuple[str, int, float], list[OperatingPoint]] = {}
    for point in sorted(points, key=lambda point: point.nprobe):
        curves.setdefault((point.factory, point.num_chunks, point.bytes_per_chunk), []).append(point)
    # The index of the database stands out from those of a sample.
    sizes = {num_chunks for _, num_chunks, _ in curves}
    for (factory, num_chunks, bytes_per_chunk), line in curves.items():
        look = {"color": "black", "linewidth": 2.5} if len(sizes) > 1 and num_chunks == max(sizes) else {}
        axes.plot(
            [point.recall for point in line],
            [point.queries_per_s for point in line],
            marker="o",
            markersize=3.5,
            **look,
            label=f"{factory}, {num_chunks:,} keys, {bytes_per_chunk:.0f} bytes per chunk",
        )
    if (chosen := chosen_point(points, spec)) is not None:
        place = chosen.recall, chosen.queries_per_s
        axes.plot(*place, marker="*", markersize=16, color="crimson", markeredgecolor="white", zorder=5)
        axes.annotate("chosen", place, ha="right", textcoords="offset points", xytext=(-8, -14))
    if target_recall is not None:
        axes.axvline(target_recall, color="grey", linestyle="--", linewidth=1)
    axes.set(yscale="log", xlabel="recall@10 against exact search", ylabel="queries per second (batches)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
