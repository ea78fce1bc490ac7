"""One process at a time: advisory locks on files, which a process that dies lets go of."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from retro_ray.errors import RetroRayError


@contextmanager
def file_lock(path: Path, purpose: str, refuse: Callable[[str], RetroRayError]) -> Iterator[None]:
    """Hold the lock on `path`, which is created where it is missing.

    Args:
        path: of the lock file. It stays when the lock is let go.
        purpose: what the lock is held for, for those who are turned away: "adding documents".
        refuse: makes the error for them from a description of the holder.

    Raises:
        RetroRayError: what `refuse` made; another process, or another thread of this one, has the lock.
        OSError: the file cannot be created.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise refuse(_holder(path)) from None
        since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        holder = {"purpose": purpose, "process": os.getpid(), "host": socket.gethostname(), "since": since}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _holder(path: Path) -> str:
    """Who has the lock, in words."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"{holder['purpose']}, process {holder['process']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"  # which has not come to writing it down, or is of another version
