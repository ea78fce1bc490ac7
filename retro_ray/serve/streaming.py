"""Streams to clients that may leave at any moment: merging, server-sent events, and noticing that nobody listens."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from retro_ray.serve.errors import api_error, error_content, unexpected

logger = logging.getLogger(__name__)

T = TypeVar("T")


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """The events of several streams as they come, each with its stream's index.

    The first failure ends all of them and is raised. Closing this closes them.
    """
    queue: asyncio.Queue[tuple[int, T] | asyncio.Task[None]] = asyncio.Queue()

    async def forward(index: int, stream: AsyncGenerator[T, None]) -> None:
        async with aclosing(stream):
            async for event in stream:
                queue.put_nowait((index, event))

    tasks = [asyncio.create_task(forward(index, stream)) for index, stream in enumerate(streams)]
    for task in tasks:
        task.add_done_callback(queue.put_nowait)
    num_running = len(tasks)
    try:
        while num_running:
            event = await queue.get()
            if isinstance(event, asyncio.Task):
                event.result()
                num_running -= 1
            else:
                yield event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client leaves.

    Raises:
        ClientDisconnect: it has left.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """JSON texts as server-sent events, in OpenAI's way: `[DONE]` ends them, or an error does.

    However the answer ends, what produces the texts is closed before it is over.
    """

    media_type = "text/event-stream"

    def __init__(self, first: str, following: AsyncGenerator[str, None]) -> None:
        self._first = first
        self._following = following
        self._events = self._server_sent_events()
        # X-Accel-Buffering: nginx would keep the events back.
        super().__init__(self._events, headers={"X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Where the client leaves, this need not be waiting inside the generators. (Starlette's own way cancels again
        # and again, also what the generators do at their end.)
        async with aclosing(self._following), aclosing(self._events):
            await unless_disconnected(Request(scope, receive), self.stream_response(send))

    async def _server_sent_events(self) -> AsyncGenerator[str, None]:
        try:
            yield _event(self._first)
            async for content in self._following:
                yield _event(content)
            yield _event("[DONE]")
        except Exception as error:  # the status has been sent: only an event can tell of it
            content = error_content(api_error(error) or unexpected(error))
            yield _event(json.dumps(content, separators=(",", ":")))


def _event(data: str) -> str:
    return f"data: {data}\n\n"


def event_stream_content(schema: dict[str, Any]) -> dict[str, Any]:
    """For the OpenAPI page: a stream of objects of this schema."""
    return {"text/event-stream": {"schema": schema}}
