import json

import pytest
import torch

from retro_ray.errors import RetroRayError
from retro_ray.training.plot import plot_metrics
from retro_ray.training.progress import MetricsLog, Progress, read_metrics
from retro_ray.training.step import StepResult


def result(loss: float, rate: float = 1e-3) -> StepResult:
    return StepResult(loss=torch.tensor(loss), gradient_norm=torch.tensor(0.5), learning_rate=rate)


def progress_of(path, lines: list[str], *, num_steps=10, first_step=0, peak_flops=None) -> Progress:
    return Progress(
        MetricsLog(path),
        lines.append,
        num_steps=num_steps,
        first_step=first_step,
        flops_per_token=1e6,
        peak_flops=peak_flops,
    )


def test_every_step_gets_a_row_and_some_get_a_line(tmp_path):
    path, lines = tmp_path / "metrics.jsonl", []
    progress = progress_of(path, lines, peak_flops=1e12)
    for step in range(4):
        progress.add(result(5.0 - step), num_tokens=100)
    progress.flush()
    progress.flush()
    rows = read_metrics(path)
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 5.0), (2, 4.0), (3, 3.0), (4, 2.0)]
    assert set(rows[0]) == {"step", "loss", "learning_rate", "gradient_norm", "tokens_per_second"}
    assert len(lines) == 2, "the first step at once, the others when asked for"
    assert lines[1].startswith("step 4/10 | loss 2.000 | lr 1.0e-03 | ")
    assert "% of peak" in lines[1]
    assert lines[1].endswith(" left")
    assert progress.tokens_trained == 400


def test_validation_gets_a_row_and_a_line(tmp_path):
    path, lines = tmp_path / "metrics.jsonl", []
    progress_of(path, lines).validated(6, {"on": 1.25, "off": 1.5})
    assert read_metrics(path) == [{"step": 6, "validation_bpb_on": 1.25, "validation_bpb_off": 1.5}]
    assert lines == ["step 6: validation bits per byte 1.2500 with retrieval on, 1.5000 with retrieval off"]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_run_with_what_to_do(tmp_path, loss):
    progress = progress_of(tmp_path / "metrics.jsonl", [], first_step=4)
    with pytest.raises(RetroRayError, match=r"at step 5: lower --learning-rate \(it was 2.00e-03\)"):
        progress.add(result(loss, rate=2e-3), num_tokens=1)


def test_resuming_drops_the_rows_behind_the_checkpoint_and_a_torn_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append([{"step": step, "loss": 1.0} for step in range(1, 8)])
    log.append([{"step": 6, "validation_bpb_off": 1.0}, {"step": 8, "loss": 1.0}])
    whole = path.read_text()
    path.write_text(whole + '{"step": 9, "lo')
    assert read_metrics(path)[-1]["step"] == 8
    log.keep_until(6)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5, 6, 6]
    log.append([{"step": 7, "loss": 2.0}])
    assert json.loads(path.read_text().splitlines()[-1]) == {"step": 7, "loss": 2.0}


def test_a_new_run_has_no_rows(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("num_steps", [0, 1, 200])
def test_any_run_can_be_drawn(tmp_path, num_steps):
    rows: list[dict] = [{"step": step + 1, "loss": 5 / (step + 1)} for step in range(num_steps)]
    rows += [{"step": num_steps, "validation_bpb_on": 1.0, "validation_bpb_off": 1.1}] if num_steps else []
    plot_metrics(rows, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
