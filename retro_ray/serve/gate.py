"""Who is let in, decided before anything of a request's body is read."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from retro_ray.serve.errors import ApiError
from retro_ray.serve.keys import KEYS_FILE_VARIABLE, KEYS_VARIABLE, KeyRing, Right
from retro_ray.serve.limits import limited

_SIGNS_OF_A_PROXY = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip")

bearer_scheme = HTTPBearer(auto_error=False, description="An API key; needed wherever the service has keys.")
"""For the OpenAPI page alone: `Gate.require` decides."""


class Gate:
    """Lets a request in by its API key; without any keys, by its coming from this machine.

    Args:
        keys: of the service; empty: every request of this machine may do everything, others nothing.
        peer_is_known: whether a request's peer address is the client's. False behind a proxy of our own, where
            every request seems to come from this machine: without keys nobody is let in.
    """

    def __init__(self, keys: KeyRing, *, peer_is_known: bool = True) -> None:
        self._keys = keys
        self._peer_is_known = peer_is_known

    def require(self, request: Request, right: Right) -> None:
        """Returns if `request` may do what needs `right`.

        Raises:
            ApiError: it may not (401 or 403).
        """
        if not self._keys:
            self._require_this_machine(request)
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        rights = self._keys.rights_of(key.strip())
        if scheme.lower() != "bearer" or rights is None:
            message = "a valid API key is needed, in the header Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if right not in rights:
            raise ApiError(403, f"this API key lacks the right {right!r}", code="missing_right")

    def _require_this_machine(self, request: Request) -> None:
        here = self._peer_is_known and request.client is not None and _is_loopback(request.client.host)
        # A reverse proxy on this machine speaks for others. A name that points here may be a web page's, which would
        # let that page's scripts in (DNS rebinding).
        if here and not any(sign in request.headers for sign in _SIGNS_OF_A_PROXY) and _is_loopback(_hostname(request)):
            return
        message = (
            "no API keys are set, so that only requests from and to this machine's loopback address are answered: to "
            f"serve others, start the service with api_keys_file=FILE, {KEYS_FILE_VARIABLE} or {KEYS_VARIABLE}"
        )
        raise ApiError(403, message, code="api_keys_not_set")


def guarded(gate: Gate, right: Right, max_body_bytes: int) -> type[APIRoute]:
    """The class of routes that need `right`, and read at most so much of a body."""

    class GuardedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_if_let_in(request: Request) -> Response:
                gate.require(request, right)
                return await handle(Request(request.scope, limited(request.receive, max_body_bytes)))

            return handle_if_let_in

    return GuardedRoute


def _hostname(request: Request) -> str | None:
    """The host that the request was meant for, without its port."""
    try:
        return urlsplit(f"//{request.headers.get('host', '')}").hostname
    except ValueError:
        return None


def _is_loopback(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
