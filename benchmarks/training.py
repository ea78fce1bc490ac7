"""How fast does a model train, beside retro-pytorch, and what does retrieval cost?

Two sizes, the recipe `small` with 1,024 tokens and the paper's smallest with 2,048, the same for both sides: widths,
depths, layers with cross-attention, encoder, heads, vocabulary, batch. Both have a process of their own, compute on all
cores and take their steps in turns, two at a time, since machines change their speed: other tenants can slow matrix
products by a factor of three, for seconds. That only ever adds to a step, so each is rated by the fastest of as many
steps; medians are reported too. retro-pytorch trains in fp32 as it comes; under bf16 autocast, which it leaves to its
user, it is measured too. Tokens are random: no step depends on them.

On a GPU the sizes are the paper's two smallest with 2,048 tokens; ours is measured without torch.compile too, and at
the recipes themselves.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.peak_memory import forget_peak_memory, peak_memory
from benchmarks.training_contenders import ON_GPU, PAPER, SMALL, Contender, Shape, ours, retro_pytorch
from retro_ray.command_line import parse, run
from retro_ray.errors import ConfigError
from retro_ray.recipes import get_recipe
from retro_ray.training.flops import peak_flops, training_flops_per_token
from retro_ray.training.measure import training_rate

_SHAPES = {"cpu": (SMALL, PAPER), "cuda": ON_GPU}
_SEQUENCES_ON_GPU = 16
_STEPS_IN_TURN = 2
"""The first behind others' turns is slower, by up to a quarter, the more so the longer they took."""


@dataclass(frozen=True, kw_only=True)
class TrainingBenchmark:
    """Tokens per second and memory of a training step, ours and retro-pytorch's."""

    device: Literal["cpu", "cuda"] = "cpu"
    """What trains."""
    shapes: tuple[str, ...] = ()
    """small (512 wide with 8 layers), paper (896 wide with 12); on a GPU paper-172m, paper-425m. Default: both."""
    num_rounds: int = 3
    """In each, everyone takes two steps."""
    peers_python: Path = Path(".venv-peers/bin/python")
    """Interpreter of the environment that has retro-pytorch."""
    json: Path | None = None
    """Write the metrics to this file."""


def measure(shape: Shape, benchmark: TrainingBenchmark) -> dict[str, Any]:
    """The metrics of one shape."""
    seconds: dict[str, list[float]] = defaultdict(list)
    peak_bytes: dict[str, int] = {}
    with ours(shape) as us, retro_pytorch(shape, benchmark.peers_python) as peer:
        contenders: dict[str, tuple[Contender, str]] = {
            "ours": (us, "retro"),
            "decoder": (us, "decoder"),
            "retro_pytorch_bf16": (peer, "bf16"),
            "retro_pytorch_fp32": (peer, "fp32"),
        }
        if shape.device == "cuda":
            contenders["eager"] = us, "eager"
        # The first step of a process meets memory that it never had; what others take is not to be in ours.
        for name, (contender, kind) in contenders.items():
            if name != "retro_pytorch_fp32":
                peak_bytes[name] = contender.step(kind).peak_bytes
        products_per_s = 0.0
        for _ in range(benchmark.num_rounds):
            products_per_s = max(products_per_s, peak_flops(torch.device(shape.device), torch.bfloat16) or 0.0)
            for name, (contender, kind) in contenders.items():
                steps = [contender.step(kind) for _ in range(_STEPS_IN_TURN)]
                seconds[name] += [step.seconds for step in steps]
                if name.startswith("retro_pytorch"):
                    peak_bytes[name] = max(peak_bytes.get(name, 0), *(step.peak_bytes for step in steps))
        table = us.step("profile").table or {}
        weights = {"ours": us.num_weights, "retro_pytorch": peer.num_weights}
    rates = {name: shape.num_tokens / min(values) for name, values in seconds.items()}
    medians = {name: shape.num_tokens / statistics.median(values) for name, values in seconds.items()}
    return {
        **{f"tokens_per_s_{name}": rate for name, rate in rates.items()},
        **{f"median_tokens_per_s_{name}": rate for name, rate in medians.items()},
        **_ratios(rates),
        **{f"median_{key}": value for key, value in _ratios(medians).items()},
        **_arithmetic(shape, rates, products_per_s),
        **{f"peak_gib_{name}": peak_bytes[name] / 2**30 for name in peak_bytes if name not in ("decoder", "eager")},
        **{f"millions_of_weights_{name}": number / 1e6 for name, number in weights.items()},
        "step_seconds": dict(seconds),
        "share_of_time": {kind: value / sum(table.values()) for kind, value in table.items()},
    }


def _ratios(rates: dict[str, float]) -> dict[str, float]:
    """Ours over the peer's."""
    return {
        "ratio_default": rates["ours"] / rates["retro_pytorch_fp32"],
        "ratio_bf16": rates["ours"] / rates["retro_pytorch_bf16"],
    }


def _arithmetic(shape: Shape, rates: dict[str, float], peak: float) -> dict[str, float]:
    """What `peak`, the device's rate of matrix products in FLOP/s, says of ours: measured, of a GPU from its data
    sheet.
    """
    per_token = training_flops_per_token(shape.model)
    without = training_flops_per_token(shape.decoder)
    return {
        "bf16_gflop_per_s": peak / 1e9,
        "gemm_fraction": rates["ours"] * per_token / peak,
        "gemm_fraction_decoder": rates["decoder"] * without / peak,
        "retrieval_cost": rates["decoder"] / rates["ours"],
        "retrieval_cost_by_arithmetic": per_token / without,
    }


def recipes_on_gpu() -> dict[str, dict[str, float]]:
    """Tokens per second of the recipes of the same names, and MFU: the share of what the GPU's data sheet gives."""
    device, found = torch.device("cuda"), {}
    print(f"{'recipe':>24}{'compiled':>10}{'tokens/s':>12}{'TFLOP/s':>10}{'MFU':>8}{'GiB':>8}")
    for shape in ON_GPU:
        name, recipe = shape.name, get_recipe(shape.name)(shape.vocab_size)
        for compiled in ("yes", "no"):
            training = dataclasses.replace(
                recipe.training, batch_size=_SEQUENCES_ON_GPU, micro_batch_size=_SEQUENCES_ON_GPU, compile=compiled
            )
            forget_peak_memory(device)
            rate = training_rate(recipe.model, training, device)
            row = {
                "tokens_per_s": rate / training_flops_per_token(recipe.model),
                "tflop_per_s": rate / 1e12,
                "mfu": rate / (peak_flops(device, torch.bfloat16) or float("nan")),
                "peak_gib": peak_memory(device) / 2**30,
            }
            found[f"{name}-{'compiled' if compiled == 'yes' else 'eager'}"] = row
            print(
                f"{name:>24}{compiled:>10}{row['tokens_per_s']:>12,.0f}{row['tflop_per_s']:>10.0f}"
                f"{row['mfu']:>8.1%}{row['peak_gib']:>8.1f}",
                flush=True,
            )
    return found


def report(name: str, metrics: dict[str, Any]) -> str:
    """A table for people."""
    lines = [f"== {name}"]
    lines += [f"{key:>38}  {value:,.4g}" for key, value in metrics.items() if not isinstance(value, dict)]
    lines += [f"{kind:>38}  {share:.1%} of ours" for kind, share in metrics["share_of_time"].items()]
    return "\n".join(lines)


def main(benchmark: TrainingBenchmark) -> None:
    """Measure and report."""
    torch.set_num_threads(os.cpu_count() or 1)
    results: dict[str, Any] = {}
    shapes = {shape.name: shape for shape in _SHAPES[benchmark.device]}
    for name in (names := benchmark.shapes or tuple(shapes)):
        if name not in shapes:
            raise ConfigError(f"--shapes has {name}; with --device {benchmark.device} it must be of {list(shapes)}")
        results[name] = measure(shapes[name], benchmark)
        print(report(name, results[name]), flush=True)
    # The least of the sizes stands for all.
    for metric in ("ratio_default", "ratio_bf16", "gemm_fraction"):
        results[metric] = min(results[name][metric] for name in names)
        print(f"{metric:>38}  {results[metric]:.3g}")
    if benchmark.device == "cuda":
        results["recipes"] = recipes_on_gpu()
    if benchmark.json is not None:
        benchmark.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parsed = parse(TrainingBenchmark, "python -m benchmarks.training")
    run(lambda: main(parsed))
