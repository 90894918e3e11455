"""Pieces to server-sent events. The routes say how a piece looks; how a stream lives and ends is said here."""

import logging
from collections.abc import AsyncIterator
from typing import Final, Protocol

import falcon.asgi
import msgspec

from shoal.errors import RequestError
from shoal.frontend.exchange import Exchange
from shoal.frontend.generation import Generation, Piece
from shoal.frontend.problems import encode_error, internal_error

_LOGGER: Final = logging.getLogger("shoal.frontend")
_ENCODER: Final = msgspec.json.Encoder()
_COMMENT: Final = b": still here\n\n"
_COMMENT_EVERY_S: Final = 15.0
_REFUSAL_PATIENCE_S: Final = 1.0
_DONE: Final = b"data: [DONE]\n\n"


class Writer(Protocol):
    """How one route writes its stream."""

    def opening(self) -> list[msgspec.Struct]:
        """Chunks before any text."""

    def chunks(self, piece: Piece) -> list[msgspec.Struct]:
        """Chunks for one piece."""

    def closing(self) -> list[msgspec.Struct]:
        """Chunks after the last piece: the usage, where it was asked for."""


async def begin(
    req: falcon.asgi.Request,
    resp: falcon.asgi.Response,
    exchange: Exchange,
    generation: Generation,
    writer: Writer,
) -> None:
    """Answers with a stream, unless the scheduler refuses at once: that is still an HTTP status."""
    await generation.first_news(_REFUSAL_PATIENCE_S)
    named = "text/event-stream" in (req.get_header("Accept") or "").lower()
    resp.content_type = "text/event-stream; charset=utf-8"
    resp.set_header("Cache-Control", "no-cache")
    resp.set_header("X-Accel-Buffering", "no")
    resp.stream = _events(exchange, generation, writer, _COMMENT_EVERY_S if named else None)


async def _events(
    exchange: Exchange, generation: Generation, writer: Writer, comment_every_s: float | None
) -> AsyncIterator[bytes]:
    """One yield for all that is ready at once. A failure is one error event, then the end."""
    try:
        yield _encode(writer.opening())
        while not generation.done:
            pieces = await generation.advance(comment_every_s)
            events = b"".join([_encode(writer.chunks(piece)) for piece in pieces])
            if events:
                yield events
            elif not pieces and comment_every_s is not None:
                yield _COMMENT
        await generation.settle()
        yield _encode(writer.closing()) + _DONE
    except RequestError as error:
        exchange.detail = error.message
        yield b"data: " + encode_error(error) + b"\n\n"
    except Exception as error:
        _LOGGER.exception("stream failed id=%s", exchange.request_id)
        exchange.detail = repr(error)
        yield b"data: " + encode_error(internal_error()) + b"\n\n"


def _encode(chunks: list[msgspec.Struct]) -> bytes:
    return b"".join([b"data: " + _ENCODER.encode(chunk) + b"\n\n" for chunk in chunks])
