"""Documents added to the running service's database and deleted again, and who saw what of them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

import httpx2

from benchmarks.load_answers import Answer, CleanError, CutError, MalformedError, refusal
from benchmarks.load_clients import Outcome, retrieve

_WORDS = ("purple", "elephant", "opera", "cabbage", "violin", "glacier", "teapot", "comet", "walrus", "lantern")
_NUM_CHECKS = 6
"""Retrievals after each edit, at the same time: so many that every replica gets some."""
_PAUSE_S = 1.0
_ATTEMPTS = 60
_PAUSE_AFTER_ERROR_S = 0.5


@dataclass
class EditedDocument:
    """One document, and when what was done with it. Times are of time.monotonic."""

    id: str
    text: str
    added_s: float = float("inf")
    """When the service said that it was added."""
    deleting_s: float = float("inf")
    """When the service was asked to delete it."""
    deleted_s: float = float("inf")
    """When the service said that it was deleted."""


@dataclass
class Editing:
    """Adds a document, looks for it, deletes it, looks for it again; and so on.

    Args:
        url: of the service.
    """

    url: str
    documents: list[EditedDocument] = field(default_factory=list)
    checked: list[tuple[float, float, Answer, EditedDocument]] = field(default_factory=list)
    """Start and end of every look for a document, and what came of it."""
    failures: list[str] = field(default_factory=list)
    """Edits that were refused, and were tried again."""

    def text(self) -> str | None:
        """Of the newest document."""
        return self.documents[-1].text if self.documents else None

    async def run(self, until_s: float) -> None:
        async with httpx2.AsyncClient(base_url=self.url, timeout=60) as http:
            while time.monotonic() < until_s:
                await self._add_and_delete(http)
                await asyncio.sleep(_PAUSE_S)

    async def _add_and_delete(self, http: httpx2.AsyncClient) -> None:
        number = len(self.documents)
        words = [_WORDS[(number * 3 + i * i) % len(_WORDS)] for i in range(8)]
        document = EditedDocument(f"load-test/{uuid.uuid4().hex}", f"Entry {number}: the {' '.join(words)}.")
        self.documents.append(document)
        new = {"id": document.id, "text": document.text, "title": "load test"}
        await self._insist(lambda: http.post("/v1/documents", json={"documents": [new]}))
        document.added_s = time.monotonic()
        await self._look(http, document)
        document.deleting_s = time.monotonic()
        await self._insist(lambda: http.delete(f"/v1/documents/{document.id}"), gone_is_fine=True)
        document.deleted_s = time.monotonic()
        await self._look(http, document)

    async def _insist(
        self, edit: Callable[[], Awaitable[httpx2.Response]], *, gone_is_fine: bool = False
    ) -> httpx2.Response:
        """An edit, until it succeeds: one that was cut off may have been done or not."""
        for attempt in range(_ATTEMPTS):
            try:
                reply = await edit()
                if reply.status_code == 200 or (gone_is_fine and attempt and reply.status_code == 404):
                    return reply
                raise refusal(reply)
            except (CleanError, CutError, httpx2.TransportError) as error:
                self.failures.append(str(error) or type(error).__name__)
                await asyncio.sleep(_PAUSE_AFTER_ERROR_S)
        raise MalformedError(f"no edit succeeded in {_ATTEMPTS} attempts; the last one: {self.failures[-1]}")

    async def _look(self, http: httpx2.AsyncClient, document: EditedDocument) -> None:
        async def look() -> None:
            started_s = time.monotonic()
            try:
                answer = await retrieve(http, document.text)
            except (CleanError, CutError, httpx2.TransportError) as error:
                self.failures.append(f"retrieve: {str(error) or type(error).__name__}")
            else:
                self.checked.append((started_s, time.monotonic(), answer, document))

        await asyncio.gather(*(look() for _ in range(_NUM_CHECKS)))


def num_added_missing(editing: Editing, outcomes: Iterable[Outcome]) -> int:
    """Whole answers to a document's own text, asked for while it was there, that were without it."""
    by_text = {document.text: document for document in editing.documents}
    looks = [
        (start, end, answer.documents, document)
        for start, end, answer, document in editing.checked
        if not answer.missing_shards
    ]
    looks += [
        (one.started_s, one.ended_s, one.documents, by_text[one.asked])
        for one in outcomes
        if one.ending == "answered" and one.asked in by_text
    ]
    return sum(
        document.added_s <= start and end <= document.deleting_s and document.id not in found
        for start, end, found, document in looks
    )


def num_deleted_seen(editing: Editing, outcomes: Iterable[Outcome]) -> int:
    """Answers of any kind, asked for after a document's deletion, that contain it."""
    deleted_s = {document.id: document.deleted_s for document in editing.documents}
    seen = [(start, answer.documents) for start, _, answer, _ in editing.checked]
    seen += [(one.started_s, one.documents) for one in outcomes]
    return sum(any(start >= deleted_s.get(name, float("inf")) for name in found) for start, found in seen)
