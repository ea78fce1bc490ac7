"""What benchmarks/learning.py trains: the runs of one corpus and one seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.learning_training import TrainingRun

TOKENIZER = "train:8192"


@dataclass(frozen=True)
class Plan:
    """How much is trained."""

    home: Path
    num_steps: int
    longer_share: float = 1.8
    """Steps of the baseline that is fitted, in units of num_steps."""
    fitting_share: float = 0.3
    """Steps of fitting it."""

    def baseline(self, seed: int) -> TrainingRun:
        """The decoder without chunked cross-attention."""
        return self._run(f"baseline-{seed}", seed, self.num_steps, {"cca_layers": ()})

    def paper(self, seed: int) -> TrainingRun:
        """RETRO as in the paper: its start of chunked cross-attention, and no pointer."""
        return self._run(f"paper-{seed}", seed, self.num_steps, {"cca_start": "paper", "pointer": False})

    def default(self, seed: int) -> TrainingRun:
        """RETRO as the recipe has it."""
        return self._run(f"default-{seed}", seed, self.num_steps)

    def longer(self, seed: int) -> TrainingRun:
        """The baseline, trained longer."""
        return self._run(f"longer-{seed}", seed, round(self.longer_share * self.num_steps), {"cca_layers": ()})

    def fitted(self, seed: int) -> TrainingRun:
        """Encoder and chunked cross-attention added to that one, and alone trained."""
        name, steps = f"fitted-{seed}", round(self.fitting_share * self.num_steps)
        return self._run(name, seed, steps, base=self.longer(seed).run)

    def equal_time(self, seed: int, cost: float) -> TrainingRun:
        """The baseline, trained for as long as RETRO."""
        return self._run(f"equal-time-{seed}", seed, round(self.num_steps / cost), {"cca_layers": ()})

    def timed(self) -> tuple[TrainingRun, TrainingRun]:
        """RETRO and the baseline for about as long, to be trained side by side."""
        return self._run("cost-default", 0, 60), self._run("cost-baseline", 0, 120, {"cca_layers": ()})

    @property
    def cost(self) -> float | None:
        """Training tokens per second of RETRO over the baseline's; None if they have not been timed."""
        outcomes = [run.outcome for run in self.timed()]
        rates = [one["tokens_per_s"] for one in outcomes if one is not None]
        return rates[0] / rates[1] if len(rates) == 2 else None

    def _run(self, name: str, seed: int, steps: int, model: dict | None = None, base: str | None = None) -> TrainingRun:
        training = {
            "num_steps": steps,
            "seed": seed,
            "checkpoint_every": 50,  # what a stop may cost
            "evaluate_every": max(50, self.num_steps // 5),
            "num_evaluation_chunks": 500,
        }
        return TrainingRun(home=self.home, run=name, model=model or {}, training=training, base=base)
