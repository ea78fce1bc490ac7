from dataclasses import replace
from pathlib import Path

from matplotlib.image import imread

from retro_ray.index.curve import curve_table, plot_curve
from retro_ray.index.spec import IndexSpec, OperatingPoint


def point(factory: str, nprobe: int, recall: float) -> OperatingPoint:
    return OperatingPoint(
        factory=factory,
        nprobe=nprobe,
        refine_factor=2.5,
        num_chunks=120_000,
        recall=recall,
        lower_recall=recall - 0.01,
        queries_per_s=1e5 / nprobe,
        bytes_per_chunk=80.2,
    )


POINTS = [point("IVF64,PQ8x4fs", 4, 0.9), point("IVF64,PQ8x4fs", 8, 0.96), point("IVF64,SQ8", 8, 0.97)]
CHOSEN = IndexSpec(factory="IVF64,PQ8x4fs", nprobe=8, refine_factor=2.5)


def test_the_table_marks_what_was_chosen() -> None:
    header, *lines = curve_table(POINTS, CHOSEN).splitlines()
    assert header.split() == ["index", "keys", "nprobe", "refine", "recall@10", "queries/s", "bytes/chunk"]
    assert [line.startswith("*") for line in lines] == [False, True, False]
    assert lines[1].split() == ["*", "IVF64,PQ8x4fs", "120,000", "8", "2.5", "0.9600", "12,500", "80"]
    assert len({len(line) for line in [header, *lines]}) == 1


def test_the_same_setting_on_a_sample_is_not_what_was_chosen() -> None:
    sample = replace(POINTS[1], num_chunks=50_000)
    lines = curve_table([sample, *POINTS], CHOSEN).splitlines()[1:]
    assert [line.startswith("*") for line in lines] == [False, False, True, False]


def test_the_picture_shows_every_family(tmp_path: Path) -> None:
    plot_curve(POINTS, CHOSEN, 0.95, tmp_path / "all.png")
    plot_curve(POINTS[:2], CHOSEN, 0.95, tmp_path / "one.png")
    both, one = imread(tmp_path / "all.png"), imread(tmp_path / "one.png")
    assert both.shape == one.shape
    assert (both != one).any()
