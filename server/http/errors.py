"""Errors as OpenAI's body ``{"error": {message, type, param, code}}``, whatever raised them.

The status of a ``ShoalError`` is in ``server/errors.py``; here are the shape, the wording of
validation errors, and the handlers that ``app.py`` installs.
"""

import logging
import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from shoal.adapters.errors import AdapterError
from shoal.adapters.registry.errors import RegistryError, RegistryUnavailable
from shoal.server.errors import STATUS, InvalidRequest, Overloaded, ShoalError
from shoal.server.http.adapter_errors import from_adapter_error
from shoal.server.http.services import Services

logger = logging.getLogger(__name__)

_RETRY_S = "5"
_SHOWN_MAX = 100  # characters of a refused value that a message repeats
# `repr` would write out megabytes to cut them off again.
_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxdict = _SHOWN_MAX // 3
_SHORT.maxstring = _SHORT.maxlong = _SHOWN_MAX + 2


def error_body(error: ShoalError) -> dict[str, Any]:
    """OpenAI's error body."""
    _, kind, code = STATUS[type(error)]
    return _body(str(error), kind, code, error.param)


def error_response(error: ShoalError) -> JSONResponse:
    """The answer for ``error``: its status, body and headers."""
    status = STATUS[type(error)][0]
    headers: dict[str, str] = {}
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    elif status == 503:
        headers["Retry-After"] = _RETRY_S
    elif status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    elif status == 408:
        headers["Connection"] = "close"  # the rest of the body is not waited for
    return JSONResponse(error_body(error), status_code=status, headers=headers)


def registry_response(error: RegistryError) -> JSONResponse:
    """The answer when the registry fails. The error may name paths and URLs: for the log only."""
    logger.error("registry: %s", error)
    away = isinstance(error, RegistryUnavailable)
    message = "the adapter registry cannot be reached" if away else "internal error"
    body = _body(message, "server_error", "registry_error", None)
    headers = {"Retry-After": _RETRY_S} if away else None
    return JSONResponse(body, status_code=503 if away else 500, headers=headers)


def internal_body() -> dict[str, Any]:
    """The body for our own bugs: it tells a client nothing about our insides."""
    return _body("internal error", "server_error", "internal_error", None)


def install(app: FastAPI, services: Services) -> None:
    """Give ``app`` a handler for everything that can be raised below it."""

    async def on_shoal(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ShoalError)
        services.counts.error(STATUS[type(error)][0])
        return error_response(error)

    async def on_adapter(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, AdapterError)
        return await on_shoal(request, from_adapter_error(error))

    async def on_registry(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RegistryError)
        response = registry_response(error)
        services.counts.error(response.status_code)
        return response

    async def on_validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return await on_shoal(request, explain(error.errors()))

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        services.counts.error(error.status_code)
        body = _http_body(request, error)
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)

    async def on_bug(request: Request, error: Exception) -> JSONResponse:
        # Starlette raises it again once this is sent, and the HTTP server logs the traceback.
        services.counts.error(500)
        return JSONResponse(internal_body(), status_code=500)

    app.add_exception_handler(ShoalError, on_shoal)
    app.add_exception_handler(AdapterError, on_adapter)
    app.add_exception_handler(RegistryError, on_registry)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_bug)


def explain(errors: Sequence[Mapping[str, Any]]) -> InvalidRequest:
    """One sentence for pydantic's first error: the field, the value, the rule."""
    first = errors[0]
    kind = first["type"]
    if kind == "json_invalid":
        reason = first.get("ctx", {}).get("error", "syntax error")
        return InvalidRequest(f"the body is not valid JSON: {reason} at byte {first['loc'][-1]}")
    loc = first["loc"][1:] if first["loc"][:1] in (("body",), ("query",), ("path",)) else ()
    param = _dotted(loc)
    if not param:
        return InvalidRequest(
            "the body must be a JSON object, sent with Content-Type: application/json"
        )
    if kind == "extra_forbidden":
        return InvalidRequest(f"unknown field `{param}`: this server does not take it", param=param)
    if kind == "missing":
        return InvalidRequest(f"`{param}` is required", param=param)
    rule = str(first["msg"])
    rule = rule.removeprefix("Value error, ")
    rule = rule[:1].lower() + rule[1:]
    return InvalidRequest(f"`{param}` is {_shown(first.get('input'))}: {rule}", param=param)


def _http_body(request: Request, error: HTTPException) -> dict[str, Any]:
    path = request.url.path[: 2 * _SHOWN_MAX]
    if error.status_code == 404:
        message, code = f"no route {request.method} {path}", "not_found"
    elif error.status_code == 405:
        message = f"{path} does not take {request.method}"
        code = "method_not_allowed"
    else:
        message, code = str(error.detail), "invalid_value"
    return _body(message, "invalid_request_error", code, None)


def _body(message: str, kind: str, code: str, param: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _dotted(loc: Sequence[str | int]) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    # A field's name is the client's: it may be long, or hold what UTF-8 cannot.
    return text[:_SHOWN_MAX].encode("utf-8", "replace").decode()


def _shown(value: object) -> str:
    text = _SHORT.repr(value)
    return text if len(text) <= _SHOWN_MAX else f"{text[:_SHOWN_MAX]}..."
