"""HTTP bodies to checked structs: size, encoding, JSON, schema. Routes call ``read``; every mistake is a 400 or 413."""

import asyncio
from bisect import bisect_left
from functools import cache, partial
from typing import Any, Final, TypeVar

import falcon.asgi
import msgspec

from shoal.errors import RequestError
from shoal.frontend.exchange import exchange_of
from shoal.frontend.schemas.base import RequestBody
from shoal.frontend.unknown_fields import drop_unknown

_DRAIN_LIMIT_BYTES: Final = 64 << 20
"""A body over the limit is read and dropped up to here, so that the client gets to read the answer."""
_DRAIN_PATIENCE_S: Final = 10.0

_UNKNOWN: Final = "Object contains unknown field `"
"""How msgspec begins to say so."""

B = TypeVar("B", bound=RequestBody)


@cache
def _decoder(body: type[RequestBody]) -> "msgspec.json.Decoder[Any]":
    return msgspec.json.Decoder(body)


async def read(req: falcon.asgi.Request, body: type[B]) -> B:
    """The request's body as ``body``."""
    return decode_for(req, await read_bytes(req), body)


async def read_bytes(req: falcon.asgi.Request) -> bytes:
    """The request's body as it came, for a route that takes several forms; ``decode_for`` is next."""
    encoding = req.get_header("Content-Encoding")
    if encoding not in (None, "", "identity"):
        raise RequestError(415, f"a body with Content-Encoding {encoding!r} is not read; send plain JSON")
    return await _read_whole(req)


def decode_for(req: falcon.asgi.Request, raw: bytes, body: type[B]) -> B:
    """``raw`` as ``body``, unknown fields refused or dropped as the server was told."""
    exchange = exchange_of(req)
    return decode(raw, body, exchange.warnings if exchange.drops_unknown_fields else None)


def decode(raw: bytes, body: type[B], warnings: list[str] | None = None) -> B:
    """``raw`` as ``body``; RequestError 400 with the byte offset or the field. Where there is a list for ``warnings``,
    unknown fields are dropped and named there."""
    decode_body = (
        _decoder(body).decode if warnings is None else partial(_decode_known, body=body, warnings=warnings)
    )
    try:
        decoded: B = decode_body(raw)
    except msgspec.ValidationError as error:
        raise _schema_error(str(error)) from error
    except msgspec.DecodeError as error:
        raise _malformed(_with_offset(str(error), raw)) from error
    except UnicodeDecodeError as error:
        raise _malformed(f"not UTF-8 (byte {_broken_byte(raw)})") from error
    except RecursionError as error:
        detail = f"arrays or objects are nested too deeply (byte {_too_deep_byte(raw)})"
        raise _malformed(detail) from error
    return decoded


def _decode_known(raw: bytes, body: type[B], warnings: list[str]) -> B:
    try:
        decoded: B = _decoder(body).decode(raw)
    except msgspec.ValidationError as error:
        if _UNKNOWN not in str(error):
            raise
        tree = msgspec.json.decode(raw)
        warnings += [f"unknown field dropped: {name}" for name in drop_unknown(tree, body)]
        return msgspec.convert(tree, body)
    return decoded


async def _read_whole(req: falcon.asgi.Request) -> bytes:
    limit = exchange_of(req).body_limit_bytes
    announced = req.content_length or 0
    chunks: list[bytes] = []
    size = 0
    if announced <= limit:
        async for chunk in req.stream:
            size += len(chunk)
            chunks.append(chunk)
            if size > limit:
                break
    if max(size, announced) > limit:
        chunks.clear()
        await _drop_rest(req)
        raise RequestError(413, f"the body is larger than {limit} bytes (--body_limit)", code="body_too_large")
    if size < announced:
        raise RequestError(
            408,
            f"Content-Length is {announced}, but only {size} bytes of the body came",
            param="Content-Length",
        )
    return b"".join(chunks)


async def _drop_rest(req: falcon.asgi.Request) -> None:
    try:
        async with asyncio.timeout(_DRAIN_PATIENCE_S):
            dropped = 0
            while dropped < _DRAIN_LIMIT_BYTES and not req.stream.eof:
                dropped += len(await req.stream.read(1 << 16))
    except TimeoutError:
        return


def _with_offset(detail: str, raw: bytes) -> str:
    """msgspec tells the byte of everything but an early end."""
    if detail == "Input data was truncated":
        return f"it was truncated (byte {len(raw)})"
    return detail.removeprefix("JSON is malformed: ")


def _malformed(detail: str) -> RequestError:
    return RequestError(400, f"the body is malformed JSON: {detail}", code="malformed_json")


def _schema_error(detail: str) -> RequestError:
    """msgspec says "what - at `$.path`", and names an unknown field in its text."""
    what, _, path = detail.partition(" - at `$")
    where = path.rstrip("`").removeprefix(".")
    for phrase, code, message in (
        (_UNKNOWN, "unknown_field", "unknown field"),
        ("Object missing required field `", "missing_field", "missing field"),
    ):
        if what.startswith(phrase):
            name = ".".join(part for part in (where, what.removeprefix(phrase).rstrip("`")) if part)
            return RequestError(400, f"{message}: {name}", param=name, code=code)
    subject = where or "the body"
    return RequestError(400, f"{subject}: {_lower_first(what)}", param=where or None, code="invalid_type")


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _too_deep_byte(raw: bytes) -> int:
    """Where nesting gets too deep: the last byte of the shortest beginning that is nested too deeply."""

    def is_too_deep(size: int) -> bool:
        try:
            msgspec.json.decode(raw[:size], type=msgspec.Raw)
        except RecursionError:
            return True
        except msgspec.DecodeError:
            return False
        return False

    return bisect_left(range(len(raw)), True, key=is_too_deep) - 1


def _broken_byte(raw: bytes) -> int:
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return error.start
    return len(raw)
