"""One HTTP request and its answer, from the first byte to the last: its id, what it opened, its line in the log.

``app.py`` makes one around every call of the Falcon application and closes it in ``finally``: so a client that goes
away takes its sequences along, whether it streamed, waited or was still queued.
"""

import logging
import re
import secrets
import time
from typing import Any, Final

import falcon.asgi

from shoal.errors import RequestError
from shoal.frontend.generation import Generation
from shoal.logs import event

_LOGGER: Final = logging.getLogger("shoal.frontend")
_REQUEST_ID: Final = re.compile(r"[\w.:@/+=-]{1,128}", re.ASCII)
_SCOPE_KEY: Final = "shoal.exchange"
CLIENT_GONE: Final = 499


class Exchange:
    """State of one HTTP request."""

    def __init__(self, scope: dict[str, Any]) -> None:
        self.request_id = secrets.token_hex(12)
        self.status = 0
        """Of the answer; 0 until there is one."""
        self.detail = ""
        """Why an answer that had begun with 200 ended early."""
        self.user = ""
        self._method = scope["method"]
        self._path = scope["path"]
        self._started = time.perf_counter()
        self._generation: Generation | None = None
        scope[_SCOPE_KEY] = self

    def adopt_request_id(self, header: str | None) -> None:
        """Takes the client's X-Request-Id; RequestError 400 where it is not fit for a header and a log line."""
        if header is None:
            return
        if not _REQUEST_ID.fullmatch(header):
            message = "X-Request-Id: must be 1 to 128 letters, digits or . : @ / + = _ -"
            raise RequestError(400, message, param="X-Request-Id", code="invalid_value")
        self.request_id = header

    def open(self, generation: Generation) -> None:
        """Submits ``generation``, and has it closed with this exchange."""
        self._generation = generation
        generation.start()

    def close(self) -> None:
        """Cancels what is still open and writes the log line."""
        tokens = {}
        if self._generation is not None:
            self._generation.close()
            tokens = {"prompt": self._generation.prompt_tokens, "tokens": self._generation.completion_tokens}
        extra = {name: value for name, value in (("detail", self.detail), ("user", self.user[:64])) if value}
        elapsed_ms = round((time.perf_counter() - self._started) * 1000, 1)
        level = logging.DEBUG if self._path in ("/health", "/ready", "/metrics") else logging.INFO
        event(
            _LOGGER, "request", level, id=self.request_id, method=self._method, path=self._path[:200],
            status=self.status or 500, ms=elapsed_ms, **tokens, **extra,
        )  # fmt: skip


def exchange_of(req: falcon.asgi.Request) -> Exchange:
    """The exchange that ``req`` belongs to."""
    exchange = req.scope[_SCOPE_KEY]
    assert isinstance(exchange, Exchange)
    return exchange
