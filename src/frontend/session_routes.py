"""/v1/sessions: what the interactive route keeps, to list, read, export and delete. Each API key sees its own."""

from typing import Annotated, Any, Final

import falcon
import falcon.asgi
import msgspec
from msgspec import UNSET, Struct

from shoal.errors import RequestError
from shoal.frontend import paging
from shoal.frontend.exchange import exchange_of
from shoal.frontend.routes import Operation, Parameter, Route
from shoal.frontend.schemas.base import doc
from shoal.frontend.schemas.interactive import (
    SessionDeleted,
    SessionDetail,
    SessionExport,
    SessionList,
    SessionMessage,
    SessionObject,
    SessionsDeleted,
)
from shoal.frontend.service import Service
from shoal.frontend.values import invalid
from shoal.storage.sessions import Entry, Session

_ENCODER: Final = msgspec.json.Encoder()
_PAGE, _LARGEST_PAGE = 20, 100
_SESSION_ID: Final = Parameter(
    name="session_id", place="path", type=Annotated[int, doc("The session's id.", 1)], required=True
)
_AFTER: Final = Parameter(
    name="after", place="query", type=Annotated[int, doc("The last id of the page before.", 9)]
)


def routes(service: Service) -> list[Route]:
    """List, read, export, delete."""
    return [
        Route(
            path="/v1/sessions",
            resource=Sessions(service),
            operations={
                "GET": Operation(
                    summary="List the sessions",
                    parameters=(paging.LIMIT, paging.ORDER, _AFTER),
                    answer=SessionList,
                ),
                "DELETE": Operation(
                    summary="Delete every session in which no turn runs", answer=SessionsDeleted
                ),
            },
        ),
        Route(
            path="/v1/sessions/{session_id}",
            resource=OneSession(service),
            operations={
                "GET": Operation(
                    summary="Read a session: its messages and counts",
                    parameters=(_SESSION_ID,),
                    answer=SessionDetail,
                    errors=(404,),
                ),
                "DELETE": Operation(
                    summary="Delete a session",
                    parameters=(_SESSION_ID,),
                    answer=SessionDeleted,
                    errors=(404, 409),
                ),
            },
        ),
        Route(
            path="/v1/sessions/{session_id}/export",
            resource=SessionFile(service),
            operations={
                "GET": Operation(
                    summary="Export a session as a JSON file",
                    parameters=(_SESSION_ID,),
                    answer=SessionExport,
                    errors=(404,),
                )
            },
        ),
    ]


class Sessions:
    """The collection."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """A page, the newest first."""
        limit = paging.read_limit(req, _PAGE, _LARGEST_PAGE)
        found = await self._service.storage.sessions.list_sessions(
            exchange_of(req).tenant,
            after=_read_after(req),
            descending=paging.read_descending(req),
            limit=limit + 1,
        )
        page = [_object(self._service, session) for session in found[:limit]]
        first, last = (page[0].id, page[-1].id) if page else (None, None)
        _answer(resp, SessionList(data=page, first_id=first, last_id=last, has_more=len(found) > limit))

    async def on_delete(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """All that no turn runs in."""
        deleted, running = await self._service.storage.sessions.delete_all(exchange_of(req).tenant)
        _answer(resp, SessionsDeleted(deleted=deleted, running=running))


class OneSession:
    """A session by its id."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response, session_id: str) -> None:
        """Its counts and messages."""
        session, entries = await _read(self._service, req, session_id)
        shown = _object(self._service, session)
        counts = {name: getattr(shown, name) for name in shown.__struct_fields__}
        _answer(resp, SessionDetail(**counts, messages=[_message(entry) for entry in entries]))

    async def on_delete(self, req: falcon.asgi.Request, resp: falcon.asgi.Response, session_id: str) -> None:
        """Forgets it."""
        number = _number(session_id)
        if not await self._service.storage.sessions.delete(exchange_of(req).tenant, number):
            raise _unknown(session_id)
        _answer(resp, SessionDeleted(id=number))


class SessionFile:
    """A session as a download."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response, session_id: str) -> None:
        """Its messages, ready to be sent again."""
        session, entries = await _read(self._service, req, session_id)
        resp.downloadable_as = f"session-{session.id}.json"
        _answer(
            resp,
            SessionExport(
                session_id=session.id,
                model=self._service.settings.model_name,
                created_at=int(session.created),
                updated_at=int(session.updated),
                messages=[entry.message for entry in entries],
            ),
        )


def _answer(resp: falcon.asgi.Response, content: Struct) -> None:
    resp.content_type = falcon.MEDIA_JSON
    resp.data = _ENCODER.encode(content)


async def _read(service: Service, req: falcon.asgi.Request, session_id: str) -> tuple[Session, list[Entry]]:
    found = await service.storage.sessions.read(exchange_of(req).tenant, _number(session_id))
    if found is None:
        raise _unknown(session_id)
    return found


def _number(session_id: str) -> int:
    """Whatever is no id of a session names none."""
    if not _is_id(session_id):
        raise _unknown(session_id)
    return int(session_id)


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdecimal() and int(text) < 1 << 63 if len(text) < 20 else False


def _unknown(session_id: str) -> RequestError:
    return RequestError(
        404, f"there is no session {session_id!r}", param="session_id", code="session_not_found"
    )


def _read_after(req: falcon.asgi.Request) -> int | None:
    text = req.get_param("after")
    if text is None:
        return None
    if not _is_id(text):
        raise invalid("after", f"must be the id of a session, not {text[:20]!r}")
    return int(text)


def _object(service: Service, session: Session) -> SessionObject:
    expires = service.storage.sessions.expires(session)
    limits = service.switchboard.limits
    return SessionObject(
        id=session.id,
        created_at=int(session.created),
        updated_at=int(session.updated),
        expires_at=None if expires is None else int(expires),
        state="running" if session.running else "idle",
        turns=session.turns,
        message_count=session.messages,
        tokens=session.context.tokens,
        generated_tokens=session.generated_tokens,
        max_tokens=None if limits is None else limits.session_len,
    )


def _message(entry: Entry) -> SessionMessage:
    given: dict[str, Any] = {
        name: value for name, value in entry.message.items() if name in SessionMessage.__struct_fields__
    }
    return SessionMessage(
        **given,
        created_at=int(entry.created),
        tokens=entry.tokens or UNSET,
        finish_reason=entry.finish_reason or UNSET,
        mark=entry.mark or UNSET,
    )
