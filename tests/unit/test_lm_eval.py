"""lm_eval's command line with our model: without lm_eval it says how to get it."""

import subprocess
import sys

import pytest

from retro_ray import lm_eval
from retro_ray.errors import ConfigError


def test_without_lm_eval_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -c constraints.txt -e \.\[eval\]"):
        lm_eval.main()


def test_it_is_lm_evals_command_line() -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -c constraints.txt -e .[eval]")
    command = [sys.executable, "-m", "retro_ray.lm_eval", "run", "--help"]
    assert "--model_args" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
