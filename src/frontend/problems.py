"""Errors as clients see them: OpenAI's shape, the true status, Retry-After. ``app.py`` registers the handlers."""

import logging
import math
from typing import Any, Final

import falcon
import falcon.asgi
import msgspec

from shoal.errors import RequestError
from shoal.frontend.exchange import exchange_of
from shoal.frontend.schemas.anthropic import AnthropicError, AnthropicErrorDetail

_LOGGER: Final = logging.getLogger("shoal.frontend")
_ENCODER: Final = msgspec.json.Encoder()
_LONGEST_TEXT: Final = 1000
_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    429: "rate_limit_error",
}


ANTHROPIC_PREFIX: Final = "/v1/messages"
_ANTHROPIC_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(error: RequestError) -> dict[str, Any]:
    """OpenAI's error object, and beside it what clients of LMDeploy read."""
    kind = "server_error" if error.status >= 500 else _TYPES.get(error.status, "invalid_request_error")
    param = None if error.param is None else _short(error.param)
    message = _short(error.message)
    return {
        "error": {"message": message, "type": kind, "param": param, "code": error.code},
        "object": "error",
        "message": message,
        "code": error.status,
    }


def _short(text: str) -> str:
    """Messages quote what clients sent, a field's name of megabytes for one."""
    return text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 3] + "..."


def encode_error(error: RequestError) -> bytes:
    """The same as JSON: a body, or the one error event of a stream."""
    return _ENCODER.encode(error_body(error))


def internal_error() -> RequestError:
    """What a client learns of a fault of ours; the log has the rest."""
    return RequestError(500, "the server made a mistake; its log says more", code="internal_error")


def register(app: falcon.asgi.App[falcon.asgi.Request, falcon.asgi.Response]) -> None:
    """Has every error of ``app`` answered in this form."""
    app.add_error_handler(RequestError, _answer_request_error)
    app.add_error_handler(falcon.HTTPError, _answer_falcon_error)
    app.add_error_handler(Exception, _answer_surprise)


def anthropic_error(error: RequestError) -> AnthropicError:
    """Anthropic's error object."""
    kind = "api_error" if error.status >= 500 else "invalid_request_error"
    return AnthropicError(AnthropicErrorDetail(_ANTHROPIC_TYPES.get(error.status, kind), _short(error.message)))


def write(req: falcon.asgi.Request, resp: falcon.asgi.Response, error: RequestError) -> None:
    """Makes ``resp`` the answer to ``error``, in the form of the API that ``req`` calls."""
    resp.status = error.status
    resp.content_type = falcon.MEDIA_JSON
    if req.path.startswith(ANTHROPIC_PREFIX):
        shown = anthropic_error(error)
        shown.request_id = exchange_of(req).request_id
        resp.data = _ENCODER.encode(shown)
    else:
        resp.data = encode_error(error)
    if error.status == 401:
        resp.set_header("WWW-Authenticate", error.challenge)
    if error.retry_after_s is not None:
        resp.set_header("Retry-After", str(max(1, math.ceil(error.retry_after_s))))


async def _answer_request_error(
    req: falcon.asgi.Request, resp: falcon.asgi.Response, error: RequestError, _params: dict[str, Any]
) -> None:
    write(req, resp, error)


async def _answer_falcon_error(
    req: falcon.asgi.Request, resp: falcon.asgi.Response, error: falcon.HTTPError, _params: dict[str, Any]
) -> None:
    """Routes that do not exist, methods that a route lacks, headers that falcon cannot read."""
    status = error.status_code
    if status == 404:
        message, code = f"there is no route {req.path}", "unknown_route"
    elif status == 405:
        message, code = f"{req.path} does not answer {req.method}", "method_not_allowed"
    else:
        message, code = error.description or error.title or "the request is invalid", "invalid_request"
    write(req, resp, RequestError(status, message, code=code))
    for name, value in (error.headers or {}).items() if isinstance(error.headers, dict) else ():
        resp.set_header(name, value)


async def _answer_surprise(
    req: falcon.asgi.Request, resp: falcon.asgi.Response, error: Exception, _params: dict[str, Any]
) -> None:
    _LOGGER.error("request failed path=%s", req.path, exc_info=error)
    write(req, resp, internal_error())
