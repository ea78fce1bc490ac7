"""The page for people at `/`: a prompt, the text as it is written, and what each stretch of it was conditioned on.

Static files of this package, kept in memory: no request's path ever reaches the file system. The page loads nothing
from elsewhere, and its policy lets it neither run nor style anything that is not one of these files.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources

from fastapi import FastAPI, HTTPException, Request, Response

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

HEADERS = {
    "Content-Security-Policy": "; ".join(
        [
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self' data:",
            "connect-src 'self'",
            # These do not follow default-src.
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Asked for again each time, answered with 304: a new version of the service never meets an old script.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class _Page:
    """A file as it is sent."""

    content: bytes
    media_type: str
    etag: str


def mount_playground(api: FastAPI) -> None:
    """Serve the page at `/` and its parts at `/playground/*`; neither is in the OpenAPI description."""
    pages = _read_pages()

    @api.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def playground(request: Request) -> Response:
        return _answer(pages["index.html"], request)

    @api.api_route("/playground/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    async def playground_part(name: str, request: Request) -> Response:
        if name not in pages:
            raise HTTPException(404, "Not Found")
        return _answer(pages[name], request)


def _read_pages() -> dict[str, _Page]:
    pages = {}
    for file in resources.files(__name__).iterdir():
        media_type = MEDIA_TYPES.get("." + file.name.rpartition(".")[2])
        if media_type is not None:
            content = file.read_bytes()
            pages[file.name] = _Page(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:16]}"')
    return pages


def _answer(page: _Page, request: Request) -> Response:
    headers = {**HEADERS, "ETag": page.etag}
    if page.etag in request.headers.get("If-None-Match", ""):
        return Response(status_code=304, headers=headers)
    return Response(page.content, media_type=page.media_type, headers=headers)
