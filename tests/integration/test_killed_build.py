"""Rule 6: a job killed at any moment and started again makes the database of an undisturbed run, file by file."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from retro_ray.database.format import MANIFEST_NAME
from retro_ray.database.store import Database
from tests.integration.small_corpus import write_corpus

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
ROOT = Path(__file__).parents[2]
SETTINGS = ["--tokenizer", "train:400", "--chunk-length", "32", "--validation-share", "0.15", "--json"]


def start_job(home: Path, corpus: Path) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "jobs" / "index.py"), "--home", str(home), "--input", str(corpus), *SETTINGS]
    with (home.parent / f"{home.name}.log").open("a") as log:
        return subprocess.Popen(
            command, env={**os.environ, "RAY_ADDRESS": "local"}, stdout=subprocess.PIPE, stderr=log, text=True
        )


def kill_with_all_it_started(process: subprocess.Popen) -> None:
    """SIGKILL to the job and to the cluster that it started; none of it is left to go on writing."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        try:
            member.send_signal(signal.SIGSTOP)  # the dead cannot be asked for children that they have just started
            family += [child for child in member.children(recursive=True) if child not in family]
        except psutil.NoSuchProcess:
            continue
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive


def run_until(home: Path, corpus: Path, moment: Callable[[Path], bool]) -> None:
    """Start the job and kill it at a moment that its files tell."""
    process = start_job(home, corpus)
    deadline = time.monotonic() + 120
    while not moment(home):
        assert process.poll() is None, (home.parent / f"{home.name}.log").read_text()[-3000:]
        assert time.monotonic() < deadline, "the moment does not come"
        time.sleep(0.002)
    kill_with_all_it_started(process)
    assert not (home / "database" / MANIFEST_NAME).exists()


def run_to_the_end(home: Path, corpus: Path) -> dict:
    process = start_job(home, corpus)
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 0, (home.parent / f"{home.name}.log").read_text()[-3000:]
    return json.loads(output)


def finished(pattern: str) -> Callable[[Path], bool]:
    return lambda home: any(path.name.endswith(Path(pattern).suffix) for path in home.glob(f"database/*/{pattern}"))


def contents(home: Path) -> dict[str, str]:
    """SHA-256 of every file of a database; of the manifest without its times."""
    directory = home / "database"
    found = {}
    for path in sorted(directory.rglob("*")):
        if not path.is_file():
            continue
        content = path.read_bytes()
        if path.name == MANIFEST_NAME:
            manifest = json.loads(content)
            content = json.dumps({**manifest, "created": "", "stage_seconds": {}}).encode()
        found[str(path.relative_to(directory))] = hashlib.sha256(content).hexdigest()
    return found


def stamps(home: Path, pattern: str) -> dict[Path, tuple[int, int]]:
    """Times of change and inodes: of a file that is written again, neither stays."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in home.glob(f"database/*/{pattern}")}


def test_killed_at_every_stage_and_started_again(tmp_path: Path) -> None:
    corpus, undisturbed, killed = tmp_path / "in", tmp_path / "undisturbed", tmp_path / "killed"
    write_corpus(corpus)
    expected = run_to_the_end(undisturbed, corpus)

    survey, page, keys, neighbours = (
        "work/survey/unit-*.json",
        "work/pages/*/unit-*-page-*.parquet",
        "shard-*/keys.npy",
        "*/neighbours.arrow",
    )
    kept: dict[str, dict[Path, tuple[int, int]]] = {}
    for moment in (survey, page, keys, neighbours):
        run_until(killed, corpus, finished(moment))
        for pattern, before in kept.items():  # what was finished was not done again
            now = stamps(killed, pattern)
            assert {path: now.get(path) for path in before} == before
        kept[moment] = stamps(killed, moment)
        # As if the kill had also torn what was being written.
        work = next(killed.glob("database/*/work"))
        for torn in (work / "pages" / "torn.parquet.tmp-1", work.parent / "index.faiss.tmp-2"):
            torn.write_bytes(b"torn")

    result = run_to_the_end(killed, corpus)
    for pattern in (keys, neighbours):
        assert stamps(killed, pattern).items() >= kept[pattern].items()
    assert result["version"] == expected["version"]
    assert contents(killed) == contents(undisturbed)
    database = Database.open(killed)
    database.check_files(*database.manifest.files)
