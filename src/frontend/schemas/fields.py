"""What every field and every request body is made of. The other schemas import it through ``base.py``."""

from functools import cache
from typing import Any, Final, get_args, get_type_hints

import msgspec
from msgspec import Struct

Whole = int | float
_NEUTRAL: Final = "neutral"


def doc(description: str, *examples: Any, neutral: tuple[Any, ...] | None = None) -> msgspec.Meta:
    """Documents a field. With ``neutral`` it asks for something that is not available: null and the values named
    are accepted, since they ask for nothing."""
    extra = None if neutral is None else {_NEUTRAL: neutral}
    return msgspec.Meta(description=description, examples=list(examples) or None, extra=extra)


class RequestBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """Base of what clients send."""


@cache
def neutral_values(body: type[RequestBody]) -> dict[str, tuple[Any, ...]]:
    """The fields of ``body`` that are not available, each with the values that ask for nothing."""
    hints = get_type_hints(body, include_extras=True)
    return {
        name: meta.extra[_NEUTRAL]
        for name, hint in hints.items()
        for meta in get_args(hint)
        if isinstance(meta, msgspec.Meta) and meta.extra is not None and _NEUTRAL in meta.extra
    }
