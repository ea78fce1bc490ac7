"""A request inside the scheduler."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass, field

from retro_ray.errors import DeadlineError
from retro_ray.generation.engine import GenerationEngine
from retro_ray.generation.events import GenerationEvent
from retro_ray.generation.sequence import SequenceState


@dataclass(eq=False)
class Ticket:
    """A request with the way of its events to the one who asked."""

    engine: GenerationEngine
    state: SequenceState
    loop: asyncio.AbstractEventLoop
    """Of the one who asked."""
    events: asyncio.Queue[GenerationEvent | Exception] = field(default_factory=asyncio.Queue)
    submitted: float = field(default_factory=time.monotonic)
    was_asked_for: bool = False
    """The neighbours of its prompt are on their way, or there."""
    is_given_up: bool = False
    """By the client."""
    is_over: bool = False
    """Finished, failed or given up, and no longer in the scheduler."""

    @property
    def is_ready(self) -> bool:
        """Whether its prompt can be read."""
        return self.was_asked_for and not self.state.is_waiting

    @property
    def deadline(self) -> float:
        """By time.monotonic."""
        deadline_s = self.state.request.deadline_s
        return math.inf if deadline_s is None else self.submitted + deadline_s

    def deadline_error(self) -> DeadlineError:
        request = self.state.request
        return DeadlineError(
            f"deadline_s = {request.deadline_s:g} passed after {len(self.state.generated)} of {request.max_tokens} "
            "tokens: raise it, or lower max_tokens"
        )

    def post(self, *items: GenerationEvent | Exception) -> None:
        """Send events, or the error that is the end, from any thread."""
        for item in items:
            try:
                self.loop.call_soon_threadsafe(self.events.put_nowait, item)
            except RuntimeError:  # the loop is closed: nobody listens any more
                self.is_given_up = True
