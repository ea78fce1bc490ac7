"""Progress bars of long work, fit for a terminal and for a job's log."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

_TERMINAL_INTERVAL_S = 0.3
_LOG_INTERVAL_S = 10.0


def progress_bar(
    total: int | None, description: str, unit: str = "it", iterable: Any = None, delay_s: float = 0.0
) -> tqdm:
    """A tqdm bar on standard error; in a log, where every update is kept, it moves only now and then.

    What takes less than `delay_s` gets none.
    """
    interval = _TERMINAL_INTERVAL_S if sys.stderr.isatty() else _LOG_INTERVAL_S
    return tqdm(
        iterable,
        total=total,
        desc=description,
        unit=unit,
        mininterval=interval,
        maxinterval=interval,
        delay=delay_s,
    )
