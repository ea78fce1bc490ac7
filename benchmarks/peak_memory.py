"""The most memory that a process had in use, of the machine or of a GPU. For any interpreter that has torch."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def wait_for(device: torch.device) -> None:
    """Until it has done what it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget_peak_memory(device: torch.device) -> None:
    """Begin to watch anew; does nothing where the system does not let."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory(device: torch.device) -> int:
    """Bytes at most in use since then, or since the process began; 0 where there is no Linux to tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not _STATUS.exists():
        return 0
    return 1024 * int(_STATUS.read_text(encoding="ascii").split("VmHWM:")[1].split()[0])
