"""Bytes of a streamed answer to JSON objects: server-sent events, or one object a line."""

import json
from collections.abc import Iterable, Iterator
from typing import Any, Final

_END: Final = "[DONE]"


class End:
    """What a stream ends with that says so: ``data: [DONE]``."""


def objects(pieces: Iterable[bytes]) -> Iterator[dict[str, Any] | End]:
    """Every object, as soon as its line is there. Raises ValueError for what is neither.

    Each server sends an object whole on one line, with ``data:`` before it or without; comments and the other
    fields of server-sent events carry nothing.
    """
    for line in _lines(pieces):
        text = line.decode("utf-8").strip()
        if text.startswith("data:"):
            text = text[5:].strip()
        elif not text.startswith("{"):
            _check_is_no_content(text)
            continue
        if text == _END:
            yield End()
        elif text:
            yield _object(text)


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"an object was expected, not {text[:100]!r}")
    return value


def _check_is_no_content(text: str) -> None:
    if text and not text.startswith((":", "event:", "id:", "retry:")):
        raise ValueError(f"not JSON: {text[:100]!r}")


def _lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Split at LF alone: other characters that end a line for Unicode are text inside a JSON string."""
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
    yield rest
