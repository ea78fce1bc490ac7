"""The HTTP face of generation: OpenAI's completions format, with citations. Knows no Ray.

What is asked for and not supported is refused by name, never ignored.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Protocol

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retro_ray.errors import PromptError, RetrievalError
from retro_ray.generation.request import MAX_NEIGHBOURS, Citation, GenerationRequest, GenerationResult
from retro_ray.generation.sampling import SamplingConfig

MAX_BODY_BYTES = 1 << 20
MAX_PROMPT_CHARACTERS = 100_000
MAX_CHOICES = 32
"""Prompts x n of one request."""

Prompt = Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARACTERS)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=200)]

_NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None,),
    "presence_penalty": (None, 0),
    "stream": (None, False),
    "stream_options": (None,),
    "suffix": (None, ""),
    "user": (None,),
}
"""OpenAI's parameters that are not supported, with the values that ask for nothing: these pass."""


class _Strict(BaseModel):
    """Neither unknown fields nor silent conversions such as "2" to 2."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class RetrievalOptions(_Strict):
    """Ours, beyond OpenAI's format: what this request retrieves."""

    enabled: bool = True
    """False: the model alone (RETRO[OFF])."""
    num_neighbours: int | None = Field(default=None, ge=1, le=MAX_NEIGHBOURS)
    """Neighbours per chunk; default: as many as the model was trained with."""


class CompletionRequest(_Strict):
    """Body of POST /v1/completions. null means the default."""

    model: str | None = None
    """The served model's name; optional, and refused if it is another's."""
    prompt: Prompt | Annotated[list[Prompt], Field(min_length=1, max_length=MAX_CHOICES)]
    """One text or several; an empty text starts a new document."""
    max_tokens: int = Field(default=16, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    """Completions per prompt."""
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] = Field(default_factory=list)
    seed: int | None = Field(default=None, ge=0, lt=2**62)
    """Completion i of a prompt uses seed + i."""
    top_k: int = Field(default=0, ge=0)
    """Ours: only the k likeliest tokens; 0: all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Ours: only tokens at least this many times as likely as the likeliest one."""
    retrieval: RetrievalOptions = RetrievalOptions()
    """Ours: what is retrieved."""

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        return {
            name: value
            for name, value in content.items()
            if value not in _NO_EFFECT.get(name, (None,) if name in cls.model_fields else ())
        }

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    def generation_requests(self) -> list[GenerationRequest]:
        """One per choice: the n completions of the first prompt, then those of the second, ...

        Raises:
            PromptError: there are too many of them.
        """
        num_choices = len(self.prompts) * self.n
        if num_choices > MAX_CHOICES:
            raise PromptError(
                f"{len(self.prompts)} prompts x n = {self.n} make {num_choices} completions; "
                f"one request may ask for at most {MAX_CHOICES}"
            )
        return [
            GenerationRequest(
                prompt=prompt,
                max_tokens=self.max_tokens,
                sampling=SamplingConfig(
                    temperature=self.temperature,
                    top_k=self.top_k,
                    top_p=self.top_p,
                    min_p=self.min_p,
                    seed=None if self.seed is None else self.seed + i,
                ),
                stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
                retrieval=self.retrieval.enabled,
                num_neighbours=self.retrieval.num_neighbours,
            )
            for prompt in self.prompts
            for i in range(self.n)
        ]


class Choice(BaseModel):
    """One completion."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: Literal["stop", "length"]
    citations: tuple[Citation, ...]
    """Ours: what the completion was conditioned on, chunk by chunk."""


class Usage(BaseModel):
    """Tokens read (each prompt once, its start-of-document token included) and generated."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionResponse(BaseModel):
    """Answer of POST /v1/completions."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    """Seconds since 1970."""
    model: str
    choices: list[Choice]
    usage: Usage


class Health(BaseModel):
    """Answer of GET /healthz."""

    status: Literal["ok"] = "ok"
    model: str
    checkpoint_step: int
    database_version: str


class CompletionService(Protocol):
    """What the HTTP face stands in front of."""

    def health(self) -> Health: ...

    def check_request(self, request: GenerationRequest) -> None:
        """Raises PromptError if `request` can never be served."""
        ...

    async def generate(self, request: GenerationRequest) -> GenerationResult: ...


def build_api(service: CompletionService) -> FastAPI:
    """The HTTP API in front of `service`."""
    api = FastAPI(title="retro_ray", description="Text completion with retrieval and citations.")
    api.add_middleware(_BodyLimit, max_bytes=MAX_BODY_BYTES)
    api.add_exception_handler(RequestValidationError, _on_invalid_body)
    api.add_exception_handler(PromptError, _on_prompt_error)
    api.add_exception_handler(RetrievalError, _on_retrieval_error)
    api.add_exception_handler(StarletteHTTPException, _on_http_exception)
    api.add_exception_handler(Exception, _on_unexpected_error)

    @api.get("/healthz")
    async def healthz() -> Health:
        return service.health()

    @api.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        served = {"id": service.health().model, "object": "model", "created": 0, "owned_by": "retro_ray"}
        return {"object": "list", "data": [served]}

    @api.post("/v1/completions")
    async def create_completion(body: CompletionRequest) -> CompletionResponse:
        model = service.health().model
        if body.model not in (None, model):
            raise HTTPException(404, f"model {body.model!r} is not served here; use {model!r}, or leave it out")
        requests = body.generation_requests()
        for request in requests:  # all, before any of them costs anything
            service.check_request(request)
        results = await asyncio.gather(*(service.generate(request) for request in requests))
        return _completion_response(model, results, body.n)

    return api


def _completion_response(model: str, results: Sequence[GenerationResult], n: int) -> CompletionResponse:
    prompt_tokens = sum(result.num_prompt_tokens for result in results[::n])
    completion_tokens = sum(len(result.token_ids) for result in results)
    return CompletionResponse(
        id=f"cmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=model,
        choices=[
            Choice(index=i, text=result.text, finish_reason=result.finish_reason, citations=result.citations)
            for i, result in enumerate(results)
        ],
        usage=Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
        ),
    )


def _error(status: int, message: str, kind: str, *, param: str | None = None, code: str | None = None) -> JSONResponse:
    """An error in OpenAI's form."""
    content = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": content}, status_code=status)


async def _on_invalid_body(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    first = problems[0]
    location = [str(part) for part in first["loc"][1:]]
    if first["type"] == "json_invalid":
        message = f"the body is not valid JSON: {first['ctx']['error']} at character {location[0]}"
        return _error(400, message, "invalid_request_error", code="invalid_json")
    if not location:
        message = "the body must be a JSON object, sent with the header Content-Type: application/json"
        return _error(400, message, "invalid_request_error", code="invalid_json")
    param = location[0]
    if first["type"] == "extra_forbidden":
        param = ".".join(location)
        known = "not supported by this service" if param in _NO_EFFECT else "unknown"
        return _error(
            400, f"parameter {param!r} is {known}", "invalid_request_error", param=param, code="unsupported_parameter"
        )
    if param == "retrieval":
        param = ".".join(location)
    # A field of several types fails once per type.
    wanted = dict.fromkeys(problem["msg"] for problem in problems if str(problem["loc"][1]) == location[0])
    got = "" if first["type"] == "missing" else f" (got {_shortened(first['input'])})"
    message = f"{param}: {', or: '.join(wanted)}{got}"
    return _error(400, message, "invalid_request_error", param=param, code="invalid_value")


async def _on_prompt_error(_request: Request, error: Exception) -> JSONResponse:
    return _error(400, str(error), "invalid_request_error")


async def _on_retrieval_error(_request: Request, error: Exception) -> JSONResponse:
    return _error(503, str(error), "server_error", code="retrieval_failed")


async def _on_http_exception(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StarletteHTTPException)
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    return _error(error.status_code, str(error.detail), kind)


async def _on_unexpected_error(_request: Request, error: Exception) -> JSONResponse:
    # The server logs the traceback; a client learns no more than the kind.
    return _error(500, f"internal error ({type(error).__name__}); the service's log has the cause", "server_error")


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _BodyLimit:
    """ASGI middleware that stops reading a body at `max_bytes`, whatever its headers say."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        num_bytes = 0

        async def limited_receive() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise HTTPException(
                    413, f"the body is larger than {self._max_bytes} bytes: send fewer or shorter prompts"
                )
            return message

        await self._app(scope, limited_receive, send)
