"""The pages for people: the interactive API page at / and /docs, the reference at /redoc, the chat at /ui.

Nothing comes from outside: Swagger UI and Redoc lie in the package ``offapi``, the rest in ``static``. Every page has a
content security policy that lets it run its own scripts and call this server, and nothing else.
"""

import gzip
import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import falcon
import falcon.asgi
import msgspec
from msgspec import Struct

from shoal import __version__
from shoal.errors import StartError
from shoal.frontend import openapi
from shoal.frontend.routes import Route
from shoal.frontend.service import Service

_STATIC: Final = Path(__file__).with_name("static")
_BUNDLES: Final = "offapi"
_MEDIA: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".json": falcon.MEDIA_JSON,
}
_LEAST_WORTH_ZIPPING: Final = 1024
_POLICY: Final = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' data:",
    "font-src": "'self' data:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
_FOREIGN_PICTURES: Final = (b"https://cdn.redoc.ly/redoc/", b"data:,")
"""Redoc shows its maker's logo from there, and nothing where it does not load; ``redoc.css`` has the name instead."""
_DOCS_POLICY: Final = _POLICY | {"style-src": "'self' 'unsafe-inline'", "worker-src": "blob:"}
"""Redoc writes its style sheet at run time and searches in a worker of its own making."""


def routes(service: Service, described: Sequence[Route]) -> list[Route]:
    """The pages; those that describe the API show ``described`` and are left out with --disable_fastapi_docs."""
    pages = list(_chat_pages())
    return [*_docs_pages(service, described), *pages] if service.settings.docs else pages


def _docs_pages(service: Service, described: Sequence[Route]) -> Iterator[Route]:
    written = msgspec.json.encode(openapi.document(described, service.settings))
    yield _page("/openapi.json", Asset(written, ".json"), stateless=True)
    swagger, redoc = _own("docs.html", _DOCS_POLICY), _own("redoc.html", _DOCS_POLICY)
    yield _page("/", Entrance(swagger))
    yield _page("/docs", swagger)
    yield _page("/redoc", redoc)
    for name in ("docs.js", "docs.css", "redoc.css"):
        yield _page(f"/docs/{name}", _own(name))
    bundles = _bundles()
    for name in ("swagger_bundle.js", "swagger_preset.js", "swagger_style.css", "redoc.js"):
        content = (bundles / name).read_bytes().replace(*_FOREIGN_PICTURES)
        yield _page(f"/docs/{name}", Asset(content, Path(name).suffix))


def _chat_pages() -> Iterator[Route]:
    yield _page("/ui", _own("ui.html", _POLICY))
    yield _page("/favicon.ico", _own("icon.svg"))
    for path in sorted((_STATIC / "ui").iterdir()):
        yield _page(f"/ui/{path.name}", Asset(path.read_bytes(), path.suffix))


def _page(path: str, resource: "Asset | Entrance", *, stateless: bool = False) -> Route:
    return Route(path=path, resource=resource, operations={}, scope="any", stateless=stateless)


def _own(name: str, policy: dict[str, str] | None = None) -> "Asset":
    path = _STATIC / name
    return Asset(path.read_bytes(), path.suffix, policy)


def _bundles() -> Path:
    """Where the package's files lie; importing it would read all of them into page templates."""
    spec = find_spec(_BUNDLES)
    if spec is None or not spec.submodule_search_locations:
        raise StartError(
            f"the package {_BUNDLES} is not installed, which holds the API pages: pip install {_BUNDLES}"
        )
    return Path(spec.submodule_search_locations[0])


class Asset:
    """A file that does not change while the server runs; browsers ask by its tag whether they have it."""

    def __init__(self, content: bytes, suffix: str, policy: dict[str, str] | None = None) -> None:
        self._content = content
        self._media = _MEDIA[suffix]
        self._tag = hashlib.sha256(content).hexdigest()[:20]
        self._policy = "; ".join(f"{name} {value}" for name, value in (policy or {}).items())

    @cached_property
    def _zipped(self) -> bytes:
        return gzip.compress(self._content, mtime=0)

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """The file, or 304."""
        resp.etag = self._tag
        resp.cache_control = ["no-cache"]
        resp.set_header("Vary", "Accept-Encoding")
        resp.set_header("X-Content-Type-Options", "nosniff")
        resp.set_header("Referrer-Policy", "no-referrer")
        if self._policy:
            resp.set_header("Content-Security-Policy", self._policy)
        if any(tag in ("*", self._tag) for tag in req.if_none_match or ()):
            resp.status = 304
            return
        resp.content_type = self._media
        if len(self._content) >= _LEAST_WORTH_ZIPPING and "gzip" in (req.get_header("Accept-Encoding") or ""):
            resp.set_header("Content-Encoding", "gzip")
            resp.data = self._zipped
        else:
            resp.data = self._content

    on_head = on_get


class Signpost(Struct):
    """What / tells a program that asks for JSON."""

    name: str = "shoal"
    version: str = __version__
    openapi: str = "/openapi.json"
    docs: str = "/docs"
    chat: str = "/ui"
    models: str = "/v1/models"


class Entrance:
    """/: the API page; a signpost for who accepts JSON and no page."""

    def __init__(self, page: Asset) -> None:
        self._page = page
        self._signpost = Asset(msgspec.json.encode(Signpost()), ".json")

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """One of them."""
        wanted = req.client_prefers(["text/html", falcon.MEDIA_JSON])
        await (self._signpost if wanted == falcon.MEDIA_JSON else self._page).on_get(req, resp)
        resp.append_header("Vary", "Accept")

    on_head = on_get
