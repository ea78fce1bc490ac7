"""Run edits of copies of a home, killed at one file operation after the other: `killed_edit.py HOME COPIES`.

Each edit runs in a forked process that sends itself SIGKILL right before its n-th operation on a file
of the home (opened for writing, renamed, made, removed), for n = 1, 1 + step, ... until it gets
through. This process itself starts no thread, so that it can be forked.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from retro_ray.building.edit import DatabaseEditor
from tests.unit.building.editing import HashEmbedder, document

EDITS: dict[str, Callable[[DatabaseEditor], object]] = {
    "add": lambda editor: editor.add([document("new 1"), document("new 2")]),
    "delete": lambda editor: editor.delete(["d1", "d2"]),
    "update": lambda editor: editor.update([document("d1", "omicron pi rho"), document("new 1")]),
    "compact": lambda editor: editor.compact(),
}
STEPS = {"add": 4, "delete": 1, "update": 4, "compact": 6}
"""The short edit is killed at every operation, the long ones at some of each kind."""
_OPERATIONS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir")


def kill_before(operation: int, home: Path) -> None:
    """Have this process killed at its `operation`-th change of a file under `home`, counted from 1."""
    count = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal count
        if event == "open":
            path, _, flags = arguments
            concerned = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
        else:
            path, concerned = arguments[0] if arguments else "", event in _OPERATIONS
        if concerned and str(path).startswith(str(home)):
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    os.fsync = lambda descriptor: None  # a kill, unlike a power cut, loses nothing that was written


def run_killed(name: str, home: Path, copies: Path) -> None:
    """Copies of `home` in `copies`/0001, ...: the last one edited to the end, the others killed on the way."""
    operation, status = 1, -1
    while status != 0:
        copy = shutil.copytree(home, copies / f"{operation:04d}")
        child = os.fork()
        if child == 0:
            kill_before(operation, copy)
            EDITS[name](DatabaseEditor(copy, embedder=HashEmbedder()))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status not in (0, signal.SIGKILL):
            sys.exit(f"operation {operation} ended with status {status}")
        operation += STEPS[name]


if __name__ == "__main__":
    for name in EDITS:
        run_killed(name, Path(sys.argv[1]), Path(sys.argv[2]) / name)
