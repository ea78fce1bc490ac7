"""The most memory that a process had in use. For any interpreter: imports the standard library alone."""

from __future__ import annotations

import contextlib
from pathlib import Path

_STATUS = Path("/proc/self/status")


def forget_peak_memory() -> None:
    """Begin to watch anew; does nothing where the system does not let."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> int:
    """Bytes at most in memory since then, or since the process began; 0 where there is no Linux to tell."""
    if not _STATUS.exists():
        return 0
    return 1024 * int(_STATUS.read_text(encoding="ascii").split("VmHWM:")[1].split()[0])
