"""A service that answers at once, and a document store in memory: the HTTP face without a model."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

from retro_ray.errors import PromptError
from retro_ray.generation.events import Finished, GenerationEvent, Retrieved, TextDelta
from retro_ray.generation.request import Citation, CitedNeighbour, GenerationRequest, GenerationResult, TokenLogprob
from retro_ray.serve.documents import StoredDocument
from retro_ray.serve.service import RetrievedText, ServedModel

NEIGHBOUR = CitedNeighbour(
    chunk_id=7, document_id="d", title="t", source="s", distance=0.5, text="here", continuation="after"
)
CITATION = Citation(
    chunk=1,
    query="what was asked",
    first_token=8,
    last_token=9,
    text_start=0,
    text_end=4,
    neighbours=(NEIGHBOUR,),
    missing_shards=(3,),
)
BEGUN = Citation(
    chunk=1,
    query="what was asked",
    first_token=8,
    last_token=None,
    text_start=0,
    text_end=None,
    neighbours=(NEIGHBOUR,),
    missing_shards=(3,),
)
MODEL = ServedModel(
    name="tiny",
    created=1_700_000_000,
    checkpoint_step=12,
    context_length=2048,
    chunk_length=64,
    num_neighbours=2,
    database_version="0123456789abcdef",
)


def token_logprobs(request: GenerationRequest) -> tuple[TokenLogprob, ...] | None:
    """Of the two tokens of every answer."""
    if request.logprobs is None:
        return None
    top = (("a", -0.5), ("\ufffd", -1.0), ("\ufffd", -3.0))[: request.logprobs]
    return (
        TokenLogprob(token_id=1, text="an", text_offset=0, logprob=None, top=()),
        TokenLogprob(token_id=2, text="swer", text_offset=2, logprob=-0.5, top=top),
    )


class EchoService:
    """Answers `PROMPT/SEED` in two pieces, and remembers what it was asked and what ended early."""

    def __init__(self) -> None:
        self.requests: list[GenerationRequest] = []
        self.error: Exception | None = None
        """Raised in place of an answer."""
        self.late_error: Exception | None = None
        """Raised after the first piece."""
        self.never_ends = False
        """After the first piece nothing more comes."""
        self.problem: str | None = None
        self.num_open = 0
        self.lifecycle: list[str] = []
        self.searched: list[tuple[list[str], int | None, str | None]] = []

    def model(self) -> ServedModel:
        return MODEL

    def problems(self) -> list[str]:
        return [self.problem] if self.problem else []

    def check(self, request: GenerationRequest) -> None:
        if request.max_tokens > 100:
            raise PromptError(f"max_tokens {request.max_tokens} is over the limit of 100")

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[GenerationEvent, None]:
        self.num_open += 1
        try:
            if self.error is not None:
                raise self.error
            self.requests.append(request)
            prompt = request.prompt if request.prompt_tokens is None else str(list(request.prompt_tokens))
            logprobs = token_logprobs(request)
            if request.retrieval:
                yield Retrieved(citation=BEGUN)
            yield TextDelta(text=prompt, token_ids=(1,), logprobs=logprobs and logprobs[:1])
            if self.late_error is not None:
                raise self.late_error
            if self.never_ends:
                await asyncio.Event().wait()
            yield TextDelta(text="", token_ids=(2,), logprobs=None)
            end = f"/{request.sampling.seed}"
            yield TextDelta(text=end, token_ids=(3,), logprobs=logprobs and logprobs[1:])
            yield Finished(
                result=GenerationResult(
                    text=prompt + end,
                    token_ids=(1, 2, 3),
                    finish_reason="length",
                    citations=(CITATION,) if request.retrieval else (),
                    num_prompt_tokens=len(prompt) + 1,
                    logprobs=logprobs,
                )
            )
        finally:
            self.num_open -= 1

    async def retrieve(
        self, texts: Sequence[str], num_neighbours: int | None, rerank: str | None
    ) -> list[RetrievedText]:
        if self.error is not None:
            raise self.error
        self.searched.append((list(texts), num_neighbours, rerank))
        return [RetrievedText(neighbours=(NEIGHBOUR,) * (num_neighbours or 2), missing_shards=(3,)) for _ in texts]

    async def start(self) -> None:
        self.lifecycle.append("start")

    async def close(self) -> None:
        self.lifecycle.append("close")


class DictEditor:
    """Documents in a dict."""

    def __init__(self) -> None:
        self.documents: dict[str, StoredDocument] = {}
        self.error: Exception | None = None

    async def add(self, documents: Sequence[StoredDocument]) -> list[str]:
        if self.error is not None:
            raise self.error
        self.documents |= {document.id: document for document in documents}
        return [document.id for document in documents]

    async def get(self, document_id: str) -> StoredDocument | None:
        return self.documents.get(document_id)

    async def delete(self, document_ids: Sequence[str]) -> list[str]:
        return [one for one in document_ids if self.documents.pop(one, None) is not None]
