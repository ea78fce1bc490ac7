import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest
from fastapi import Request
from fastapi.testclient import TestClient
from starlette.requests import ClientDisconnect

from retro_ray.errors import RetrievalError
from retro_ray.serve.streaming import EventStream, merged, unless_disconnected
from tests.unit.serve.fakes import EchoService


def events_of(client: TestClient, **body) -> list:
    response = client.post("/v1/completions", json={"stream": True, **body})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines.pop() == ""
    assert all(line.startswith("data: ") for line in lines)
    data = [line.removeprefix("data: ") for line in lines]
    return [one if one == "[DONE]" else json.loads(one) for one in data]


def test_the_chunks_of_a_stream_make_the_whole_answer(client: TestClient) -> None:
    body = {"prompt": ["ab", "c"], "n": 2, "seed": 5, "logprobs": 1}
    *chunks, done = events_of(client, **body)
    assert done == "[DONE]"
    whole = client.post("/v1/completions", json=body).json()
    assert {(chunk["object"], chunk["model"]) for chunk in chunks} == {("text_completion", "tiny")}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)
    assert all("usage" not in chunk for chunk in chunks)
    for expected in whole["choices"]:
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == expected["index"]]
        assert "".join(choice["text"] for choice in mine) == expected["text"]
        assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + ["length"]
        assert mine[-1]["citations"] == expected["citations"]
        logprobs = [choice["logprobs"] for choice in mine if choice["logprobs"]]
        for name, values in expected["logprobs"].items():
            assert [value for part in logprobs for value in part[name]] == values


def test_citations_come_when_they_begin_and_again_when_they_are_complete(client: TestClient) -> None:
    *chunks, _ = events_of(client, prompt="a")
    citations = [chunk["choices"][0]["citations"] for chunk in chunks]
    assert [len(some) for some in citations] == [1, 0, 0, 1]
    begun, complete = citations[0][0], citations[-1][0]
    assert (begun["text_start"], begun["text_end"], begun["last_token"]) == (0, None, None)
    assert begun["neighbours"] == complete["neighbours"]
    assert begun["missing_shards"] == [3]
    assert (complete["text_start"], complete["text_end"]) == (0, 4)


def test_usage_comes_last_if_asked_for(client: TestClient) -> None:
    *chunks, usage, done = events_of(client, prompt=["a", "bcd"], n=2, stream_options={"include_usage": True})
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 2 + 4, "completion_tokens": 12, "total_tokens": 18}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RetrievalError("shard 1 did not answer"), "shard 1 did not answer"),
        (KeyError("secret"), "internal error (KeyError); the service's log has the cause"),
    ],
)
def test_a_failure_in_the_middle_is_an_event_and_the_last(
    client: TestClient, service: EchoService, error: Exception, message: str
) -> None:
    service.late_error = error
    *chunks, last = events_of(client, prompt="a")
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["", "a"]
    assert last["error"]["message"] == message
    assert last["error"]["type"] == "server_error"


class Source:
    """Numbers, then a failure or silence; knows whether it was closed."""

    def __init__(self, *numbers: int, error: Exception | None = None, ends: bool = True) -> None:
        self.is_open = False
        self._numbers, self._error, self._ends = numbers, error, ends

    async def stream(self) -> AsyncGenerator[int, None]:
        self.is_open = True
        try:
            for number in self._numbers:
                await asyncio.sleep(0)
                yield number
            if self._error is not None:
                raise self._error
            if not self._ends:
                await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # closing may take its time
            self.is_open = False


def test_streams_are_merged_in_the_order_of_each() -> None:
    async def run() -> list[tuple[int, int]]:
        return [event async for event in merged([Source(1, 2, 3).stream(), Source().stream(), Source(4, 5).stream()])]

    events = asyncio.run(run())
    assert [number for index, number in events if index == 0] == [1, 2, 3]
    assert [number for index, number in events if index == 2] == [4, 5]
    assert len(events) == 5


def test_the_first_failure_ends_all_streams() -> None:
    silent, failing = Source(1, ends=False), Source(2, error=RetrievalError("gone"))

    async def run() -> None:
        events = merged([silent.stream(), failing.stream()])
        assert sorted([await anext(events), await anext(events)]) == [(0, 1), (1, 2)]
        with pytest.raises(RetrievalError, match="gone"):
            await anext(events)
        assert not silent.is_open

    asyncio.run(run())


def test_closing_a_merged_stream_closes_all() -> None:
    sources = [Source(1, ends=False), Source(2, ends=False)]

    async def run() -> None:
        events = merged([source.stream() for source in sources])
        await anext(events)
        assert any(source.is_open for source in sources)
        await events.aclose()
        assert not any(source.is_open for source in sources)

    asyncio.run(run())


def request_that(*messages: dict, left: asyncio.Event | None = None) -> Request:
    """A request whose client sends `messages` and, once `left` is set, leaves."""
    pending = list(messages)

    async def receive() -> dict:
        if pending:
            return pending.pop(0)
        await (left or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    return Request({"type": "http", "headers": []}, receive)


def test_work_goes_on_while_the_client_is_there() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 5

    async def failing() -> int:
        raise RetrievalError("gone")

    async def run() -> None:
        body = {"type": "http.request", "body": b"", "more_body": False}
        assert await unless_disconnected(request_that(body), work()) == 5
        with pytest.raises(RetrievalError):
            await unless_disconnected(request_that(), failing())

    asyncio.run(run())


def test_a_client_that_leaves_cancels_the_work_for_it() -> None:
    async def run() -> None:
        left = asyncio.Event()
        events = []

        async def work() -> None:
            events.append("begun")
            left.set()
            try:
                await asyncio.Event().wait()
            finally:
                events.append("ended")

        with pytest.raises(ClientDisconnect):
            await unless_disconnected(request_that(left=left), work())
        assert events == ["begun", "ended"]

    asyncio.run(run())


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_a_client_that_leaves_a_stream_closes_its_source(is_cancelled: bool) -> None:
    """Left by a message as uvicorn's, or by cancelling the call as Serve does, wherever it waits."""

    async def texts(source: Source) -> AsyncGenerator[str, None]:
        async with aclosing(source.stream()) as numbers:
            async for number in numbers:
                yield str(number)

    async def run(where: str) -> None:
        source, left = Source(1, 2, ends=False), asyncio.Event()
        following = texts(source)
        first = await anext(following)
        sent: list[bytes] = []
        blocked = asyncio.Event()

        async def send(message: dict) -> None:
            sent.append(message.get("body", b""))
            is_there = where == "start" or (where == "sending" and sent[-1] == b"data: 2\n\n")
            if is_there:
                blocked.set()
                await asyncio.Event().wait()
            if where == "waiting" and sent[-1] == b"data: 2\n\n":
                blocked.set()

        scope = {"type": "http", "asgi": {"spec_version": "2.3"}, "headers": []}
        call = asyncio.create_task(EventStream(first, following)(scope, request_that(left=left).receive, send))
        await blocked.wait()
        assert source.is_open
        if is_cancelled:
            call.cancel()
        else:
            left.set()
        await asyncio.wait([call])
        assert not source.is_open

    for where in ("start", "sending", "waiting"):
        asyncio.run(run(where))
