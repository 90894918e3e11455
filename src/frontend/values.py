"""Single values of a request: within their bounds, or a 400 that names the field. Called by the routes' checks."""

import math
from collections.abc import Sequence

from shoal.errors import RequestError
from shoal.frontend.schemas.base import Whole
from shoal.frontend.service import Service


def invalid(name: str, what: str) -> RequestError:
    """A value that cannot be honoured."""
    return RequestError(400, f"{name}: {what}", param=name, code="invalid_value")


def not_available(name: str, what: str = "not available; leave it out") -> RequestError:
    """A field of the contract that this server, or this model, cannot honour."""
    return RequestError(400, f"{name}: {what}", param=name, code="not_available")


def number(
    name: str, value: float | None, default: float, low: float, high: float, *, above: bool = False
) -> float:
    """``value`` within [low, high], or (low, high] with ``above``."""
    if value is None:
        return default
    if not (low < value if above else low <= value) or value > high:
        bounds = f"above {low:g} and at most {high:g}" if above else f"between {low:g} and {high:g}"
        raise invalid(name, f"must be {bounds}, not {value:g}")
    return float(value)


def whole(name: str, value: Whole | None, default: int, low: int, high: int) -> int:
    """``value`` as an integer within [low, high]; 64.0 is one."""
    if value is None:
        return default
    if value != math.floor(value):
        raise invalid(name, f"must be a whole number, not {value:g}")
    if not low <= value <= high:
        raise invalid(name, f"must be between {low} and {high}, not {str(value)[:40]}")
    return int(value)


def token_ids(service: Service, name: str, ids: Sequence[Whole] | None, most: int) -> tuple[int, ...]:
    """At most ``most`` ids of the model's, each once, in their order."""
    if not ids:
        return ()
    if len(ids) > most:
        raise invalid(name, f"has {len(ids)} ids; at most {most} are taken")
    return tuple(dict.fromkeys(whole(name, token_id, 0, 0, service.vocab_size - 1) for token_id in ids))


def prompt_ids(service: Service, name: str, ids: Sequence[Whole]) -> list[int]:
    """A prompt that was given as ids: every one must be the model's."""
    if not ids:
        raise invalid(name, "must not be empty")
    for wrong in (min(ids), max(ids)):
        if not 0 <= wrong < service.vocab_size:
            raise invalid(
                name, f"the token id {wrong} is not in the vocabulary (0 to {service.vocab_size - 1})"
            )
    return [token_id if isinstance(token_id, int) else whole(name, token_id, 0, 0, 1 << 31) for token_id in ids]


def agreeing(name: str, value: Whole | None, other_name: str, other: Whole | None) -> Whole | None:
    """The value of a field that has two names; RequestError where both are given and differ."""
    if value is not None and other is not None and value != other:
        raise invalid(name, f"{value:g} contradicts {other_name}: {other:g}; give one of them")
    return other if value is None else value
