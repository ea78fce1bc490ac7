"""The HTTP face of generation, put together: who may ask, what is answered, how it fails. Knows no Ray."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from fastapi import APIRouter, Depends, FastAPI

from retro_ray.serve.completions import add_completions
from retro_ray.serve.docs_page import add_docs_page
from retro_ray.serve.documents import DocumentEditor, add_documents
from retro_ray.serve.errors import ErrorReply, add_error_handlers
from retro_ray.serve.gate import Gate, bearer_scheme, guarded
from retro_ray.serve.keys import KeyRing, Right
from retro_ray.serve.limits import MAX_BODY_BYTES, MAX_DOCUMENTS_BODY_BYTES
from retro_ray.serve.playground import mount_playground
from retro_ray.serve.request_log import RequestLog
from retro_ray.serve.retrieval import add_retrieval
from retro_ray.serve.service import GenerationService
from retro_ray.serve.status import add_models, add_probes

_DESCRIPTION = "Text completion with retrieval and citations: OpenAI's completions, and more."


@dataclass(frozen=True, kw_only=True)
class ApiSettings:
    """How the face behaves, whatever is behind it."""

    keys: KeyRing = field(default_factory=KeyRing)
    """Empty: only this machine's own requests are answered."""
    peer_is_known: bool = True
    """False where every request comes through a proxy of our own; see Gate."""
    max_deadline_s: float = 600.0
    """After which a request is given up; a request may ask for less."""
    log_bodies: bool = False
    """Log what is asked, not only how much of it."""
    send_request_id: bool = True
    """False where the server in front sends X-Request-ID itself."""


def build_api(
    service: GenerationService, editor: DocumentEditor | None = None, settings: ApiSettings | None = None
) -> FastAPI:
    """The HTTP API in front of `service`; without an `editor` there is no /v1/documents."""
    settings = settings or ApiSettings()

    @asynccontextmanager
    async def while_serving(_api: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.close()

    api = FastAPI(title="retro_ray", description=_DESCRIPTION, lifespan=while_serving, docs_url=None, redoc_url=None)
    api.add_middleware(RequestLog, log_bodies=settings.log_bodies, send_request_id=settings.send_request_id)
    add_error_handlers(api)
    gate = Gate(settings.keys, peer_is_known=settings.peer_is_known)
    generating = _router(gate, "generate", MAX_BODY_BYTES)
    add_completions(generating, service, settings.max_deadline_s)
    add_retrieval(generating, service, settings.max_deadline_s)
    add_models(generating, service)
    api.include_router(generating)
    if editor is not None:
        editing = _router(gate, "edit", MAX_DOCUMENTS_BODY_BYTES)
        add_documents(editing, editor)
        api.include_router(editing)
    open_to_all = APIRouter()
    add_probes(open_to_all, service)
    api.include_router(open_to_all)
    add_docs_page(api)
    mount_playground(api)
    return api


def _router(gate: Gate, right: Right, max_body_bytes: int) -> APIRouter:
    return APIRouter(
        route_class=guarded(gate, right, max_body_bytes),
        dependencies=[Depends(bearer_scheme)],
        responses={"4XX": {"model": ErrorReply}, "5XX": {"model": ErrorReply}},
    )
