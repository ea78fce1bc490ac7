"""What the README and CONTRIBUTING say, compared with what is there."""

import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_every_path_in_the_readme_exists() -> None:
    paths = set(re.findall(r"`((?:retro_ray|jobs|cluster|benchmarks)/[\w./]*)`", README))
    assert len(paths) > 10
    paths |= set(re.findall(r"\]\(([^):#]+)\)", README))  # links and pictures
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^    make (\w+)", README + (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE))
    assert {"demo", "test", "lint", "bench"} <= targets
    assert named <= targets


@pytest.mark.parametrize("job", ["index", "train", "evaluate"])
def test_every_flag_of_a_job_in_the_readme_exists(job: str) -> None:
    done = subprocess.run(
        [sys.executable, f"jobs/{job}.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    uses = re.findall(rf"jobs/{job}\.py([^\n`]*)", README)
    flags = {flag for use in uses for flag in re.findall(r"--[a-z][\w-]+", use)}
    assert flags - {"--help"} <= set(re.findall(r"--[a-z][\w-]+", done.stdout))


def test_every_command_in_the_readme_exists() -> None:
    done = subprocess.run([sys.executable, "-m", "retro_ray", "--help"], capture_output=True, text=True, check=True)
    commands = set(re.findall(r"python -m retro_ray (\w+)", README))
    assert commands >= {"search", "generate", "inspect", "verify"}
    assert all(re.search(rf"\b{command}\b", done.stdout) for command in commands)
    for command in commands:
        help_text = subprocess.run(
            [sys.executable, "-m", "retro_ray", command, "--help"], capture_output=True, text=True, check=True
        ).stdout
        assert "--home" in help_text


def test_the_job_files_can_be_executed() -> None:
    for job in (ROOT / "jobs").glob("*.py"):
        assert job.read_text().startswith("#!/usr/bin/env python3\n")
        assert job.stat().st_mode & 0o111


def test_constraints_pin_every_dependency() -> None:
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().split()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    names = {re.split(r"[\[>=<]", name)[0].lower().replace("_", "-") for name in declared}
    assert names - pinned == set()
