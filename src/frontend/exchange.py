"""One HTTP request and its answer, from the first byte to the last: its id, what it opened, its line in the log.

``app.py`` makes one around every call of the Falcon application and closes it in ``finally``: so a client that goes
away takes its sequences along, whether it streamed, waited or was still queued.
"""

import logging
import re
import secrets
import time
from collections.abc import Callable
from typing import Any, Final

import falcon.asgi
from msgspec import Struct

from shoal.config import SCOPES, Scope
from shoal.errors import RequestError
from shoal.frontend.generation import Generation
from shoal.frontend.schemas.base import GenerationRequest
from shoal.frontend.values import whole
from shoal.logs import event

_LOGGER: Final = logging.getLogger("shoal.frontend")
_REQUEST_ID: Final = re.compile(r"[\w.:@/+=-]{1,128}", re.ASCII)
_SCOPE_KEY: Final = "shoal.exchange"
INSIDER_KEY: Final = "shoal.insider"
CLIENT_GONE: Final = 499


class Insider(Struct, frozen=True):
    """Whoever calls the routes within this process puts it into the scope, under ``INSIDER_KEY``; no HTTP request
    can. Its key was checked when the work was taken in."""

    tenant: str
    priority: int


class Exchange:
    """State of one HTTP request."""

    def __init__(self, scope: dict[str, Any]) -> None:
        self.request_id = secrets.token_hex(12)
        self.status = 0
        """Of the answer; 0 until there is one."""
        self.detail = ""
        """Why an answer that had begun with 200 ended early."""
        self.user = ""
        """Whom the request is for, as the client says."""
        self.session = ""
        """The conversation that it belongs to, as the client says."""
        self.warnings: list[str] = []
        """What the client should know of a request that was honoured: each becomes a ``Warning`` header."""
        self.drops_unknown_fields = False
        """Whether fields that no route knows are dropped, with a warning, instead of being refused."""
        self.insider: Insider | None = scope.get(INSIDER_KEY)
        self.priority = 0 if self.insider is None else self.insider.priority
        """Added to what the request asks for."""
        self.tenant = "" if self.insider is None else self.insider.tenant
        """Name of the key that the client sent; empty where the server has no keys."""
        self.scopes: tuple[Scope, ...] = SCOPES
        """What the client may do."""
        self.body_limit_bytes = 0
        self._method = scope["method"]
        self._path = scope["path"]
        self._started = time.perf_counter()
        self._generation: Generation | None = None
        self._leaving: list[Callable[[], None]] = []
        scope[_SCOPE_KEY] = self

    def adopt_request_id(self, header: str | None) -> None:
        """Takes the client's X-Request-Id; RequestError 400 where it is not fit for a header and a log line."""
        if header is None:
            return
        if not _REQUEST_ID.fullmatch(header):
            message = "X-Request-Id: must be 1 to 128 letters, digits or . : @ / + = _ -"
            raise RequestError(400, message, param="X-Request-Id", code="invalid_value")
        self.request_id = header

    def note(self, request: GenerationRequest) -> None:
        """Takes what the request says of itself into the line of the log. RequestError 400 for a session number that
        is none."""
        self.user = request.safety_identifier or request.user or ""
        session = request.session_id
        if not isinstance(session, str):
            session = whole("session_id", session, -1, -1 << 63, (1 << 63) - 1)
        self.session = "" if session == -1 else str(session)

    def open(self, generation: Generation) -> None:
        """Submits ``generation``, and has it closed with this exchange."""
        self._generation = generation
        generation.start()

    def on_close(self, leave: Callable[[], None]) -> None:
        """Has ``leave`` called when the exchange ends, however it ends; the last one first."""
        self._leaving.append(leave)

    def close(self) -> None:
        """Cancels what is still open and writes the log line."""
        tokens = {}
        for leave in reversed(self._leaving):
            leave()
        if self._generation is not None:
            self._generation.close()
            tokens = {"prompt": self._generation.prompt_tokens, "tokens": self._generation.completion_tokens}
        given = {
            "detail": self.detail,
            "tenant": self.tenant,
            "user": self.user[:64],
            "session": self.session[:64],
            "dropped": ", ".join(self.warnings)[:500],
        }
        extra = {name: value for name, value in given.items() if value}
        elapsed_ms = round((time.perf_counter() - self._started) * 1000, 1)
        level = logging.DEBUG if self._path in ("/health", "/ready", "/metrics") else logging.INFO
        event(
            _LOGGER, "request", level, id=self.request_id, method=self._method, path=self._path[:200],
            status=self.status or 500, ms=elapsed_ms, **tokens, **extra,
        )  # fmt: skip


def header_text(text: str) -> str:
    """``text`` as it can stand within quotes in a header."""
    plain = [each if each.isascii() and each.isprintable() and each not in '"\\' else "?" for each in text]
    return "".join(plain)


def exchange_of(req: falcon.asgi.Request) -> Exchange:
    """The exchange that ``req`` belongs to."""
    exchange = req.scope[_SCOPE_KEY]
    assert isinstance(exchange, Exchange)
    return exchange
