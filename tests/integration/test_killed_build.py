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
from tests.integration.small_corpus import FLAGS, Built

# With one CPU and one embedder, where the undisturbed build had two: that makes no difference, either.
pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("one_cpu"), pytest.mark.timeout(400)]
ROOT = Path(__file__).parents[2]


class Job:
    """jobs/index.py as a program, and all that is started for it."""

    def __init__(self, home: Path, corpus: Path, address: str) -> None:
        command = [sys.executable, str(ROOT / "jobs" / "index.py"), "--home", str(home), "--input", str(corpus)]
        self._log = home.parent / f"{home.name}.log"
        self._others = set(psutil.Process().children(recursive=True))
        with self._log.open("a") as log:
            self.process = subprocess.Popen(
                [*command, *FLAGS, "--json"],
                env={**os.environ, "RAY_ADDRESS": address},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    @property
    def log(self) -> str:
        return self._log.read_text()[-3000:]

    def kill(self) -> None:
        """SIGKILL to the job, its workers, and the cluster if it started one; none is left to go on writing."""
        # Stopped first: the dead cannot be asked for children that they have just started, and a stopped job asks Ray
        # for no more workers.
        family = [psutil.Process(self.process.pid)]
        _send(family[0], signal.SIGSTOP)
        while started := set(psutil.Process().children(recursive=True)) - self._others - set(family):
            for process in started:
                _send(process, signal.SIGSTOP)
            family += started
        for process in family:
            _send(process, signal.SIGKILL)
        self.process.wait()
        _, alive = psutil.wait_procs(family, timeout=30)
        assert not alive


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def run_until(home: Path, corpus: Path, address: str, moment: Callable[[Path], bool]) -> None:
    """Start the job and kill it at a moment that its files tell."""
    job = Job(home, corpus, address)
    deadline = time.monotonic() + 120
    while not moment(home):
        assert job.process.poll() is None, job.log
        assert time.monotonic() < deadline, "the moment does not come"
        time.sleep(0.002)
    job.kill()
    assert not (home / "database" / MANIFEST_NAME).exists()


def run_to_the_end(home: Path, corpus: Path, address: str) -> dict:
    job = Job(home, corpus, address)
    output, _ = job.process.communicate(timeout=150)
    assert job.process.returncode == 0, job.log
    return json.loads(output)


def finished(pattern: str) -> Callable[[Path], bool]:
    return lambda home: any(path.name.endswith(Path(pattern).suffix) for path in home.glob(f"database/*/{pattern}"))


def contents(home: Path) -> dict[str, str]:
    """SHA-256 of every file of a database; of the manifest without its times."""
    directory = home / "database"
    found = {}
    for path in sorted(directory.rglob("*")):
        if not path.is_file() or path.name == ".lock":  # which names its last holder
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


def test_killed_at_every_stage_and_started_again(built: Built, ray_cluster: str, tmp_path: Path) -> None:
    """Alone, as by its user or for its memory; among the pages together with its cluster, as by a power cut."""
    corpus, killed = Path(built.corpus.input[0]), tmp_path / "killed"
    survey, page, assembled, neighbours = (
        "work/survey/unit-*.json",
        "work/pages/*/unit-*-page-*.parquet",
        "shard-*/partition.json",
        "*/neighbours.arrow",
    )
    kept: dict[str, dict[Path, tuple[int, int]]] = {}
    for moment in (survey, page, assembled, neighbours):
        run_until(killed, corpus, "local" if moment == page else ray_cluster, finished(moment))
        for pattern, before in kept.items():  # what was finished was not done again
            now = stamps(killed, pattern)
            assert {path: now.get(path) for path in before} == before
        kept[moment] = stamps(killed, moment)
        if moment == assembled:
            keys = stamps(killed, "shard-*/keys.npy")
            kept["shard-*/keys.npy"] = {path: keys[path] for path in keys if path.with_name("partition.json").exists()}
        # As if the kill had also torn what was being written.
        work = next(killed.glob("database/*/work"))
        for torn in (work / "pages" / "torn.parquet.tmp-1", work.parent / "index.faiss.tmp-2"):
            torn.write_bytes(b"torn")

    result = run_to_the_end(killed, corpus, ray_cluster)
    for pattern in ("shard-*/keys.npy", neighbours):
        assert stamps(killed, pattern).items() >= kept[pattern].items()
    assert result["version"] == built.manifest.version
    assert contents(killed) == contents(built.home)
    database = Database.open(killed)
    database.check_files(*database.manifest.files)
