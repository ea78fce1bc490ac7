"""One log line per request, which says nothing of its content beyond sizes; request ids; headers for browsers."""

from __future__ import annotations

import logging
import re
import time
import traceback
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retro_ray.serve.errors import api_error, error_response, unexpected

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "X-Request-ID"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_SECURITY_HEADERS = {
    # Answers of the API are data: no browser is to make a page of them.
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
"""For answers that do not bring their own, as the page for people and the OpenAPI page do."""
_STATUS_OF_NOBODY = 499
"""In the log, for a client that left before its answer."""


class RequestLog:
    """ASGI middleware around everything else.

    Args:
        app: what answers.
        log_bodies: log requests' bodies too, up to their limits.
        send_request_id: False where the server in front (Serve's proxy) puts the id into the answer itself.
    """

    def __init__(self, app: ASGIApp, *, log_bodies: bool = False, send_request_id: bool = True) -> None:
        self._app = app
        self._log_bodies = log_bodies
        self._send_request_id = send_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = _LoggedRequest(scope, receive, send, keep_body=self._log_bodies, send_id=self._send_request_id)
        try:
            await self._app(scope, request.receive, request.send)
        except ClientDisconnect:
            request.status = _STATUS_OF_NOBODY
        except Exception as error:
            _log_unexpected(request.id, error)
            if request.status is not None:
                raise  # the answer has begun: the server must cut it off
            await error_response(api_error(error) or unexpected(error))(scope, receive, request.send)
        finally:
            request.log()


class _LoggedRequest:
    """What is to be logged of one request, gathered as it passes."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, keep_body: bool, send_id: bool) -> None:
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        self.id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self.status: int | None = None
        scope.setdefault("state", {})["request_id"] = self.id
        self._scope, self._receive, self._send = scope, receive, send
        self._send_id = send_id
        self._body: list[bytes] | None = [] if keep_body else None
        self._num_received = self._num_sent = 0
        self._started_s = time.monotonic()

    async def receive(self) -> Message:
        message = await self._receive()
        body = message.get("body", b"")
        self._num_received += len(body)
        if self._body is not None:
            self._body.append(body)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in _SECURITY_HEADERS.items():
                headers.setdefault(name, value)
            if self._send_id:
                headers[REQUEST_ID_HEADER] = self.id
        self._num_sent += len(message.get("body", b""))
        await self._send(message)

    def log(self) -> None:
        # The route's pattern and not the path: a path may hold a document's id.
        route = getattr(self._scope.get("route"), "path", "-")
        logger.info(
            "request=%s method=%s route=%s status=%s received_bytes=%d sent_bytes=%d seconds=%.3f%s",
            self.id,
            self._scope["method"],
            route,
            self.status or _STATUS_OF_NOBODY,
            self._num_received,
            self._num_sent,
            time.monotonic() - self._started_s,
            "" if self._body is None else f" body={b''.join(self._body)!r}",
        )


def _log_unexpected(request_id: str, error: Exception) -> None:
    """Where it happened, without the error's own message: that may quote the request."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("request=%s failed with %s at\n%s", request_id, type(error).__name__, frames)
