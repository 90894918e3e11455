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
from shoal.frontend import problems
from shoal.frontend.chat import ChatCompletions
from shoal.frontend.chat_template import ChatTemplate
from shoal.frontend.completions import Completions
from shoal.frontend.exchange import CLIENT_GONE, Exchange
from shoal.frontend.gate import Gate
from shoal.frontend.health import Health, Ready, Root, Version
from shoal.frontend.link import Link
from shoal.frontend.metrics import Metrics
from shoal.frontend.models import Model, Models
from shoal.frontend.service import Service, pick_defaults
from shoal.frontend.switchboard import GREETING_PATIENCE_S
from shoal.frontend.tokenize import load_tokenizer

SETTINGS_VARIABLE: Final = "SHOAL_SETTINGS"
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
AsgiApp = Callable[[dict[str, Any], Receive, Send], Awaitable[None]]


class Application:
    """Prepared in gunicorn's master, connected in each worker; then hands every request to Falcon."""

    def __init__(self) -> None:
        self._settings: Settings | None = None
        self._make_service: Callable[..., Service] | None = None
        self._routes: AsgiApp | None = None
        self._link: Link | None = None
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def prepare(self) -> None:
        """Before the workers are forked: loads the model's tokenizer and template once for all of them. Raises
        StartError."""
        self._settings = config.load(Path(os.environ[SETTINGS_VARIABLE]))
        logs.configure("frontend", self._settings.log_level)
        self._make_service = load_service(self._settings)

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
        """Until no request is being answered."""
        await self._idle.wait()

    async def stop(self) -> None:
        """Takes leave of the scheduler; may come twice."""
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
        self._routes = make_app(self._make_service(switchboard=link.switchboard))
        self._link = link
        link.start()
        await link.switchboard.informed(GREETING_PATIENCE_S)


def load_service(settings: Settings) -> Callable[..., Service]:
    """Loads what the routes need of the model; lacks only the ``switchboard``, which each process has for itself."""
    location = locate_model(settings.model)
    description = describe(location)
    tokenizer = load_tokenizer(settings.model)
    return partial(
        Service,
        settings=settings,
        tokenizer=tokenizer,
        template=ChatTemplate.of(tokenizer, settings.chat_template),
        vocab_size=description.vocab_size,
        eos_ids=tuple(dict.fromkeys([*tokenizer.eos_ids, *description.eos_ids])),
        defaults=pick_defaults(generation_defaults(location)),
        created=int(time.time()),
    )


def make_app(service: Service) -> AsgiApp:
    """Falcon with every route, and an ``Exchange`` around each call."""
    app = falcon.asgi.App(middleware=[Gate(service.settings)])
    app.req_options.strip_url_path_trailing_slash = True
    problems.register(app)
    routes: dict[str, object] = {
        "/v1/models": Models(service),
        "/v1/models/{model_id:path}": Model(service),
        "/v1/chat/completions": ChatCompletions(service),
        "/v1/completions": Completions(service),
        "/health": Health(service),
        "/ready": Ready(service),
        "/metrics": Metrics(service),
        "/version": Version(),
    }
    for path, resource in routes.items():
        app.add_route(path, resource)
    app.add_route("/", Root(service, list(routes)))
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
