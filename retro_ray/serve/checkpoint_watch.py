"""Noticing that a run has a newer checkpoint than the one that is served."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from retro_ray.errors import RetroRayError
from retro_ray.training.checkpoint import META_NAME, list_checkpoints

logger = logging.getLogger(__name__)

T = TypeVar("T")

_Identity = tuple[str, int]
"""Folder and time of writing: a run that was started anew counts its steps from 0 again."""


class CheckpointWatch:
    """Follows the newest checkpoint of a run; the one that is there at the beginning is not new."""

    def __init__(self, run_directory: Path) -> None:
        self._run_directory = run_directory
        self._seen: set[_Identity] = set()
        """Served, or found to be unusable."""
        self.newer()

    async def follow(self, load: Callable[[Path], T], take_up: Callable[[T], None], interval_s: float) -> None:
        """Load every newer checkpoint and take it up, for ever.

        One that cannot be used is named in the log, once; what was served goes on being served.

        Args:
            load: makes of a checkpoint's folder what is served; runs in a thread.
            take_up: serves that.
            interval_s: how often to look.
        """
        while True:
            await asyncio.sleep(interval_s)
            folder = await asyncio.to_thread(self.newer)
            if folder is None:
                continue
            try:
                loaded = await asyncio.to_thread(load, folder)
            except (RetroRayError, OSError) as error:  # torn, of another database, or removed meanwhile
                logger.warning("the checkpoint %s is not taken up: %s", folder.name, error)
            else:
                take_up(loaded)
                logger.info("the checkpoint %s is served from now on", folder.name)

    def newer(self) -> Path | None:
        """The newest checkpoint if it has not been seen yet; from now on it has."""
        folders = list_checkpoints(self._run_directory)
        if not folders:
            return None  # the run is being started anew, or its folder is gone
        identity = _identity(folders[-1])
        if identity is None or identity in self._seen:
            return None
        self._seen.add(identity)
        return folders[-1]


def _identity(folder: Path) -> _Identity | None:
    try:
        return folder.name, (folder / META_NAME).stat().st_mtime_ns
    except FileNotFoundError:
        return None  # removed between the listing and here
