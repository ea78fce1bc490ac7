"""A service with a fixed story behind the real HTTP face, on a real port: what the playground's tests talk to."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager

import uvicorn

from retro_ray.errors import PromptError, RetrievalError
from retro_ray.generation.events import Finished, GenerationEvent, Retrieved, TextDelta
from retro_ray.generation.request import Citation, CitedNeighbour, GenerationRequest, GenerationResult
from retro_ray.serve.api import ApiSettings, build_api
from retro_ray.serve.service import RetrievedText, ServedModel

MARKUP = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'></span><b>bold</b>"
FOX = CitedNeighbour(
    chunk_id=7,
    document_id="fables/fox.txt",
    title="The fox and the grapes",
    source="s3://library/fables.parquet",
    distance=0.25,
    text="A hungry fox saw grapes. ",
    continuation="The quick brown fox jumps over the lazy dog, and the dog sleeps.",
)
DOG = CitedNeighbour(
    chunk_id=8,
    document_id="fables/dog.txt",
    title="",
    source="s3://library/fables.parquet",
    distance=1.5,
    text="The dog went home.",
    continuation="",
)
HOSTILE = CitedNeighbour(
    chunk_id=9,
    document_id=f"id {MARKUP}",
    title=f"title {MARKUP}",
    source=f"javascript:window.hacked=3 {MARKUP}",
    distance=2.0,
    text=f"text {MARKUP}",
    continuation=f"continuation {MARKUP}",
)
LEAD = "Once, \U0001f98a said, "
"""Written before anything is retrieved. Its second word is one character, and two in UTF-16."""
FIRST = "the Quick, brown fox jumps and sees grapes. "
SECOND = "Then a hungry fox saw grapes."
OFF = "Nothing was looked up."


def citation(chunk: int, start: int, end: int, neighbours: Sequence[CitedNeighbour], missing: Sequence[int] = ()):
    """Of text[start:end]."""
    return Citation(
        chunk=chunk,
        query=f"what chunk {chunk} says",
        first_token=64 * chunk,
        last_token=64 * chunk + 63,
        text_start=start,
        text_end=end,
        neighbours=tuple(neighbours),
        missing_shards=tuple(missing),
    )


def story(prompt: str) -> list[tuple[str, Citation | None]]:
    """What is written, with the neighbours that each part is conditioned on."""
    if prompt == "hostile":
        return [(MARKUP, citation(1, 0, len(MARKUP), [HOSTILE]))]
    first_end = len(LEAD) + len(FIRST)
    return [
        (LEAD, None),
        (FIRST, citation(3, len(LEAD), first_end, [FOX, DOG])),
        (SECOND, citation(4, first_end, first_end + len(SECOND), [FOX], missing=[3, 5])),
    ]


class StoryService:
    """Writes the same story to every prompt but a few, three characters at a time."""

    def __init__(self) -> None:
        self.requests: list[GenerationRequest] = []
        self.searches: list[tuple[list[str], int | None]] = []
        self.may_finish = threading.Event()
        """Cleared: a story stops before its last part, until this is set."""
        self.may_finish.set()
        self.num_open = 0

    def model(self) -> ServedModel:
        return ServedModel(
            name="story",
            created=1_700_000_000,
            checkpoint_step=12,
            context_length=2048,
            chunk_length=64,
            num_neighbours=2,
            database_version="0123456789abcdef",
        )

    def problems(self) -> list[str]:
        return []

    def check(self, request: GenerationRequest) -> None:
        if request.max_tokens > 1000:
            raise PromptError(f"max_tokens is {request.max_tokens}; the limit is 1000")

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        self.requests.append(request)
        self.num_open += 1
        try:
            async for event in self._events(request):
                yield event
        finally:
            self.num_open -= 1

    async def _events(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        parts = story(request.prompt) if request.retrieval else [(OFF, None)]
        for number, (text, cited) in enumerate(parts):
            if number == len(parts) - 1:
                while not self.may_finish.is_set():
                    await asyncio.sleep(0.01)
                if request.prompt == "break off":
                    raise RetrievalError("shard 2 did not answer in 2.0 s; raise timeout_s")
            if cited is not None:
                yield Retrieved(citation=dataclasses.replace(cited, last_token=None, text_end=None))
            for start in range(0, len(text), 3):
                yield TextDelta(text=text[start : start + 3], token_ids=(1,), logprobs=None)
                await asyncio.sleep(0)
        yield Finished(
            result=GenerationResult(
                text="".join(text for text, _ in parts),
                token_ids=(1,) * 30,
                finish_reason="length",
                citations=tuple(cited for _, cited in parts if cited is not None),
                num_prompt_tokens=5,
                logprobs=None,
            )
        )

    async def retrieve(self, texts: Sequence[str], num_neighbours: int | None, rerank: str | None):
        self.searches.append((list(texts), num_neighbours))
        if texts[0] == "unreachable":
            raise RetrievalError("shard 2 did not answer in 2.0 s; raise timeout_s")
        return [RetrievedText(neighbours=(FOX, DOG, HOSTILE), missing_shards=(4,))]

    async def start(self) -> None:
        """Nothing goes on beside the requests."""

    async def close(self) -> None:
        """Nothing to bring to an end."""


@contextmanager
def served(service: StoryService, settings: ApiSettings | None = None) -> Iterator[str]:
    """The API in front of `service` on a port of the loopback, in a thread; gives its address."""
    api = build_api(service, settings=settings)
    server = uvicorn.Server(uvicorn.Config(api, port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
