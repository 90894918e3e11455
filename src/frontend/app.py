"""The ASGI application that gunicorn runs in each frontend process; made once, started by the lifespan protocol."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import falcon.asgi

from shoal import config, logs
from shoal.checkpoint import describe, generation_defaults, locate_model
from shoal.config import Settings
from shoal.errors import RequestError
from shoal.frontend import (
    admin,
    anthropic,
    batches,
    chat,
    completions,
    embeddings,
    files,
    health,
    interactive,
    metrics,
    models,
    native,
    pages,
    perplexity,
    problems,
    responses,
    session_routes,
    tokens,
)
from shoal.frontend.chat_template import ChatTemplate
from shoal.frontend.exchange import CLIENT_GONE, Exchange
from shoal.frontend.gate import Gate
from shoal.frontend.grammar import Grammars
from shoal.frontend.link import Link
from shoal.frontend.routes import Route
from shoal.frontend.service import Service, pick_defaults
from shoal.frontend.switchboard import GREETING_PATIENCE_S
from shoal.grammar_tokens import grammar_tokens
from shoal.storage.opened import open_storage
from shoal.tokenizer import load_tokenizer

SETTINGS_VARIABLE: Final = "SHOAL_SETTINGS"
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
AsgiApp = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]


class Application:
    """Prepared in gunicorn's master, connected in each worker; then hands every request to Falcon."""

    def __init__(self) -> None:
        self._settings: Settings | None = None
        self._make_service: partial[Service] | None = None
        self._routes: AsgiApp | None = None
        self._link: Link | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def prepare(self) -> None:
        """Before the workers are forked: loads the model's tokenizer and template once for all of them. Raises
        StartError."""
        self._settings = config.load(Path(os.environ[SETTINGS_VARIABLE]))
        logs.configure("frontend", self._settings.log_level)
        self._make_service = load_service(self._settings)
        self._make_service.keywords["grammars"].load()

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """The ASGI entry."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        assert self._routes is not None
        self._active += 1
        self._idle.clear()
        try:
            await self._routes(scope, receive, send)
        finally:
            self._active -= 1
            if not self._active:
                self._idle.set()

    async def wait_idle(self) -> None:
        """Until no request is being answered, nor anything done in the background."""
        await self._idle.wait()
        if self._background:
            await asyncio.wait(self._background)

    async def stop(self) -> None:
        """Takes leave of the scheduler; may come twice."""
        if self._keeper is not None:
            self._keeper.cancel()
        link, self._link = self._link, None
        if link is not None:
            await link.stop()

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        await self._start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.stop()
        await send({"type": "lifespan.shutdown.complete"})

    async def _start(self) -> None:
        assert self._settings is not None
        assert self._make_service is not None
        link = Link(self._settings.run_dir)
        service = self._make_service(switchboard=link.switchboard)
        self._routes = make_app(service)
        self._background = service.background
        self._keeper = asyncio.create_task(service.storage.sessions.keep())
        self._link = link
        link.start()
        await link.switchboard.informed(GREETING_PATIENCE_S)


def load_service(settings: Settings) -> partial[Service]:
    """Loads what the routes need of the model; lacks only the ``switchboard``, which each process has for itself."""
    location = locate_model(settings.model)
    description = describe(location)
    tokenizer = load_tokenizer(settings.model)
    storage = open_storage(settings.data_dir, settings.session_store, settings.session_ttl_s)
    storage.sessions.check()
    eos_ids = tuple(dict.fromkeys([*tokenizer.eos_ids, *description.eos_ids]))
    return partial(
        Service,
        settings=settings,
        tokenizer=tokenizer,
        template=ChatTemplate.of(tokenizer, settings.chat_template),
        vocab_size=description.vocab_size,
        eos_ids=eos_ids,
        grammars=Grammars(lambda: grammar_tokens(tokenizer, description.vocab_size, eos_ids)),
        defaults=pick_defaults(generation_defaults(location)),
        created=int(time.time()),
        storage=storage,
    )


def all_routes(service: Service) -> list[Route]:
    """Everything that is served, in the order of the API page."""
    families = (
        chat,
        responses,
        anthropic,
        completions,
        interactive,
        session_routes,
        native,
        tokens,
        embeddings,
        perplexity,
        models,
        files,
        batches,
        health,
        metrics,
        admin,
    )
    described = [route for family in families for route in family.routes(service)]
    return [*described, *pages.routes(service, described)]


def make_app(service: Service) -> AsgiApp:
    """Falcon with every route, and an ``Exchange`` around each call."""
    routes = all_routes(service)
    gate = Gate(service.settings, routes)
    app = falcon.asgi.App(middleware=[gate])
    app.add_sink(gate.refuse_unknown)
    app.req_options.strip_url_path_trailing_slash = True
    problems.register(app)
    for route in routes:
        app.add_route(route.path, route.resource)
    return _with_exchange(app)


def _with_exchange(app: AsgiApp) -> AsgiApp:
    async def call(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        exchange = Exchange(scope)
        try:
            await app(scope, receive, send)
            if not exchange.status:
                await _stop_waiting(exchange, send)
        except asyncio.CancelledError:
            exchange.status = CLIENT_GONE
            raise
        finally:
            exchange.close()

    return call


async def _stop_waiting(exchange: Exchange, send: Send) -> None:
    """Falcon ends without an answer where not one byte of an announced body came; the client may be gone by now."""
    error = RequestError(408, "the body of the request did not come", param="Content-Length")
    exchange.status = error.status
    headers = [(b"content-type", falcon.MEDIA_JSON.encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": problems.encode_error(error)})


application: Final = Application()
