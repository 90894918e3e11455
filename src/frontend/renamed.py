"""Refusals in the words of the API that was called: /v1/responses and /v1/messages become a chat request, whose fields
have other names."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from shoal.errors import RequestError

Names = Sequence[tuple[re.Pattern[str], str]]
"""How a chat request's fields, by the beginning of their path, are called elsewhere; the first that fits counts."""


def names(**patterns: str) -> Names:
    """Of plain fields."""
    return [(re.compile(rf"{theirs}(?![\w])"), ours) for theirs, ours in patterns.items()]


@contextmanager
def in_names(known: Names) -> Iterator[None]:
    """Raises what is raised within, with the other API's names."""
    try:
        yield
    except RequestError as error:
        raise _renamed(error, known) from error


def _renamed(error: RequestError, known: Names) -> RequestError:
    theirs = error.param or ""
    ours = next(
        (pattern.sub(name, theirs, count=1) for pattern, name in known if pattern.match(theirs)), theirs
    )
    message = ours + error.message.removeprefix(theirs) if error.message.startswith(theirs) else error.message
    return RequestError(
        error.status, message, param=ours or None, code=error.code, retry_after_s=error.retry_after_s
    )
