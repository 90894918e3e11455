"""The administration's routes: ending requests, sleep, load, what is open, shutdown.

Everything is decided and counted in the scheduler, so it does not matter which frontend is asked.
"""

import asyncio
import os
import signal
from typing import Annotated, Final

import falcon
import falcon.asgi
import msgspec
from msgspec import Struct

from shoal import process
from shoal.errors import RequestError
from shoal.frontend import body
from shoal.frontend.exchange import exchange_of
from shoal.frontend.routes import Operation, Parameter, Route
from shoal.frontend.schemas.admin import (
    AbortAnswer,
    AbortRequest,
    DrainAnswer,
    Load,
    OpenRequestCard,
    OpenRequestList,
    SleepState,
)
from shoal.frontend.schemas.base import doc
from shoal.frontend.service import Service
from shoal.frontend.values import invalid, not_available, whole
from shoal.messages import OpenRequest, Stats

_ENCODER: Final = msgspec.json.Encoder()
_PATIENCE_S: Final = 5.0
_LARGEST_SESSION: Final = (1 << 63) - 1
_MOST_IDS: Final = 1024
_ID_PREFIXES: Final = ("chatcmpl-", "cmpl-", "msg_", "resp_")
"""What the routes put before a request's id to make the id of its answer."""
_MEMORY_TAGS: Final = frozenset({"weights", "kv_cache"})
_LEVEL: Final = Parameter(
    name="level",
    place="query",
    type=Annotated[int, doc("1: gives up the cache's memory; 2: the weights' too.", 1)],
)
_MODE: Final = Parameter(
    name="mode",
    place="query",
    type=Annotated[
        str, doc("`wait` for what runs, for --drain_timeout at most, or `abort` it at once.", "wait")
    ],
)
_TAGS: Final = Parameter(
    name="tags",
    place="query",
    type=Annotated[
        str,
        doc(
            "What to wake; only both of `weights` and `kv_cache`, which is the default too.", "weights,kv_cache"
        ),
    ],
)


def routes(service: Service) -> list[Route]:
    """Each with the scope that it needs; a key without the admin scope may end its own requests."""
    return [
        Route(
            path="/abort_request",
            resource=AbortRequests(service),
            operations={
                "POST": Operation(summary="End running requests", body=AbortRequest, answer=AbortAnswer),
            },
            scope="any",
        ),
        Route(
            path="/sleep",
            resource=Sleep(service),
            operations={
                "POST": Operation(
                    summary="Have the model give up its memory",
                    description="New requests get 503 from now on; answers once the memory is given up.",
                    parameters=(_LEVEL, _MODE),
                    answer=SleepState,
                    errors=(409,),
                )
            },
            scope="admin",
        ),
        Route(
            path="/wakeup",
            resource=WakeUp(service),
            operations={
                "POST": Operation(
                    summary="Wake the model",
                    description="Answers once requests are served again.",
                    parameters=(_TAGS,),
                    answer=SleepState,
                    errors=(409,),
                )
            },
            scope="admin",
        ),
        Route(
            path="/is_sleeping",
            resource=IsSleeping(service),
            operations={"GET": Operation(summary="Whether the model sleeps", answer=SleepState)},
            scope="admin",
        ),
        Route(
            path="/load",
            resource=LoadReport(service),
            operations={"GET": Operation(summary="How busy the server is", answer=Load)},
            scope="metrics",
        ),
        Route(
            path="/admin/requests",
            resource=OpenRequests(service),
            operations={"GET": Operation(summary="List what is open", answer=OpenRequestList)},
            scope="admin",
        ),
        Route(
            path="/admin/drain",
            resource=Drain(),
            operations={
                "POST": Operation(
                    summary="Shut down in good order",
                    description="What runs is finished, for --drain_timeout at most; then the server ends.",
                    answer=DrainAnswer,
                )
            },
            scope="admin",
        ),
    ]


class AbortRequests:
    """Ends requests of any frontend; their clients get what there is, with ``finish_reason: "abort"``."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Says how many were ended."""
        exchange = exchange_of(req)
        if not {"inference", "admin"} & {*exchange.scopes}:
            message = "this key has neither the inference scope nor the admin scope, one of which /abort_request needs"
            raise RequestError(403, message, code="insufficient_scope")
        request = await body.read(req, AbortRequest)
        _check_neutral(request)
        tenant = None if "admin" in exchange.scopes else exchange.tenant
        if request.abort_all:
            aborted = await self._abort("", tenant)
        else:
            aborted = 0
            for named in await self._named(request, exchange.tenant):
                aborted += await self._abort_named(named, tenant)
        _answer(resp, AbortAnswer(aborted))

    async def _named(self, request: AbortRequest, tenant: str) -> list[str]:
        """The ids of HTTP requests; a session's running turn has one too."""
        rids = [request.rid] if isinstance(request.rid, str) else request.rid or []
        ids = [*rids, *(request.request_ids or [])]
        session = whole("session_id", request.session_id, -1, -1, _LARGEST_SESSION)
        if not ids and request.rid is None and request.request_ids is None and session == -1:
            raise invalid("rid", "name what to end: rid, request_ids, session_id, or abort_all: true")
        if len(ids) > _MOST_IDS or "" in ids:
            raise invalid("rid", f"must be from 1 to {_MOST_IDS} ids that are not empty")
        if session != -1:
            holder = await self._service.storage.sessions.find_holder(tenant, session)
            ids += [holder.label] if holder else []
        return ids

    async def _abort_named(self, named: str, tenant: str | None) -> int:
        """An id is looked for as it stands, then without what an answer's id begins with."""
        prefix = next((prefix for prefix in _ID_PREFIXES if named.startswith(prefix)), "")
        shorter = named.removeprefix(prefix)
        return await self._abort(named, tenant) or (
            await self._abort(shorter, tenant) if prefix and shorter else 0
        )

    async def _abort(self, label: str, tenant: str | None) -> int:
        aborted = await self._service.switchboard.abort(label, tenant, _PATIENCE_S)
        if aborted is None:
            raise _no_answer()
        return aborted


class Sleep:
    """Has the model give up its memory."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Answers once it sleeps."""
        await _check_bare(req)
        level = int(_one_of(req, "level", ("1", "2")))
        mode = _one_of(req, "mode", ("wait", "abort"))
        switchboard = self._service.switchboard
        sleeping = asyncio.ensure_future(switchboard.rest(level))
        if mode == "abort":
            await asyncio.sleep(0)  # The wish leaves first: nothing new comes between it and the abort.
            await switchboard.abort("", None, _PATIENCE_S)
        stats = await sleeping
        if stats is None:
            raise _no_answer()
        if stats.asleep < level:
            raise RequestError(409, "the model was woken before it slept", code="woken")
        _answer(resp, SleepState(True, stats.asleep))


class WakeUp:
    """Has the model load what it gave up."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Answers once requests are served again."""
        await _check_bare(req)
        tags = {tag for value in req.get_param_as_list("tags") or [] for tag in value.split(",") if tag}
        if tags and tags != _MEMORY_TAGS:
            raise not_available("tags", "weights and kv_cache wake together; name both, or leave tags out")
        stats = await self._service.switchboard.rest(0)
        if stats is None:
            raise _no_answer()
        if stats.asleep:
            raise RequestError(409, "the model was put to sleep again before it woke", code="asleep")
        _answer(resp, SleepState(False, 0))


class IsSleeping:
    """Whether the model's memory is given up."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """As the scheduler knows it."""
        stats = await _statistics(self._service)
        _answer(resp, SleepState(stats.asleep > 0, stats.asleep))

    on_head = on_get


class LoadReport:
    """How busy the server is, all frontends together."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """From the scheduler's statistics."""
        stats = await _statistics(self._service)
        gauges = stats.gauges
        load = Load(
            server_load=int(gauges.get("num_http_requests", 0.0)),
            running=int(gauges.get("num_requests_running", 0.0)),
            waiting=int(gauges.get("num_requests_waiting", 0.0)),
            waiting_tokens=int(gauges.get("num_tokens_waiting", 0.0)),
            cache_usage=round(gauges.get("kv_cache_usage_perc", 0.0), 4),
            tokens_per_second=round(gauges.get("tokens_per_second", 0.0), 2),
            is_ready=stats.ready,
        )
        _answer(resp, load)

    on_head = on_get


class OpenRequests:
    """Every HTTP request that waits for the model or is answered by it."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """The oldest first."""
        surveyed = await self._service.switchboard.survey(None, _PATIENCE_S)
        if surveyed is None:
            raise _no_answer()
        _answer(resp, OpenRequestList([_card(request) for request in surveyed.requests]))

    on_head = on_get


class Drain:
    """Ends the server as a signal would."""

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Answers at once; the supervisor sees to the rest."""
        supervisor = process.supervisor_pid()
        if supervisor is None:
            raise RequestError(503, "no supervisor started this process; send it SIGTERM", code="not_available")
        os.kill(supervisor, signal.SIGTERM)
        _answer(resp, DrainAnswer())


def _card(request: OpenRequest) -> OpenRequestCard:
    return OpenRequestCard(
        id=request.label,
        tenant=request.tenant,
        priority=request.priority,
        running=request.running,
        waiting=request.waiting,
        prompt_tokens=request.prompt_tokens,
        generated_tokens=request.generated_tokens,
        age_s=request.age_ms / 1000,
    )


def _check_neutral(request: AbortRequest) -> None:
    for name in ("finished_reason", "abort_message"):
        if getattr(request, name) not in (None, ""):
            raise not_available(name)


async def _check_bare(req: falcon.asgi.Request) -> None:
    """Refuses a body that says something: it would be ignored."""
    if (await body.read_bytes(req)).strip() not in (b"", b"{}"):
        message = f"{req.path} reads no body; what you wish belongs into the query, as in /sleep?level=2"
        raise RequestError(400, message, code="invalid_value")


def _one_of(req: falcon.asgi.Request, name: str, choices: tuple[str, ...]) -> str:
    """A parameter of the query; the first choice where it is not given."""
    value = req.get_param(name) or choices[0]
    if value not in choices:
        raise invalid(name, f"must be {' or '.join(choices)}, not {value[:40]!r}")
    return value


def _answer(resp: falcon.asgi.Response, answer: Struct) -> None:
    resp.content_type = falcon.MEDIA_JSON
    resp.data = _ENCODER.encode(answer)


async def _statistics(service: Service) -> Stats:
    stats = await service.switchboard.query(_PATIENCE_S)
    if stats is None:
        raise _no_answer()
    return stats


def _no_answer() -> RequestError:
    message = "the scheduler does not answer; it is being started again"
    return RequestError(503, message, code="scheduler_restarted", retry_after_s=1)
