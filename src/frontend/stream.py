"""Generated pieces to a streamed body. The routes say how a piece looks; how a stream lives and ends is said here."""

import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, Protocol, TypeVar

import falcon.asgi
import msgspec
from msgspec import Struct

from shoal.errors import RequestError
from shoal.frontend.exchange import Exchange
from shoal.frontend.problems import encode_error, internal_error

_LOGGER: Final = logging.getLogger("shoal.frontend")
_ENCODER: Final = msgspec.json.Encoder()
_COMMENT_EVERY_S: Final = 15.0
REFUSAL_PATIENCE_S: Final = 1.0

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)


class Source(Protocol[T]):
    """Where pieces come from: a ``Generation`` or a ``Turn``."""

    @property
    def done(self) -> bool:
        """Whether everything has come."""

    async def first_news(self, patience_s: float) -> None:
        """Waits a little for a refusal, and raises it as RequestError."""

    async def advance(self, patience_s: float | None = None) -> list[T]:
        """What has come; empty when patience is over."""

    async def settle(self) -> None:
        """Waits until the counts are complete."""


class Writer(Protocol[T_contra]):
    """How one route writes its stream."""

    def opening(self) -> list[Struct]:
        """Events before any text."""

    def chunks(self, piece: T_contra) -> list[Struct]:
        """Events for one piece."""

    def closing(self) -> list[Struct]:
        """Events after the last piece: the usage, where it was asked for."""


class Framing(Struct, frozen=True, kw_only=True):
    """How events become bytes."""

    media_type: str
    event: Callable[[Any], bytes]
    error: Callable[[RequestError], bytes]
    """The one error event of a stream that had begun."""
    end: bytes = b""
    comment: bytes = b""
    """What keeps a silent connection open; empty: nothing does."""


DONE: Final = "[DONE]"
"""The data of the last event."""


def _sse(content: bytes) -> bytes:
    return b"data: " + content + b"\n\n"


SSE: Final = Framing(
    media_type="text/event-stream; charset=utf-8",
    event=lambda event: _sse(_ENCODER.encode(event)),
    error=lambda error: _sse(encode_error(error)),
    end=_sse(DONE.encode()),
    comment=b": still here\n\n",
)
"""Server-sent events as OpenAI's older routes have them."""
NDJSON: Final = Framing(
    media_type="application/x-ndjson",
    event=lambda event: _ENCODER.encode(event) + b"\n",
    error=lambda error: encode_error(error) + b"\n",
)
"""One JSON object a line."""


def wants_events(req: falcon.asgi.Request) -> bool:
    """Whether the client names server-sent events in Accept: only such a client is sent comment lines."""
    return "text/event-stream" in (req.get_header("Accept") or "").lower()


async def begin(
    req: falcon.asgi.Request,
    resp: falcon.asgi.Response,
    exchange: Exchange,
    source: Source[T],
    writer: Writer[T],
    framing: Framing = SSE,
) -> None:
    """Answers with a stream, unless the scheduler refuses at once: that is still an HTTP status."""
    await source.first_news(REFUSAL_PATIENCE_S)
    resp.content_type = framing.media_type
    resp.set_header("Cache-Control", "no-cache")
    resp.set_header("X-Accel-Buffering", "no")
    comment_every_s = _COMMENT_EVERY_S if framing.comment and wants_events(req) else None
    resp.stream = _events(exchange, source, writer, framing, comment_every_s)


async def _events(
    exchange: Exchange,
    source: Source[T],
    writer: Writer[T],
    framing: Framing,
    comment_every_s: float | None,
) -> AsyncIterator[bytes]:
    """One yield for all that is ready at once. A failure is one error event, then the end."""

    def encode(events: list[Struct]) -> bytes:
        return b"".join(map(framing.event, events))

    try:
        yield encode(writer.opening())
        while not source.done:
            pieces = await source.advance(comment_every_s)
            events = b"".join([encode(writer.chunks(piece)) for piece in pieces])
            if events:
                yield events
            elif not pieces and comment_every_s is not None:
                yield framing.comment
        await source.settle()
        yield encode(writer.closing()) + framing.end
    except RequestError as error:
        exchange.detail = error.message
        yield framing.error(error)
    except Exception as error:
        _LOGGER.exception("stream failed id=%s", exchange.request_id)
        exchange.detail = repr(error)
        yield framing.error(internal_error())
