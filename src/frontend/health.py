"""GET /health (steps make progress), /ready (a request would be served now) and /version."""

from typing import Annotated, Final, Literal

import falcon
import falcon.asgi
import msgspec
from msgspec import Struct

from shoal import __version__
from shoal.frontend.routes import Operation, Route
from shoal.frontend.schemas.base import doc
from shoal.frontend.service import Service
from shoal.messages import Stats

_ENCODER: Final = msgspec.json.Encoder()
QUERY_PATIENCE_S: Final = 2.0
_READY_PHASE: Final = "ready"


def routes(service: Service) -> list[Route]:
    """Two that are open to everybody, and one that takes any key."""
    alive = Operation(summary="Whether the server is alive", answer=Condition, other_answers={503: Condition})
    serves = Operation(summary="Whether it would serve now", answer=Condition, other_answers={503: Condition})
    version = Operation(summary="Shoal's version", answer=VersionAnswer)
    return [
        _route("/health", Health(service), alive, "open"),
        _route("/ready", Ready(service), serves, "open"),
        _route("/version", Version(), version, "any"),
    ]


def _route(path: str, resource: object, operation: Operation, scope: Literal["open", "any"]) -> Route:
    return Route(path=path, resource=resource, operations={"GET": operation}, scope=scope, stateless=True)


class Condition(Struct, omit_defaults=True):
    """How the server is."""

    status: Annotated[str, doc("ok, ready, unhealthy or not ready.", "ok")]
    reason: Annotated[str | None, doc("Why not, where it is not.", None)] = None


class VersionAnswer(Struct):
    """Of Shoal."""

    version: Annotated[str, doc("The version.", __version__)]


class Health:
    """Alive: busy, draining and restarting a rank are; a scheduler that is gone or steps that hang are not."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """200 or 503 with the reason."""
        stats = await self._service.switchboard.query(QUERY_PATIENCE_S)
        trouble = self._trouble(stats)
        _answer(resp, Condition("ok") if trouble is None else Condition("unhealthy", trouble))

    on_head = on_get

    def _trouble(self, stats: Stats | None) -> str | None:
        if stats is None:
            return "the scheduler does not answer"
        crew_is_up = all(rank.phase == _READY_PHASE for rank in stats.ranks)
        if crew_is_up and stats.stalled_ms > self._service.settings.step_timeout_s * 1000:
            return f"no step has ended for {stats.stalled_ms / 1000:.0f} s"
        return None


class Ready:
    """Whether a new request would be served now."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """200 or 503 with the reason."""
        stats = await self._service.switchboard.query(QUERY_PATIENCE_S)
        trouble = _hindrance(stats)
        _answer(resp, Condition("ready") if trouble is None else Condition("not ready", trouble))

    on_head = on_get


class Version:
    """Of Shoal."""

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """The version."""
        resp.content_type = falcon.MEDIA_JSON
        resp.data = _ENCODER.encode(VersionAnswer(__version__))

    on_head = on_get


def _hindrance(stats: Stats | None) -> str | None:
    if stats is None:
        return "the scheduler does not answer"
    if stats.draining:
        return "the server is shutting down"
    if stats.asleep:
        return f"the model sleeps at level {stats.asleep}; POST /wakeup"
    if not stats.ready:
        return "the model is being loaded: " + ", ".join(
            f"rank {rank.rank} {rank.phase}" for rank in stats.ranks
        )
    return None


def _answer(resp: falcon.asgi.Response, condition: Condition) -> None:
    resp.content_type = falcon.MEDIA_JSON
    resp.data = _ENCODER.encode(condition)
    if condition.reason is not None:
        resp.status = 503
        resp.set_header("Retry-After", "1")
