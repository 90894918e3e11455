"""The query of OpenAI's lists: limit, order, after."""

from typing import Annotated, Final

import falcon.asgi

from shoal.frontend.prompts import invalid
from shoal.frontend.routes import Parameter
from shoal.frontend.schemas.base import doc

LIMIT: Final = Parameter(name="limit", place="query", type=Annotated[int, doc("Most entries of the page.", 20)])
ORDER: Final = Parameter(
    name="order", place="query", type=Annotated[str, doc("By age: `asc` or `desc`.", "desc")]
)
AFTER: Final = Parameter(
    name="after",
    place="query",
    type=Annotated[str, doc("The last id of the page before.", "file-0123456789abcdef")],
)


def read_limit(req: falcon.asgi.Request, default: int, most: int) -> int:
    """``limit``; RequestError 400 where it is not from 1 to ``most``."""
    text = req.get_param("limit")
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and 1 <= int(text) <= most):
        raise invalid("limit", f"must be a whole number from 1 to {most}, not {text[:20]!r}")
    return int(text)


def read_descending(req: falcon.asgi.Request) -> bool:
    """``order``; RequestError 400 for anything but asc and desc."""
    order = req.get_param("order") or "desc"
    if order not in ("asc", "desc"):
        raise invalid("order", f"must be asc or desc, not {order[:20]!r}")
    return order == "desc"
