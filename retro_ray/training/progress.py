"""What a run tells of itself: metrics.jsonl, one object per step, and lines for people."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retro_ray.errors import RetroRayError
from retro_ray.training.step import StepResult

METRICS_NAME = "metrics.jsonl"
_LINE_EVERY_S = 5.0


class MetricsLog:
    """RUN/metrics.jsonl: rows of training steps and of validations, in the order of the steps."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def keep_until(self, step: int) -> None:
        """Drop the rows behind `step`, which a resumed run writes anew, and a row torn by a kill."""
        rows = [row for row in read_metrics(self._path) if row["step"] <= step]
        temporary = self._path.with_name(f"{self._path.name}.tmp-{os.getpid()}")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(temporary, self._path)

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Add rows; they are on the disk when this returns."""
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a metrics file; none if there is no file."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            break  # torn by a kill; it can only be the last one
        rows.append(json.loads(line))
    return rows


class Progress:
    """Turns step results into rows and lines, now and then, so that a GPU is not waited for at every step."""

    def __init__(
        self,
        log: MetricsLog,
        say: Callable[[str], None],
        *,
        num_steps: int,
        first_step: int,
        flops_per_token: float,
        peak_flops: float | None,
    ) -> None:
        """`say` gets the lines; `first_step` counts the steps done before; `peak_flops` is of all workers."""
        self._log, self._say = log, say
        self._num_steps, self._steps_done, self._first_step = num_steps, first_step, first_step
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._pending: list[tuple[StepResult, int]] = []
        self._since = self._last_flush = time.perf_counter()
        self._paused_s = 0.0
        self.tokens_trained = 0

    def add(self, result: StepResult, num_tokens: int) -> None:
        """Take a step's result; the rows and the line come when due."""
        self._pending.append((result, num_tokens))
        if self._steps_done == self._first_step or time.perf_counter() - self._last_flush > _LINE_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Write the rows of the steps since the last time, and say a line about them.

        Raises:
            RetroRayError: the loss is not finite.
        """
        if not self._pending:
            return
        losses = [float(result.loss) for result, _ in self._pending]  # waits for the device
        seconds = time.perf_counter() - self._last_flush
        num_tokens = sum(count for _, count in self._pending)
        rate = num_tokens / seconds
        rows = [
            {
                "step": self._steps_done + i + 1,
                "loss": loss,
                "learning_rate": result.learning_rate,
                "gradient_norm": float(result.gradient_norm),
                "tokens_per_second": round(rate, 1),
            }
            for i, ((result, _), loss) in enumerate(zip(self._pending, losses, strict=True))
        ]
        self._log.append(rows)
        self._steps_done += len(rows)
        self.tokens_trained += num_tokens
        self._pending = []
        for row in rows:
            if not math.isfinite(row["loss"]):
                raise RetroRayError(
                    f"the loss is {row['loss']} at step {row['step']}: lower --learning-rate (it was "
                    f"{row['learning_rate']:.2e}), or use --precision fp32"
                )
        self._say(self._line(rows[-1], rate))
        self._last_flush = time.perf_counter()

    def validated(self, step: int, bits_per_byte: dict[str, float]) -> None:
        """Write and say what a validation gave; its time does not count as training."""
        self._log.append([{"step": step, **{f"validation_bpb_{mode}": v for mode, v in bits_per_byte.items()}}])
        figures = ", ".join(f"{v:.4f} with retrieval {mode}" for mode, v in bits_per_byte.items())
        self._say(f"step {step}: validation bits per byte {figures}")

    def resume_clock(self) -> None:
        """Count training time from now on again."""
        now = time.perf_counter()
        self._paused_s += now - self._last_flush
        self._last_flush = now

    @property
    def tokens_per_second(self) -> float:
        """Of this process's training so far, validations and checkpoints left out."""
        return self.tokens_trained / max(1e-9, self._last_flush - self._since - self._paused_s)

    def _line(self, row: dict[str, Any], rate: float) -> str:
        done = self._steps_done - self._first_step
        per_step = (time.perf_counter() - self._since - self._paused_s) / done
        remaining_s = per_step * (self._num_steps - self._steps_done)
        share = f" | {rate * self._flops_per_token / self._peak_flops:.0%} of peak" if self._peak_flops else ""
        return (
            f"step {row['step']}/{self._num_steps} | loss {row['loss']:.3f} | lr {row['learning_rate']:.1e} | "
            f"{rate:,.0f} tokens/s{share} | {_duration(remaining_s)} left"
        )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
