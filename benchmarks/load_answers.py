"""How requests to the service may end, judged strictly: what is not exactly an answer or an error is malformed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx2


class CleanError(Exception):
    """An error in OpenAI's form: status and code."""


class CutError(Exception):
    """Serve's proxy ended the request without a word of the service: its replica has died."""


class MalformedError(Exception):
    """Neither an answer nor an error in OpenAI's form."""


@dataclass
class Answer:
    """What was taken in of an answer, as far as it came."""

    retrieves: bool = True
    """Whether neighbours were asked for."""
    num_tokens: int = 0
    text: str = ""
    documents: set[str] = field(default_factory=set)
    """Ids of all neighbours."""
    missing_shards: set[int] = field(default_factory=set)
    finish_reason: str | None = None
    citations: list[dict[str, Any]] | None = None
    """Those that came with the end."""

    def take_neighbours(self, found: dict[str, Any]) -> None:
        """A citation, or what was found for a text."""
        neighbours = found["neighbours"]
        distances = [one["distance"] for one in neighbours]
        _require(distances == sorted(distances), "neighbours are not in the order of their distances")
        self.documents |= {one["document_id"] for one in neighbours}
        self.missing_shards |= set(found["missing_shards"])
        _require(bool(neighbours or self.missing_shards), "no neighbours, though no shard is missing")


def read_completion(content: Any, max_tokens: int, answer: Answer) -> None:
    """Takes a whole completion into `answer`."""
    try:
        _require(content["object"] == "text_completion", "not a completion")
        (choice,) = content["choices"]
        answer.text, answer.finish_reason = choice["text"], choice["finish_reason"]
        answer.citations = choice["citations"]
        for citation in choice["citations"]:
            answer.take_neighbours(citation)
        _take_usage(answer, content["usage"])
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedError(f"a completion with {type(error).__name__}: {error}") from error
    _check_end(answer, max_tokens)


def read_found(content: Any, num_neighbours: int) -> Answer:
    """An answer of /v1/retrieve to one text."""
    answer = Answer()
    try:
        (found,) = content["data"]
        answer.take_neighbours(found)
        _require(len(found["neighbours"]) <= num_neighbours, "more neighbours than asked for")
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedError(f"an answer of retrieve with {type(error).__name__}: {error}") from error
    return answer


async def read_stream(reply: httpx2.Response, max_tokens: int, answer: Answer) -> AsyncIterator[str]:
    """Takes a stream into `answer`; yields every piece of text as it comes.

    Raises:
        CleanError: the stream ended with an error event.
        MalformedError: it ended otherwise than a stream must, or an event is none.
    """
    is_done = False
    async for data in _events(reply):
        _require(not is_done, "something follows [DONE]")
        if data == "[DONE]":
            is_done = True
            continue
        try:
            event = json.loads(data)
            if "error" in event:
                raise CleanError(f"event {_error_code(event)}")
            piece = _take_event(answer, event)
        except (KeyError, TypeError, ValueError) as error:
            raise MalformedError(f"an event with {type(error).__name__}: {error}") from error
        if piece:
            yield piece
    _require(is_done, "the stream ended without [DONE] and without an error")
    _check_end(answer, max_tokens)


def refusal(reply: httpx2.Response) -> Exception:
    """What an answer with a status other than 200, read to its end, is."""
    try:
        content = reply.json()
    except ValueError:
        if reply.status_code == 500 and reply.text == "Internal Server Error":
            return CutError("500 of Serve's proxy")
        return MalformedError(f"{reply.status_code} with {reply.text[:80]!r}")
    try:
        return CleanError(f"{reply.status_code} {_error_code(content)}")
    except (KeyError, TypeError, ValueError) as error:
        return MalformedError(f"{reply.status_code} with {type(error).__name__}: {error} in {reply.text[:80]!r}")


def _take_event(answer: Answer, event: dict[str, Any]) -> str:
    if not event["choices"]:
        _require(answer.finish_reason is not None, "usage before the end")
        _take_usage(answer, event["usage"])
        return ""
    (choice,) = event["choices"]
    _require(answer.finish_reason is None, "something follows finish_reason")
    for citation in choice["citations"]:
        answer.take_neighbours(citation)
    if choice["finish_reason"] is not None:
        answer.finish_reason, answer.citations = choice["finish_reason"], choice["citations"]
    answer.text += choice["text"]
    return choice["text"]


def _take_usage(answer: Answer, usage: dict[str, int]) -> None:
    answer.num_tokens = usage["completion_tokens"]
    _require(usage["prompt_tokens"] + answer.num_tokens == usage["total_tokens"], "usage does not add up")


def _check_end(answer: Answer, max_tokens: int) -> None:
    """Whether all of an answer is there, and its parts go together."""
    if answer.finish_reason == "cancelled":
        raise CleanError("finish_reason cancelled")
    _require(answer.finish_reason in ("stop", "length"), f"finish_reason is {answer.finish_reason}")
    is_full = answer.num_tokens == max_tokens
    _require(is_full if answer.finish_reason == "length" else answer.num_tokens > 0, f"{answer.num_tokens} tokens")
    _require(bool(answer.citations) == answer.retrieves, "citations do not come with retrieval, and with it alone")
    for citation in answer.citations or ():
        start, end = citation["text_start"], citation["text_end"]
        _require(end is not None and 0 <= start <= end <= len(answer.text), f"a citation of text[{start}:{end}]")


def _error_code(content: dict[str, Any]) -> str:
    """The code of an error, or its type, where it has OpenAI's form."""
    error = content["error"]
    _require(set(error) == {"message", "type", "param", "code"}, "an error with other fields than OpenAI's")
    _require(bool(error["message"]) and "\n" not in error["message"], "an error whose message is not one line")
    return error["code"] or error["type"]


async def _events(reply: httpx2.Response) -> AsyncIterator[str]:
    _require(reply.headers["content-type"].startswith("text/event-stream"), "not a stream of events")
    async for line in reply.aiter_lines():
        if line:
            _require(line.startswith("data: "), f"the line {line[:40]!r} in a stream")
            yield line.removeprefix("data: ")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise MalformedError(otherwise)
