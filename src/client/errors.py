"""What the client raises. The message is the server's own where there is one."""

import email.utils
import json
import time
from collections.abc import Mapping
from typing import Any, Final

_LONGEST_TEXT: Final = 500


class APIError(Exception):
    """A call that failed. Its subclasses say how."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | int | None = None,
        kind: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        """The HTTP status; None where there was no answer."""
        self.code = code
        """The server's word for the reason, like ``context_length_exceeded``."""
        self.kind = kind
        """OpenAI's ``type``, like ``invalid_request_error``."""
        self.param = param
        """The field that is wrong."""
        self.retry_after = retry_after
        """Seconds after which another try makes sense."""
        self.request_id = request_id
        """Under which the server's log knows the call."""

    def __str__(self) -> str:
        return self.message if self.status is None else f"{self.status}: {self.message}"


class APIConnectionError(APIError):
    """No answer, or one that broke off: the server is not there, went away, or speaks something else."""


class APITimeoutError(APIConnectionError):
    """Nothing came for longer than the client's ``timeout``, or 408: the request's own deadline passed."""


class BadRequestError(APIError):
    """400, 413 or 422: the request cannot be honoured; ``param`` names the field."""


class ContextLengthError(BadRequestError):
    """The prompt, or the prompt with the answer asked for, is longer than the model's context."""


class AuthenticationError(APIError):
    """401: the API key is missing or wrong."""


class PermissionDeniedError(APIError):
    """403: the key, or the Host header, may not do this."""


class NotFoundError(APIError):
    """404: there is no such route, model or session."""


class ConflictError(APIError):
    """409: the session answers another turn just now."""


class RateLimitError(APIError):
    """429: too much at once; ``retry_after`` says when to try again."""


class InternalServerError(APIError):
    """Any 5xx."""


class ServiceUnavailableError(InternalServerError):
    """503: the server is starting, draining or restarting a part of itself."""


_BY_STATUS: Final[Mapping[int, type[APIError]]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    408: APITimeoutError,
    409: ConflictError,
    413: BadRequestError,
    422: BadRequestError,
    429: RateLimitError,
    503: ServiceUnavailableError,
}
_STATUS_OF_KIND: Final[Mapping[str, int]] = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "timeout_error": 408,
    "conflict_error": 409,
    "rate_limit_error": 429,
    "server_error": 500,
}


def from_answer(status: int, content: bytes, headers: Mapping[str, str]) -> APIError:
    """The error of an answer whose status is not 2xx."""
    retry_after = retry_after_s(headers.get("Retry-After"))
    request_id = headers.get("X-Request-Id")
    if 300 <= status < 400:
        message = f"the server points to {headers.get('Location', 'another address')}; use that as its URL"
        return APIError(message, status=status, request_id=request_id)
    try:
        body = json.loads(content)
    except ValueError:
        body = None
    if isinstance(body, dict):
        return _from_body(body, status, retry_after, request_id)
    text = content.decode("utf-8", "replace").strip()[:_LONGEST_TEXT]
    return _class_of(status, None)(
        text or "the server gave no reason", status=status, retry_after=retry_after, request_id=request_id
    )


def from_event(body: Mapping[str, Any], request_id: str | None) -> APIError | None:
    """The error that an event of a stream stands for; None for any other event."""
    if isinstance(body.get("error"), dict) or body.get("object") == "error":
        return _from_body(body, None, None, request_id)
    return None


def retry_after_s(header: str | None) -> float | None:
    """Seconds from now, of a header that has seconds or a date."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


def _from_body(
    body: Mapping[str, Any], status: int | None, retry_after: float | None, request_id: str | None
) -> APIError:
    """Of OpenAI's ``{"error": {...}}``, of LMDeploy's flat form, and of FastAPI's ``{"detail": ...}``."""
    inner = body.get("error")
    fields: Mapping[str, Any] = inner if isinstance(inner, dict) else body
    code, kind = fields.get("code"), fields.get("type")
    message = fields.get("message") or fields.get("detail") or inner or "the server gave no reason"
    if status is None:
        status = code if isinstance(code, int) else _STATUS_OF_KIND.get(str(kind), 500)
    return _class_of(status, code)(
        message if isinstance(message, str) else json.dumps(message),
        status=status,
        code=code,
        kind=kind,
        param=fields.get("param"),
        retry_after=retry_after,
        request_id=request_id,
    )


def _class_of(status: int, code: str | int | None) -> type[APIError]:
    if code == "context_length_exceeded":
        return ContextLengthError
    return _BY_STATUS.get(status) or (InternalServerError if status >= 500 else APIError)
