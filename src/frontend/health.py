"""GET /health (steps make progress), /ready (a request would be served now), /version, and / (what there is)."""

from typing import Any, Final

import falcon
import falcon.asgi
import msgspec

from shoal import __version__
from shoal.frontend.service import Service
from shoal.messages import Stats

_ENCODER: Final = msgspec.json.Encoder()
QUERY_PATIENCE_S: Final = 2.0
_READY_PHASE: Final = "ready"


class Health:
    """Alive: busy, draining and restarting a rank are; a scheduler that is gone or steps that hang are not."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """200 or 503 with the reason."""
        stats = await self._service.switchboard.query(QUERY_PATIENCE_S)
        trouble = self._trouble(stats)
        _answer(resp, {"status": "ok"} if trouble is None else {"status": "unhealthy", "reason": trouble})

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
        _answer(resp, {"status": "ready"} if trouble is None else {"status": "not ready", "reason": trouble})

    on_head = on_get


class Version:
    """Of Shoal."""

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """The version."""
        _answer(resp, {"version": __version__})

    on_head = on_get


class Root:
    """A signpost."""

    def __init__(self, service: Service, routes: list[str]) -> None:
        self._page = {"server": f"shoal {__version__}", "model": service.settings.model_name, "routes": routes}

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """The routes that there are."""
        _answer(resp, self._page)

    on_head = on_get


def _hindrance(stats: Stats | None) -> str | None:
    if stats is None:
        return "the scheduler does not answer"
    if stats.draining:
        return "the server is shutting down"
    if not stats.ready:
        return "the model is being loaded: " + ", ".join(
            f"rank {rank.rank} {rank.phase}" for rank in stats.ranks
        )
    return None


def _answer(resp: falcon.asgi.Response, content: dict[str, Any]) -> None:
    resp.status = 503 if "reason" in content else 200
    resp.content_type = falcon.MEDIA_JSON
    resp.data = _ENCODER.encode(content)
    if "reason" in content:
        resp.set_header("Retry-After", "1")
