"""What processes a program starts, how their memory goes, and which of them outlive it."""

from __future__ import annotations

import statistics
import threading
import time
from dataclasses import dataclass, field

import psutil

_INTERVAL_S = 1.0


@dataclass
class WatchedProcess:
    """A process that was seen, and its memory from then on."""

    process: psutil.Process
    """Equal only to itself: psutil compares times of creation, too."""
    title: str = ""
    """The newest: Ray's workers say what they are, and which method runs."""
    memory: list[tuple[float, int]] = field(default_factory=list)
    """time.monotonic and bytes of memory that no other process shares, of those whose memory is watched."""

    @property
    def is_alive(self) -> bool:
        try:
            return self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


class ProcessWatch:
    """Looks every second at all descendants of some processes.

    Args:
        titles: beginnings of the titles of processes whose memory is watched.
    """

    def __init__(self, titles: tuple[str, ...]) -> None:
        self._titles = titles
        self._roots: list[psutil.Process] = []
        self._seen: dict[psutil.Process, WatchedProcess] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def add(self, pid: int) -> None:
        """Watch a process and whatever it starts."""
        with self._lock:
            self._roots.append(psutil.Process(pid))

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def alive(self, *titles: str) -> list[WatchedProcess]:
        """Those that run now and have such a title; without titles: all."""
        self._look()
        with self._lock:
            seen = list(self._seen.values())
        return [one for one in seen if one.is_alive and (not titles or one.title.startswith(titles))]

    def _run(self) -> None:
        while not self._stopping.wait(_INTERVAL_S):
            self._look()

    def _look(self) -> None:
        with self._lock:
            processes = set(self._seen)
            for root in self._roots:
                try:
                    processes |= {root, *root.children(recursive=True)}
                except psutil.NoSuchProcess:
                    continue
            for process in processes:
                self._note(process)

    def _note(self, process: psutil.Process) -> None:
        watched = self._seen.setdefault(process, WatchedProcess(process))
        try:
            if not process.is_running():
                return
            watched.title = " ".join(process.cmdline()).strip() or watched.title
            if watched.title.startswith(self._titles):
                watched.memory.append((time.monotonic(), process.memory_full_info().uss))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return  # it ended between the listing and here


def memory_growth(watched: WatchedProcess, start_s: float, end_s: float) -> float | None:
    """Mean memory in the second half of the time over that in the first; None if it was not there throughout."""
    middle_s = (start_s + end_s) / 2
    first = [used for when, used in watched.memory if start_s <= when < middle_s]
    second = [used for when, used in watched.memory if middle_s <= when <= end_s]
    lived_through = watched.memory and watched.memory[0][0] <= start_s and watched.memory[-1][0] >= end_s - 3
    return statistics.mean(second) / statistics.mean(first) if lived_through and first and second else None
