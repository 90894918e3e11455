"""/v1/responses: a ``Turn`` in the form of OpenAI's Responses API, kept so that it can be read and continued."""

import asyncio
import logging
import os
import secrets
import sqlite3
from typing import Annotated, Any, Final, Literal

import falcon
import falcon.asgi
import msgspec
from msgspec import Struct

from shoal.errors import RequestError
from shoal.frontend import body, paging, stream
from shoal.frontend.batches import check_metadata
from shoal.frontend.exchange import Exchange, exchange_of
from shoal.frontend.prompts import invalid
from shoal.frontend.renamed import in_names
from shoal.frontend.responses_events import EventWriter
from shoal.frontend.responses_run import ResponseRun, new_response
from shoal.frontend.responses_translation import NAMES_HERE, chat_request, items_of
from shoal.frontend.routes import Operation, Parameter, Route
from shoal.frontend.schemas.base import doc
from shoal.frontend.schemas.chat import ChatCompletionRequest
from shoal.frontend.schemas.responses import (
    InputItemList,
    InputTokens,
    InputTokensRequest,
    ResponseDeleted,
    ResponseError,
    ResponseEvent,
    ResponseItem,
    ResponseObject,
    ResponsePart,
    ResponsesRequest,
)
from shoal.frontend.service import Service
from shoal.frontend.turn import count_prompt, open_turn
from shoal.storage import responses as store
from shoal.storage.leases import is_alive, this_process
from shoal.storage.responses import StoredResponse

_LOGGER: Final = logging.getLogger("shoal.frontend")
_ENCODER: Final = msgspec.json.Encoder()
_OPEN: Final = ("queued", "in_progress")
_RESPONSE_ID: Final = Parameter(
    name="response_id", place="path", type=Annotated[str, doc("The response's id.", "resp_0123456789abcdef")]
)


def routes(service: Service) -> list[Route]:
    """Create, read, delete, cancel, list the input, count."""
    return [
        Route(
            path="/v1/responses",
            resource=Responses(service),
            operations={
                "POST": Operation(
                    summary="Answer items (OpenAI's Responses API)",
                    body=ResponsesRequest,
                    answer=ResponseObject,
                    event=ResponseEvent,
                    errors=(404, 408, 413),
                )
            },
        ),
        Route(
            path="/v1/responses/input_tokens",
            resource=InputTokenCount(service),
            operations={
                "POST": Operation(
                    summary="Count a response's prompt tokens",
                    body=InputTokensRequest,
                    answer=InputTokens,
                    errors=(404, 413),
                )
            },
        ),
        Route(
            path="/v1/responses/{response_id}",
            resource=OneResponse(service),
            operations={
                "GET": Operation(
                    summary="Read a response", parameters=(_RESPONSE_ID,), answer=ResponseObject, errors=(404,)
                ),
                "DELETE": Operation(
                    summary="Delete a response",
                    parameters=(_RESPONSE_ID,),
                    answer=ResponseDeleted,
                    errors=(404,),
                ),
            },
        ),
        Route(
            path="/v1/responses/{response_id}/cancel",
            resource=ResponseCancel(service),
            operations={
                "POST": Operation(
                    summary="Cancel a background response",
                    parameters=(_RESPONSE_ID,),
                    answer=ResponseObject,
                    errors=(404,),
                )
            },
        ),
        Route(
            path="/v1/responses/{response_id}/input_items",
            resource=InputItems(service),
            operations={
                "GET": Operation(
                    summary="List the items that a response was asked with",
                    parameters=(_RESPONSE_ID, paging.LIMIT, paging.ORDER, paging.AFTER),
                    answer=InputItemList,
                    errors=(404,),
                )
            },
        ),
    ]


class Responses:
    """The collection."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Answers at once, as a stream, or in the background."""
        exchange = exchange_of(req)
        request = await body.read(req, ResponsesRequest)
        check_metadata(request.metadata)
        if request.background and (request.store is False or request.stream):
            raise invalid("background", "needs store, and does not go with stream")
        history = await _history(self._service, exchange.tenant, request)
        asked = chat_request(request, history)
        label = secrets.token_hex(
            12
        )  # not the request's id, which clients choose: no response replaces another
        response = new_response(self._service, request, f"resp_{label}")
        run = ResponseRun(self._service, exchange.tenant, request, _named_items(request, label), response)
        if request.background:
            await self._begin(req, run, asked)
            _answer(resp, response)
            return
        with in_names(NAMES_HERE):
            run.attach(await open_turn(self._service, exchange, req, asked))
        if request.stream:
            writer = EventWriter(run.outline, response)
            await stream.begin(req, resp, exchange, run, writer, writer.framing())
            return
        await _finish(run)
        _answer(resp, response)

    async def _begin(self, req: falcon.asgi.Request, run: ResponseRun, asked: ChatCompletionRequest) -> None:
        """What is wrong with the request is told now. The work has an exchange of its own: the client's ends."""
        exchange = Exchange({"type": "http", "method": "BACKGROUND", "path": "/v1/responses"})
        exchange.request_id, exchange.tenant = run.response.id, exchange_of(req).tenant
        try:
            with in_names(NAMES_HERE):
                run.attach(await open_turn(self._service, exchange, req, asked))
            await run.first_news(stream.REFUSAL_PATIENCE_S)
            await run.keep(this_process(os.getpid()))
        except BaseException as error:
            exchange.status, exchange.detail = getattr(error, "status", 500), str(error)
            exchange.close()
            raise
        task = asyncio.create_task(_work_in_background(exchange, run))
        self._service.background.add(task)
        task.add_done_callback(self._service.background.discard)


class OneResponse:
    """One response."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response, response_id: str) -> None:
        """As it stands."""
        if req.get_param_as_bool("stream", default=False):
            raise RequestError(400, "stream: a kept response is not streamed; leave it out", param="stream")
        stored = await _find(self._service, exchange_of(req).tenant, response_id)
        resp.content_type = falcon.MEDIA_JSON
        resp.data = stored.record

    async def on_delete(self, req: falcon.asgi.Request, resp: falcon.asgi.Response, response_id: str) -> None:
        """Forgets it, and gives up the work on it."""
        tenant = exchange_of(req).tenant
        stored = await _find(self._service, tenant, response_id)
        await self._service.storage.responses.run(
            lambda connection: store.delete(connection, tenant, response_id)
        )
        if stored.status in _OPEN:
            await self._service.switchboard.abort(response_id, tenant)
        _answer(resp, ResponseDeleted(id=response_id))


class ResponseCancel:
    """The end of a background response."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response, response_id: str) -> None:
        """Whichever frontend works on it, the scheduler finds it by its id."""
        tenant = exchange_of(req).tenant
        stored = await _find(self._service, tenant, response_id)
        response = msgspec.json.decode(stored.record, type=ResponseObject)
        if not response.background:
            raise RequestError(400, "only a background response can be cancelled", code="not_cancellable")
        if response.status in _OPEN:
            response.status = "cancelled"
            await _rewrite(self._service, stored, response)
            await self._service.switchboard.abort(response_id, tenant)
        _answer(resp, response)


class InputItems:
    """What a response was asked with."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response, response_id: str) -> None:
        """A page of its own items, without those of earlier responses."""
        stored = await _find(self._service, exchange_of(req).tenant, response_id)
        limit, after = paging.read_limit(req, 20, 100), req.get_param("after")
        items = msgspec.json.decode(stored.input, type=list[dict[str, object]])
        if paging.read_descending(req):
            items.reverse()
        places = [number for number, item in enumerate(items) if item.get("id") == after]
        items = items[places[0] + 1 :] if places else items
        page = [_without_nulls(item) for item in items[:limit]]
        ends = (str(page[0]["id"]), str(page[-1]["id"])) if page else (None, None)
        _answer(resp, InputItemList(data=page, first_id=ends[0], last_id=ends[1], has_more=len(items) > limit))


class InputTokenCount:
    """How long a prompt would be."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """With all that came before it."""
        request = await body.read(req, InputTokensRequest)
        history = await _history(self._service, exchange_of(req).tenant, request)
        asked = chat_request(request, history)
        with in_names(NAMES_HERE):
            tokens = await count_prompt(self._service, asked)
        _answer(resp, InputTokens(input_tokens=tokens))


async def _finish(run: ResponseRun) -> None:
    while not run.done:
        for piece in await run.advance():
            run.outline.add(piece)
    await run.settle()


async def _work_in_background(exchange: Exchange, run: ResponseRun) -> None:
    """The same as in the foreground, after the answer."""
    response = run.response
    try:
        response.status = "in_progress"
        if await run.keep(this_process(os.getpid())):
            await _finish(run)
        exchange.status = 200
    except RequestError as error:
        exchange.status, exchange.detail = error.status, error.message
        response.status, response.error = "failed", ResponseError(error.code or "server_error", error.message)
        await run.keep()
    except Exception as error:
        _LOGGER.exception("background response failed id=%s", response.id)
        exchange.detail = repr(error)
        response.status = "failed"
        response.error = ResponseError("server_error", "the server made a mistake; its log says more")
        await run.keep()
    finally:
        exchange.close()


async def _history(service: Service, tenant: str, request: InputTokensRequest) -> list[ResponseItem]:
    """The items before this turn: those of every response that it goes on after."""
    previous = request.previous_response_id
    if previous is None:
        return []
    found = await service.storage.responses.run(lambda connection: store.chain(connection, tenant, previous))
    if not found:
        raise _missing(previous, "previous_response_id")
    if found[0].previous is not None:
        raise RequestError(
            404, f"previous_response_id: {found[0].previous[:80]!r}, on which that response goes on, was deleted or "
            "has expired; send the conversation as input",
            param="previous_response_id", code="response_not_found",
        )  # fmt: skip
    if found[-1].status in _OPEN:
        raise invalid("previous_response_id", "that response is still being worked on")
    items: list[ResponseItem] = []
    for response in found:
        items += msgspec.json.decode(response.input, type=list[ResponseItem])
        items += msgspec.json.decode(response.output, type=list[ResponseItem])
    return items


def _named_items(request: ResponsesRequest, label: str) -> list[ResponseItem]:
    """This turn's items as they are listed: each with an id and a type, and its content in parts."""
    items = items_of(request)
    for number, item in enumerate(items):
        item.type = item.type or "message"
        item.id = item.id or f"{item.type[:3]}_{label}_in{number}"
        if isinstance(item.content, str):
            kind: Literal["output_text", "input_text"] = (
                "output_text" if item.role == "assistant" else "input_text"
            )
            item.content = [ResponsePart(type=kind, text=item.content)]
    return items


async def _find(service: Service, tenant: str, response_id: str) -> StoredResponse:
    """A kept response; one whose process died while it worked on it has failed."""
    stored = await service.storage.responses.run(lambda connection: store.find(connection, tenant, response_id))
    if stored is None:
        raise _missing(response_id, "response_id")
    if stored.status in _OPEN and not is_alive(stored.owner):
        response = msgspec.json.decode(stored.record, type=ResponseObject)
        response.status = "failed"
        response.error = ResponseError("server_error", "the server was started again; send the request again")
        stored = await _rewrite(service, stored, response)
    return stored


async def _rewrite(service: Service, stored: StoredResponse, response: ResponseObject) -> StoredResponse:
    changed = msgspec.structs.replace(
        stored, status=response.status, owner="", record=_ENCODER.encode(response)
    )

    def write(connection: sqlite3.Connection) -> None:
        store.put(connection, changed)

    await service.storage.responses.run(write)
    return changed


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _missing(response_id: str, param: str) -> RequestError:
    return RequestError(
        404, f"there is no response {response_id[:80]!r}", param=param, code="response_not_found"
    )


def _answer(resp: falcon.asgi.Response, content: Struct) -> None:
    resp.content_type = falcon.MEDIA_JSON
    resp.data = _ENCODER.encode(content)
