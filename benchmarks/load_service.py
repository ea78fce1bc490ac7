"""The real service on a Ray of its own: started as the README says, on loopback, and ended to the last process."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx2
import psutil

from benchmarks.environment import EQUAL_SHARES, LOOPBACK
from benchmarks.load_processes import ProcessWatch, WatchedProcess
from retro_ray.errors import ConfigError

REPLICA = "ray::ServeReplica"
SHARD = "ray::ShardActor"
_OF_SERVE = (REPLICA, "ray::DocumentEditorActor", "ray::ServeController", "ray::ProxyActor")
_BIN = Path(sys.executable).parent
_START_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 60.0
_LAST_BREATH_S = 10.0
"""For processes to end after what started them has."""


class RunningService:
    """`ray start` and `serve run`; a context manager, whose end stops both.

    Args:
        home: what is served.
        settings: of the application; see retro_ray/serve/settings.py.
    """

    def __init__(self, home: Path, settings: dict[str, Any]) -> None:
        self._settings = {"home": str(home), **settings}
        self._ports = _free_ports(4)
        self._stack = ExitStack()
        self.url = f"http://127.0.0.1:{self._ports[3]}"
        self.watch = ProcessWatch((REPLICA, SHARD))
        self.leftover: list[str] = []
        """Titles of processes that were there after the service's, or Ray's, end."""

    def __enter__(self) -> RunningService:
        with ExitStack() as stack:
            stack.callback(self.watch.stop)
            self._folder = Path(tempfile.mkdtemp(prefix="load-"))  # short: Ray's sockets lie in it
            stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
            stack.callback(self._note_leftover)
            self._start_ray(stack)
            self._start_service(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def replicas(self) -> list[WatchedProcess]:
        return self.watch.alive(REPLICA)

    def shards(self) -> list[WatchedProcess]:
        return self.watch.alive(SHARD)

    def logs(self) -> str:
        """What the replicas said at the level of warnings and above."""
        files = self._folder.glob("ray/session_latest/logs/serve/replica_*.log")
        lines = [line for file in files for line in file.read_text(errors="replace").splitlines()]
        return "\n".join(line for line in lines if line.startswith(("WARNING", "ERROR")))

    def _start_ray(self, stack: ExitStack) -> None:
        gcs, client, metrics, _ = self._ports
        self._environment = {
            **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            **LOOPBACK,
            **EQUAL_SHARES,
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        head = ["ray", "start", "--head", "--block", "--include-dashboard", "false", "--node-ip-address", "127.0.0.1"]
        head += ["--port", str(gcs), "--ray-client-server-port", str(client), "--metrics-export-port", str(metrics)]
        head += ["--num-cpus", str(max(4, os.cpu_count() or 1)), "--object-store-memory", str(150 << 20)]
        head += ["--temp-dir", str(self._folder / "ray")]
        process = self._start(stack, head, signal.SIGTERM)
        self._environment["RAY_ADDRESS"] = f"127.0.0.1:{gcs}"
        _wait(lambda: _listens(gcs), process, self._folder / "ray.log")

    def _start_service(self, stack: ExitStack) -> None:
        port = str(self._ports[3])
        start = [str(_BIN / "serve"), "start", "--http-host", "127.0.0.1", "--http-port", port]
        done = subprocess.run(start, env=self._environment, capture_output=True, text=True, timeout=_START_TIMEOUT_S)
        if done.returncode:
            raise ConfigError(f"serve start ended with status {done.returncode}: {done.stderr.strip()[-500:]}")
        arguments = [
            f"{name}={json.dumps(value) if isinstance(value, dict) else value}"
            for name, value in self._settings.items()
        ]
        stack.callback(self._note_leftover, *_OF_SERVE)
        process = self._start(stack, ["serve", "run", "retro_ray.serve:app", *arguments], signal.SIGINT)
        num_replicas = self._settings["num_replicas"]
        _wait(lambda: len(self.replicas()) == num_replicas and _is_ready(self.url), process, self._folder / "serve.log")

    def _start(self, stack: ExitStack, command: Sequence[str], end: signal.Signals) -> subprocess.Popen:
        log = stack.enter_context((self._folder / f"{command[0]}.log").open("w"))
        process = subprocess.Popen(
            [str(_BIN / command[0]), *command[1:]],
            env=self._environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=_heed_interrupts,
        )  # fmt: skip
        stack.callback(_stop, process, end)
        self.watch.add(process.pid)
        return process

    def _note_leftover(self, *titles: str) -> None:
        """What still runs that should have ended; what outlives Ray is killed."""
        deadline = time.monotonic() + _LAST_BREATH_S
        while (left := self.watch.alive(*titles)) and time.monotonic() < deadline:
            time.sleep(0.2)
        self.leftover += [one.title for one in left]
        if not titles:
            for one in left:
                try:
                    one.process.kill()
                except psutil.NoSuchProcess:
                    continue


def _heed_interrupts() -> None:
    """A shell's background jobs ignore SIGINT, and so would `serve run`, which SIGINT ends."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _stop(process: subprocess.Popen, end: signal.Signals) -> None:
    process.send_signal(end)
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait(is_there: Any, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not is_there():
        if process.poll() is not None or time.monotonic() > deadline:
            raise ConfigError(f"{log.stem} did not start: {log.read_text()[-1500:]}")
        time.sleep(0.3)


def _is_ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx2.TransportError:
        return False


def _listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]
