"""Who takes training steps in benchmarks/training.py: each in a process of its own, one step for every line it reads.

As a program this is our own side: `retro` trains a RETRO model as jobs/train.py does, `decoder` the same decoder
without chunked cross-attention and encoder, `profile` a RETRO model under torch's profiler. `eager` is `retro` without
torch.compile, which jobs/train.py uses on a GPU.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch

from benchmarks.peak_memory import forget_peak_memory, peak_memory, wait_for
from retro_ray.allocator import FAST_ALLOCATOR_ENV
from retro_ray.config import ModelConfig, TrainingConfig
from retro_ray.errors import ConfigError
from retro_ray.model.retro import RetroModel
from retro_ray.training.batches import StepBatch
from retro_ray.training.step import TrainingStep
from retro_ray.training.windows import Batch

_PEER = Path(__file__).with_name("retro_pytorch_training.py")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A size at which everyone trains. retro-pytorch has no setting for its heads: everyone has 8 of width 64."""

    name: str
    dim: int
    encoder_dim: int
    layers: int
    cca_layers: tuple[int, ...]
    encoder_layers: int
    num_chunks: int
    batch_size: int
    vocab_size: int = 32_000
    chunk_length: int = 64
    neighbours: int = 2
    threads: int = os.cpu_count() or 1
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def num_tokens(self) -> int:
        """Of a step."""
        return self.batch_size * self.num_chunks * self.chunk_length

    @property
    def model(self) -> ModelConfig:
        """Ours."""
        return ModelConfig(
            vocab_size=self.vocab_size,
            chunk_length=self.chunk_length,
            num_chunks=self.num_chunks,
            hidden_dim=self.dim,
            num_layers=self.layers,
            num_heads=8,
            head_dim=64,
            ffn_dim=4 * self.dim,
            cca_layers=self.cca_layers,
            encoder_dim=self.encoder_dim,
            encoder_layers=self.encoder_layers,
            encoder_heads=8,
            encoder_ffn_dim=4 * self.encoder_dim,
            encoder_ca_layers=(1,),
            num_neighbours=self.neighbours,
            share_encoder_embedding=self.encoder_dim == self.dim,
            tie_embeddings=False,
        )

    @property
    def decoder(self) -> ModelConfig:
        """The same without retrieval."""
        return dataclasses.replace(self.model, cca_layers=())


SMALL = Shape(  # the recipe of that name
    name="small",
    dim=512,
    encoder_dim=512,
    layers=8,
    cca_layers=(3, 5, 7),
    encoder_layers=1,
    num_chunks=16,
    batch_size=4,
)
_PAPER: dict[str, Any] = {"layers": 12, "cca_layers": (6, 9, 12), "encoder_dim": 896, "encoder_layers": 2}
PAPER = Shape(name="paper", dim=896, num_chunks=32, batch_size=1, **_PAPER)
# What a GPU has memory for, on the peer's side too.
ON_GPU = tuple(
    Shape(name=name, dim=dim, num_chunks=32, batch_size=4, device="cuda", **_PAPER)
    for name, dim in (("paper-172m", 896), ("paper-425m", 1536))
)


@dataclass(frozen=True)
class Step:
    """What a contender says of one step."""

    seconds: float
    peak_bytes: int
    table: dict[str, float] | None = None
    """Seconds by kind of work, where a profile was asked for."""


class Contender:
    """A process that trains a model of a shape, a step at a time.

    Args:
        command: of the program; gets the shape.
        shape: of the model.
        environment: variables set in addition.
    """

    def __init__(self, command: Sequence[str], shape: Shape, environment: dict[str, str]) -> None:
        settings = json.dumps(dataclasses.asdict(shape))
        self._process = subprocess.Popen(
            [*command, "--shape", settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.num_weights: int = self._answer()["num_weights"]

    def step(self, kind: str) -> Step:
        """Take one step of a kind that the program knows."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{kind}\n")
        self._process.stdin.flush()
        answer = self._answer()
        return Step(answer["seconds"], answer["peak_bytes"], answer.get("table"))

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ConfigError(f"{self._process.args} ended with status {self._process.wait()}; see above")
        return json.loads(line)

    def __enter__(self) -> Contender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()


def ours(shape: Shape) -> Contender:
    """This project, as its jobs start their workers."""
    return Contender([sys.executable, "-m", "benchmarks.training_contenders"], shape, FAST_ALLOCATOR_ENV)


def retro_pytorch(shape: Shape, python: Path) -> Contender:
    """The peer, in the interpreter of its own environment.

    Raises:
        ConfigError: there is no such interpreter.
    """
    if not python.exists():
        raise ConfigError(f"--peers-python is {python}, which is not there: run make .venv-peers/.installed")
    return Contender([str(python), str(_PEER)], shape, {})


def random_batch(shape: Shape) -> StepBatch:
    """Random tokens, in one document per sequence."""
    tokens = torch.randint(1, shape.vocab_size, (shape.batch_size, shape.num_chunks * shape.chunk_length + 1))
    of_neighbours = (shape.batch_size, shape.num_chunks, shape.neighbours, 2 * shape.chunk_length)
    batch = Batch(
        tokens_BT=tokens[:, :-1],
        targets_BT=tokens[:, 1:],
        segments_BT=torch.zeros_like(tokens[:, 1:]),
        neighbours_BLKR=torch.randint(1, shape.vocab_size, of_neighbours),
        neighbour_mask_BLKR=torch.ones(of_neighbours, dtype=torch.bool),
    )
    return StepBatch(step=0, batch=batch, num_targets=shape.num_tokens)


def training_step(
    model: ModelConfig, shape: Shape, compiled: Literal["auto", "no"] = "auto"
) -> tuple[TrainingStep, int]:
    """The step of jobs/train.py, and the number of its model's weights."""
    torch.manual_seed(0)
    retro, device = RetroModel(model), torch.device(shape.device)
    config = TrainingConfig(batch_size=shape.batch_size, micro_batch_size=shape.batch_size, compile=compiled)
    return TrainingStep(retro.to(device), config, device), retro.count_parameters(include_embeddings=True)


# Kinds of work, by what the names of torch's operators begin with. The first that fits counts.
_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("matrix products", ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_int_mm", "mkldnn")),
    ("rounding to eight bits, and scaling with GELU", ("_Product",)),
    ("softmax of the loss, and rounding", ("_LinearCrossEntropy",)),
    ("fused attention", ("aten::_scaled_dot_product", "aten::_flash_attention")),
    ("optimiser", ("aten::_fused_adam", "Optimizer", "aten::_foreach")),
    ("softmax", ("aten::_softmax", "aten::_log_softmax", "_CausalAttention")),
    ("rotary positions", ("_Rotation",)),
    ("copies and conversions", ("aten::copy_", "aten::cat", "aten::clone", "aten::constant_pad", "aten::fill_")),
    ("GELU", ("aten::gelu",)),
    (
        "norms",
        ("_RMSNorm", "aten::_fused_rms_norm", "aten::rms_norm", "aten::native_layer_norm", "aten::linalg_vector_norm"),
    ),
    ("embedding", ("aten::embedding", "aten::index", "aten::_index")),
    ("masks", ("aten::masked_fill", "aten::where")),
    ("sums and products of elements", ("aten::add", "aten::mul", "aten::sub", "aten::neg", "aten::sum", "aten::div")),
)


# The same of a GPU's kernels, by what their names contain.
_GPU_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("fused attention", ("flex_attention", "fmha", "flash", "attention")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "cublas", "triton_tem")),
    ("optimiser and clipping", ("multi_tensor_apply", "FusedAdam")),
    ("copies from and to the machine", ("Memcpy", "Memset")),
    ("fused by the compiler", ("triton_",)),
    ("sums and products of elements, copies", ("elementwise", "reduce_kernel", "CatArray", "copy")),
)


def profile_of(work: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Seconds that `work` spends, by kind."""
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        work()
        wait_for(device)
    seconds: Counter[str] = Counter()
    for event in profile.key_averages():
        if on_gpu:
            kind = next((kind for kind, parts in _GPU_KINDS if any(part in event.key for part in parts)), "other")
            seconds[kind] += event.self_device_time_total / 1e6
        else:
            kind = next((kind for kind, starts in _KINDS if event.key.startswith(starts)), "other")
            seconds[kind] += event.self_cpu_time_total / 1e6
    return dict(seconds.most_common())


def main() -> None:
    """Answer each line with the seconds of a step and the peak of memory, as one JSON object."""
    settings = json.loads(sys.argv[sys.argv.index("--shape") + 1])
    shape = Shape(**{**settings, "cca_layers": tuple(settings["cca_layers"])})
    torch.set_num_threads(shape.threads)
    device = torch.device(shape.device)
    retro, num_weights = training_step(shape.model, shape)
    others: dict[str, TrainingStep] = {}
    batch = random_batch(shape)
    print(json.dumps({"num_weights": num_weights}), flush=True)
    for line in sys.stdin:
        kind = line.strip()
        if kind == "decoder" and kind not in others:
            others[kind], _ = training_step(shape.decoder, shape)
        if kind == "eager" and kind not in others:
            others[kind], _ = training_step(shape.model, shape, compiled="no")
        step = others.get(kind, retro)
        forget_peak_memory(device)
        start = time.perf_counter()
        table = None
        if kind == "profile":
            table = profile_of(lambda step=step: step.run(batch), device)
        else:
            step.run(batch)
        wait_for(device)
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "peak_bytes": peak_memory(device), "table": table}), flush=True)


if __name__ == "__main__":
    main()
