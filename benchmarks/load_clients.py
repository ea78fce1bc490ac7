"""Clients of the service that ask one request after another, each in a way of its own."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx2

from benchmarks.load_answers import (
    Answer,
    CleanError,
    CutError,
    MalformedError,
    read_completion,
    read_found,
    read_stream,
    refusal,
)

Way = Literal["plain", "stream", "retrieve", "leaves", "short deadline"]
"""`leaves` closes its connection in the middle of a stream."""
Ending = Literal["answered", "partial", "error", "left", "cut", "malformed", "hung"]
WAYS: dict[Way, int] = {"plain": 30, "stream": 30, "retrieve": 20, "leaves": 10, "short deadline": 10}
"""Of a hundred requests."""
NUM_NEIGHBOURS = 3
"""Of a request to /v1/retrieve."""
_MAX_TOKENS = 64
_LONGEST_SHORT_DEADLINE_S = 1.0
_SHARE_WITHOUT_RETRIEVAL = 0.2
_PAUSE_AFTER_ERROR_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One request, from the client's side. Times are of time.monotonic."""

    way: Way
    ending: Ending
    detail: str
    started_s: float
    ended_s: float
    first_text_s: float | None
    """When the first text of a stream came."""
    num_tokens: int
    asked: str
    """The text that was retrieved for, or the prompt."""
    documents: frozenset[str]
    """Ids of the neighbours that came back."""


class _LeavingError(Exception):
    """The client has seen enough."""


@dataclass
class Client:
    """Asks until `until_s`, then finishes what it has begun.

    Args:
        url: of the service.
        texts: prompts and queries to choose from, each longer than a chunk.
        hung_after_s: a request that takes longer than this hangs.
        edited_text: the text of a document that is being added or has been deleted; some ask for it.
        seed: of its choices.
    """

    url: str
    texts: Sequence[str]
    hung_after_s: float
    edited_text: Callable[[], str | None]
    seed: int
    outcomes: list[Outcome] = field(default_factory=list)

    async def run(self, until_s: float) -> None:
        choices = random.Random(self.seed)
        async with httpx2.AsyncClient(base_url=self.url, timeout=None) as http:
            while time.monotonic() < until_s:
                (way,) = choices.choices(list(WAYS), list(WAYS.values()))
                outcome = await self.ask(http, way, choices)
                self.outcomes.append(outcome)
                if outcome.ending in ("error", "cut"):
                    await asyncio.sleep(_PAUSE_AFTER_ERROR_S)

    async def ask(self, http: httpx2.AsyncClient, way: Way, choices: random.Random) -> Outcome:
        """One request, and how it ended."""
        answer, text = Answer(), choices.choice(self.texts)
        if way == "retrieve":
            text = choices.choice([text, self.edited_text() or text])
        started_s, first_text_s = time.monotonic(), None

        def note_text() -> None:
            nonlocal first_text_s
            first_text_s = first_text_s or time.monotonic()

        try:
            async with asyncio.timeout(self.hung_after_s):
                if way == "retrieve":
                    answer = await retrieve(http, text)
                else:
                    body = _completion(way, text, choices)
                    leave_after = choices.randint(1, 10) if way == "leaves" else None
                    answer.retrieves = "retrieval" not in body
                    await _complete(http, body, answer, note_text, leave_after)
        except Exception as error:
            ending, detail = _classified(error)
        else:
            ending, detail = ("partial" if answer.missing_shards else "answered"), ""
        return Outcome(
            way=way,
            ending=ending,
            detail=detail,
            started_s=started_s,
            ended_s=time.monotonic(),
            first_text_s=first_text_s,
            num_tokens=answer.num_tokens,
            asked=text,
            documents=frozenset(answer.documents),
        )


async def retrieve(http: httpx2.AsyncClient, text: str) -> Answer:
    """The neighbours of a text."""
    reply = await http.post("/v1/retrieve", json={"text": text, "num_neighbours": NUM_NEIGHBOURS})
    if reply.status_code != 200:
        raise refusal(reply)
    return read_found(reply.json(), NUM_NEIGHBOURS)


def _completion(way: Way, prompt: str, choices: random.Random) -> dict[str, Any]:
    body: dict[str, Any] = {
        "prompt": prompt,
        "max_tokens": choices.randint(_MAX_TOKENS // 2, _MAX_TOKENS),
        "seed": choices.randrange(1 << 30),
    }
    if way in ("stream", "leaves") or (way == "short deadline" and choices.random() < 0.5):
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if choices.random() < _SHARE_WITHOUT_RETRIEVAL:
        body["retrieval"] = {"enabled": False}
    if way == "short deadline":
        body["deadline_s"] = choices.uniform(0.01, _LONGEST_SHORT_DEADLINE_S)
    return body


async def _complete(
    http: httpx2.AsyncClient,
    body: dict[str, Any],
    answer: Answer,
    note_text: Callable[[], None],
    leave_after: int | None,
) -> None:
    if not body.get("stream"):
        reply = await http.post("/v1/completions", json=body)
        if reply.status_code != 200:
            raise refusal(reply)
        read_completion(reply.json(), body["max_tokens"], answer)
        return
    async with http.stream("POST", "/v1/completions", json=body) as reply:
        if reply.status_code != 200:
            await reply.aread()
            raise refusal(reply)
        num_pieces = 0
        async for _ in read_stream(reply, body["max_tokens"], answer):
            note_text()
            num_pieces += 1
            if num_pieces == leave_after:
                raise _LeavingError


def _classified(error: Exception) -> tuple[Ending, str]:
    if isinstance(error, _LeavingError):
        return "left", ""
    if isinstance(error, CleanError):
        return "error", str(error)
    if isinstance(error, CutError):
        return "cut", str(error)
    if isinstance(error, MalformedError | ValueError):
        return "malformed", str(error)
    if isinstance(error, httpx2.TransportError):
        return "cut", type(error).__name__
    if isinstance(error, TimeoutError):
        return "hung", ""
    raise error
