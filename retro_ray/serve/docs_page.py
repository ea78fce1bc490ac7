"""The OpenAPI page at /docs, from files of this installation: it works offline, and no other host learns of it."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, Response

_FILES = {
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "swagger-ui.css": "text/css; charset=utf-8",
    "favicon.png": "image/png",
}
"""Those of Swagger UI, as the package fastapi_offline carries them."""
_INLINE_SCRIPT = re.compile(rb"<script>(.*?)</script>", re.DOTALL)


def add_docs_page(api: FastAPI) -> None:
    """The page and its files; the page's policy lets only these, and its one inline script, run."""
    folder = resources.files("fastapi_offline") / "static"
    files = {name: (folder / name).read_bytes() for name in _FILES}

    @api.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        root = request.scope.get("root_path", "").rstrip("/")
        page = get_swagger_ui_html(
            openapi_url=f"{root}{api.openapi_url}",
            title=f"{api.title}: HTTP API",
            swagger_js_url=f"{root}/docs/swagger-ui-bundle.js",
            swagger_css_url=f"{root}/docs/swagger-ui.css",
            swagger_favicon_url=f"{root}/docs/favicon.png",
        )
        page.headers["Content-Security-Policy"] = _policy(bytes(page.body))
        return page

    @api.get("/docs/{name}", include_in_schema=False)
    async def docs_file(name: str) -> Response:
        if name not in files:
            return Response(status_code=404)
        return Response(files[name], media_type=_FILES[name], headers={"Cache-Control": "max-age=86400"})


def _policy(page: bytes) -> str:
    digests = [base64.b64encode(hashlib.sha256(script).digest()).decode() for script in _INLINE_SCRIPT.findall(page)]
    scripts = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src 'self' {scripts}; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
