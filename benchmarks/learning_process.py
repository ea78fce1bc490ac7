"""Parts of benchmarks/learning.py in processes of one thread each: how they are started, and what they are told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from retro_ray.allocator import FAST_ALLOCATOR_ENV
from retro_ray.command_line import parse, run


@dataclass(frozen=True, kw_only=True)
class _Told:
    settings: str


def start_process(module: str, settings: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Run a module, which calls `do` with what to do with these settings."""
    command = [sys.executable, "-m", module, "--settings", json.dumps(settings, default=str)]
    return subprocess.Popen(command, env={**os.environ, **FAST_ALLOCATOR_ENV, "OMP_NUM_THREADS": "1"})


def do(work: Callable[[dict[str, Any]], None]) -> None:
    """What the process is for; its exit status is 0 on success."""
    told = parse(_Told, "a part of python -m benchmarks.learning")

    def alone() -> None:
        import torch

        torch.set_num_threads(1)
        work(json.loads(told.settings))

    run(alone)
