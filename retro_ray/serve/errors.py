"""Every failure as an answer in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException

from retro_ray.errors import (
    BusyError,
    DeadlineError,
    InputError,
    OverloadedError,
    PromptError,
    RetrievalError,
    RetroRayError,
)

_RETRY_EDIT_AFTER_S = "5"

UNSUPPORTED = frozenset({"best_of", "frequency_penalty", "logit_bias", "presence_penalty", "suffix", "user"})
"""OpenAI's parameters of completions that this service does not know."""


class ErrorDetail(BaseModel):
    """What went wrong, for a program and for a person."""

    message: str
    """One line."""
    type: str
    """`invalid_request_error` (the request is at fault) or `server_error`."""
    param: str | None
    """The parameter at fault, if it is one."""
    code: str | None


class ErrorReply(BaseModel):
    """OpenAI's form of an error."""

    error: ErrorDetail


class ApiError(HTTPException):
    """An answer that is an error.

    It is an HTTPException, so that FastAPI lets it pass where it reads a body.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.param = param
        self.code = code


def api_error(error: Exception) -> ApiError | None:
    """How an error is told to the client; None: it is none that a client should learn of."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, StarletteHTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, RequestValidationError):
        return _invalid_body(error)
    if isinstance(error, PromptError):
        return ApiError(400, str(error))
    if isinstance(error, OverloadedError):
        retry_after_s = str(max(1, math.ceil(error.retry_after_s)))
        return ApiError(503, str(error), code="overloaded", headers={"Retry-After": retry_after_s})
    if isinstance(error, DeadlineError):
        # 408 as Serve's own timeouts; the openai client would ask again, and spend the deadline once more.
        return ApiError(408, str(error), code="deadline_exceeded", headers={"X-Should-Retry": "false"})
    if isinstance(error, RetrievalError):
        return ApiError(503, str(error), code="retrieval_failed")
    if isinstance(error, BusyError):
        return ApiError(503, str(error), code="database_busy", headers={"Retry-After": _RETRY_EDIT_AFTER_S})
    if isinstance(error, RetroRayError):
        # Meant for who can mend it: of these routes only those that edit raise such.
        return ApiError(400 if isinstance(error, InputError) else 500, str(error))
    return None


def unexpected(error: Exception) -> ApiError:
    """For what nobody foresaw: the log has the cause, the client learns no more than its kind."""
    return ApiError(500, f"internal error ({type(error).__name__}); the service's log has the cause")


def error_content(error: ApiError) -> dict[str, Any]:
    """The body of the answer."""
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    return {"error": {"message": str(error.detail), "type": kind, "param": error.param, "code": error.code}}


def error_response(error: ApiError) -> JSONResponse:
    """The whole answer."""
    return JSONResponse(error_content(error), status_code=error.status_code, headers=error.headers)


def add_error_handlers(api: FastAPI) -> None:
    """Answer the failures that `api_error` knows; others go on to RequestLog."""

    async def answer(_request: Request, error: Exception) -> JSONResponse:
        known = api_error(error)
        if known is None:
            raise error
        return error_response(known)

    for kind in (StarletteHTTPException, RequestValidationError, RetroRayError):
        api.add_exception_handler(kind, answer)


def _invalid_body(error: RequestValidationError) -> ApiError:
    """One line that names the first parameter that is wrong, and how."""
    problems = error.errors()
    first = problems[0]
    location = [str(part) for part in first["loc"][1:]]
    if first["type"] == "json_invalid":
        message = f"the body is not valid JSON: {first['ctx']['error']} at character {location[0]}"
        return ApiError(400, message, code="invalid_json")
    if not location:
        if first["type"] == "value_error":
            return ApiError(400, first["msg"].removeprefix("Value error, "), code="invalid_value")
        message = "the body must be a JSON object, sent with the header Content-Type: application/json"
        return ApiError(400, message, code="invalid_json")
    if first["type"] == "extra_forbidden":
        param = ".".join(location)
        known = "not supported by this service" if param in UNSUPPORTED else "unknown"
        return ApiError(400, f"parameter {param!r} is {known}", param=param, code="unsupported_parameter")
    param = ".".join(location) if location[0] in ("retrieval", "stream_options", "documents") else location[0]
    # A field of several types fails once per type.
    wanted = dict.fromkeys(problem["msg"] for problem in problems if str(problem["loc"][1]) == location[0])
    got = "" if first["type"] == "missing" else f" (got {_shortened(first['input'])})"
    return ApiError(400, f"{param}: {', or: '.join(wanted)}{got}", param=param, code="invalid_value")


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
