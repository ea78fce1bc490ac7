"""jobs/index.py as a program of its own; what it does otherwise is in test_build_database.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]


def test_the_script_itself(tmp_path: Path) -> None:
    """One process as a user starts it, with a cluster of its own."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "a", "text": "one text"}\n{"id": \n')
    command = [sys.executable, str(ROOT / "jobs" / "index.py"), "--home", str(tmp_path / "home"), "--json"]
    finished = subprocess.run(
        [*command, "--input", str(bad), "--on-error", "fail"],
        env={**os.environ, "RAY_ADDRESS": "local"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 1
    assert "Traceback" not in finished.stderr
    assert "line 2" in finished.stderr.splitlines()[-1]
    assert finished.stdout == ""
