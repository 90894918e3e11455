"""HTTP bodies to checked structs: size, encoding, JSON, schema. Routes call ``read``; every mistake is a 400 or 413."""

import asyncio
from typing import Any, Final, TypeVar

import falcon.asgi
import msgspec

from shoal.errors import RequestError
from shoal.frontend.api_types import ChatCompletionRequest, CompletionRequest, RequestBody

BODY_LIMIT_BYTES: Final = 8 << 20
_DRAIN_LIMIT_BYTES: Final = 64 << 20
"""A body over the limit is read and dropped up to here, so that the client gets to read the answer."""
_DRAIN_PATIENCE_S: Final = 10.0

B = TypeVar("B", bound=RequestBody)
_DECODERS: Final[dict[type[RequestBody], "msgspec.json.Decoder[Any]"]] = {
    body: msgspec.json.Decoder(body) for body in (ChatCompletionRequest, CompletionRequest)
}


async def read(req: falcon.asgi.Request, body: type[B]) -> B:
    """The request's body as ``body``."""
    encoding = req.get_header("Content-Encoding")
    if encoding not in (None, "", "identity"):
        raise RequestError(415, f"a body with Content-Encoding {encoding!r} is not read; send plain JSON")
    return decode(await _read_bytes(req), body)


def decode(raw: bytes, body: type[B]) -> B:
    """``raw`` as ``body``; RequestError 400 with the byte offset or the field."""
    try:
        decoded: B = _DECODERS[body].decode(raw)
    except msgspec.ValidationError as error:
        raise _schema_error(str(error)) from error
    except msgspec.DecodeError as error:
        raise _malformed(str(error).removeprefix("JSON is malformed: ")) from error
    except UnicodeDecodeError as error:
        raise _malformed(f"not UTF-8 (byte {_broken_byte(raw)})") from error
    except RecursionError as error:
        raise _malformed("arrays or objects are nested too deeply") from error
    return decoded


async def _read_bytes(req: falcon.asgi.Request) -> bytes:
    announced = req.content_length or 0
    chunks: list[bytes] = []
    size = 0
    if announced <= BODY_LIMIT_BYTES:
        async for chunk in req.stream:
            size += len(chunk)
            chunks.append(chunk)
            if size > BODY_LIMIT_BYTES:
                break
    if max(size, announced) > BODY_LIMIT_BYTES:
        chunks.clear()
        await _drop_rest(req)
        raise RequestError(413, f"the body is larger than {BODY_LIMIT_BYTES} bytes", code="body_too_large")
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


def _malformed(detail: str) -> RequestError:
    return RequestError(400, f"the body is malformed JSON: {detail}", code="malformed_json")


def _schema_error(detail: str) -> RequestError:
    """msgspec says "what - at `$.path`", and names an unknown field in its text."""
    what, _, path = detail.partition(" - at `$")
    where = path.rstrip("`").removeprefix(".")
    for phrase, code, message in (
        ("Object contains unknown field `", "unknown_field", "unknown field"),
        ("Object missing required field `", "missing_field", "missing field"),
    ):
        if what.startswith(phrase):
            name = ".".join(part for part in (where, what.removeprefix(phrase).rstrip("`")) if part)
            return RequestError(400, f"{message}: {name}", param=name, code=code)
    subject = where or "the body"
    return RequestError(400, f"{subject}: {_lower_first(what)}", param=where or None, code="invalid_type")


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _broken_byte(raw: bytes) -> int:
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return error.start
    return len(raw)
