"""Settings that are read when a process starts, or when Ray is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Else Ray takes the machine's address for 127.0.0.1, where nobody may listen."""
EQUAL_SHARES = {"RAY_worker_niceness": "0"}
"""Else Ray's workers give way to the clients that ask them, which stand for clients on other machines."""


def run_with(settings: Mapping[str, str], module: str) -> None:
    """Start `python -m module` anew, with the same arguments, unless the environment has these settings already."""
    if any(os.environ.get(name) != value for name, value in settings.items()):
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], {**os.environ, **settings})
