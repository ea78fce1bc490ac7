"""POST /v1/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from retro_ray.serve.completion_reply import CompletionChunk, CompletionReply, ReplyWriter, collect_results
from retro_ray.serve.completion_request import CompletionRequest
from retro_ray.serve.errors import ApiError
from retro_ray.serve.service import GenerationService
from retro_ray.serve.streaming import EventStream, merged, unless_disconnected


def add_completions(router: APIRouter, service: GenerationService, max_deadline_s: float) -> None:
    """The route of completions.

    Args:
        router: where it goes.
        service: what generates.
        max_deadline_s: of a request; also of those that set none.
    """

    @router.post("/v1/completions", response_model=CompletionReply, responses=_event_stream())
    async def create_completion(body: CompletionRequest, request: Request) -> CompletionReply | Response:
        """Continue a text, with citations."""
        model = service.model().name
        if body.model not in (None, model):
            raise ApiError(
                404,
                f"model {body.model!r} is not served here; use {model!r}, or leave it out",
                param="model",
                code="model_not_found",
            )
        wanted = body.generation_requests(max_deadline_s)
        for choice in wanted:  # all, before any of them costs anything
            service.check(choice)
        writer = ReplyWriter(model, body.n, body.logprobs)
        events = merged([service.stream(choice) for choice in wanted])
        if not body.stream:
            return writer.reply(await unless_disconnected(request, collect_results(events, len(wanted))))
        options = body.stream_options
        chunks = writer.chunks(events, include_usage=options is not None and options.include_usage)
        # Waits for the first chunk, so that what fails at once has its own status.
        first = await unless_disconnected(request, anext(chunks))
        return EventStream(first, chunks)


def _event_stream() -> dict[int | str, dict]:
    """For the OpenAPI page: with `stream`, the answer is a stream of chunks."""
    return {
        200: {
            "description": "The completion; with `stream`, server-sent events of chunks and a last one `[DONE]`",
            "content": {"text/event-stream": {"schema": CompletionChunk.model_json_schema()}},
        }
    }
