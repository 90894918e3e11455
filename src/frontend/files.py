"""/v1/files: uploads with a size limit, kept on disk under the key's name."""

from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Annotated, Any, Final

import falcon
import falcon.asgi
import msgspec
from falcon.media.multipart import MultipartParseError
from msgspec import UNSET, Struct

from shoal.errors import RequestError
from shoal.frontend import paging
from shoal.frontend.exchange import exchange_of
from shoal.frontend.prompts import invalid
from shoal.frontend.routes import Operation, Parameter, Route
from shoal.frontend.schemas.base import doc
from shoal.frontend.schemas.files import FileDeleted, FileList, FileObject, FileUpload
from shoal.frontend.service import Service
from shoal.storage.files import StoredFile

_ENCODER: Final = msgspec.json.Encoder()
_PURPOSES: Final = ("batch", "user_data")
_CHUNK_BYTES: Final = 1 << 18
_LONGEST_FIELD: Final = 4096
_LONGEST_NAME: Final = 255
_LEAST_EXPIRY_S, _MOST_EXPIRY_S = 3600, 2_592_000
_MOST_LISTED: Final = 10_000
_FILE_ID: Final = Parameter(
    name="file_id", place="path", type=Annotated[str, doc("The file's id.", "file-0123456789abcdef01234567")]
)
_PURPOSE: Final = Parameter(
    name="purpose", place="query", type=Annotated[str, doc("Only files of this purpose.", "batch")]
)


def routes(service: Service) -> list[Route]:
    """Upload, list, describe, read, delete."""
    return [
        Route(
            path="/v1/files",
            resource=Files(service),
            operations={
                "POST": Operation(
                    summary="Upload a file",
                    body=FileUpload,
                    upload=True,
                    answer=FileObject,
                    errors=(413,),
                ),
                "GET": Operation(
                    summary="List the files",
                    parameters=(_PURPOSE, paging.LIMIT, paging.ORDER, paging.AFTER),
                    answer=FileList,
                ),
            },
        ),
        Route(
            path="/v1/files/{file_id}",
            resource=File(service),
            operations={
                "GET": Operation(
                    summary="Describe a file", parameters=(_FILE_ID,), answer=FileObject, errors=(404,)
                ),
                "DELETE": Operation(
                    summary="Delete a file", parameters=(_FILE_ID,), answer=FileDeleted, errors=(404,)
                ),
            },
        ),
        Route(
            path="/v1/files/{file_id}/content",
            resource=FileContent(service),
            operations={
                "GET": Operation(
                    summary="Read a file",
                    parameters=(_FILE_ID,),
                    answer_media="application/octet-stream",
                    errors=(404,),
                )
            },
        ),
    ]


class Files:
    """The collection."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Keeps a multipart upload."""
        store, database = self._service.storage.files, self._service.storage.batches
        partial = await database.run(lambda _: store.begin())
        try:
            form = await _read_form(req, partial, self._service.settings.file_limit_bytes)
            tenant = exchange_of(req).tenant
            file = await database.run(
                lambda connection: store.keep(
                    connection,
                    partial,
                    tenant=tenant,
                    filename=form.filename,
                    purpose=form.purpose,
                    expires_after_s=form.expires_after_s,
                )
            )
        finally:
            partial.unlink(missing_ok=True)
        _answer(resp, shown(file))

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """A page of the key's files."""
        tenant, purpose, after = exchange_of(req).tenant, req.get_param("purpose"), req.get_param("after")
        limit, descending = paging.read_limit(req, _MOST_LISTED, _MOST_LISTED), paging.read_descending(req)
        files = await self._service.storage.batches.run(
            lambda connection: self._service.storage.files.list(
                connection, tenant, purpose=purpose, after=after, descending=descending, limit=limit + 1
            )
        )
        page = [shown(file) for file in files[:limit]]
        ends = (page[0].id, page[-1].id) if page else (None, None)
        _answer(resp, FileList(data=page, first_id=ends[0], last_id=ends[1], has_more=len(files) > limit))


class File:
    """One file."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response, file_id: str) -> None:
        """What is known of it."""
        _answer(resp, shown(await find(self._service, exchange_of(req).tenant, file_id, "file_id")))

    async def on_delete(self, req: falcon.asgi.Request, resp: falcon.asgi.Response, file_id: str) -> None:
        """Removes it."""
        tenant = exchange_of(req).tenant
        gone = await self._service.storage.batches.run(
            lambda connection: self._service.storage.files.delete(connection, tenant, file_id)
        )
        if not gone:
            raise _missing(file_id, "file_id")
        _answer(resp, FileDeleted(id=file_id))


class FileContent:
    """The bytes of one file."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response, file_id: str) -> None:
        """All of them."""
        file = await find(self._service, exchange_of(req).tenant, file_id, "file_id")
        path = self._service.storage.files.path(file.id)
        resp.content_type = "application/octet-stream"
        resp.set_header("Content-Disposition", "attachment")
        resp.set_header("X-Content-Type-Options", "nosniff")
        resp.content_length = file.bytes
        resp.stream = _chunks(path)


async def _chunks(path: Path) -> AsyncIterator[bytes]:
    """A file's bytes; pieces of this size are not worth a thread."""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


class _Form(Struct, kw_only=True):
    """What an upload says besides its bytes."""

    filename: str = ""
    purpose: str = ""
    expires_after_s: int | None = None


async def find(service: Service, tenant: str, file_id: str, param: str) -> StoredFile:
    """The tenant's file; RequestError 404."""
    file = await service.storage.batches.run(
        lambda connection: service.storage.files.find(connection, tenant, file_id)
    )
    if file is None:
        raise _missing(file_id, param)
    return file


def shown(file: StoredFile) -> FileObject:
    """As clients see it."""
    return FileObject(
        id=file.id,
        bytes=file.bytes,
        created_at=file.created_at,
        expires_at=UNSET if file.expires_at is None else file.expires_at,
        filename=file.filename,
        purpose=file.purpose,
    )


async def _read_form(req: falcon.asgi.Request, partial: Path, limit: int) -> _Form:
    """Writes the file to ``partial``; RequestError 400 or 413 names what is wrong."""
    if not (req.content_type or "").lower().startswith("multipart/form-data"):
        raise RequestError(
            415, "send the file as multipart/form-data, with the fields file and purpose", param="Content-Type"
        )
    if (req.content_length or 0) > limit + (1 << 20):
        raise _too_large(limit)
    fields: dict[str, str] = {}
    filename = None
    try:
        async for part in await req.get_media():
            name = part.name or ""
            if name == "file" and filename is None:
                filename = part.filename or ""
                await _save(part.stream, partial, limit)
            elif name in fields or name == "file":
                raise invalid(name, "was sent twice")
            else:
                fields[name] = await _text(part, name)
    except MultipartParseError as error:
        raise RequestError(
            400, f"the body is no proper multipart/form-data: {error.description}", code="malformed_body"
        ) from error
    if filename is None:
        raise RequestError(
            400, "file: missing; send it as a part named file", param="file", code="missing_field"
        )
    return _checked(fields, _safe_name(filename))


async def _save(source: Any, partial: Path, limit: int) -> None:
    size = 0
    with partial.open("wb") as target:
        while chunk := await source.read(_CHUNK_BYTES):
            size += len(chunk)
            if size > limit:
                raise _too_large(limit)
            target.write(chunk)


async def _text(part: Any, name: str) -> str:
    raw = await part.stream.read(_LONGEST_FIELD + 1)
    if len(raw) > _LONGEST_FIELD:
        raise invalid(name[:80], f"is longer than {_LONGEST_FIELD} bytes")
    try:
        text: str = raw.decode()
    except UnicodeDecodeError as error:
        raise invalid(name[:80], "is not UTF-8") from error
    return text


def _checked(fields: dict[str, str], filename: str) -> _Form:
    purpose = fields.pop("purpose", "")
    if purpose not in _PURPOSES:
        raise invalid("purpose", f"must be one of {', '.join(_PURPOSES)}, not {purpose[:40]!r}")
    anchor = fields.pop("expires_after[anchor]", None)
    seconds = fields.pop("expires_after[seconds]", None)
    _refuse_unknown(fields)
    if (anchor is None) != (seconds is None) or anchor not in (None, "created_at"):
        raise invalid("expires_after", "needs anchor: created_at and seconds")
    return _Form(
        filename=filename, purpose=purpose, expires_after_s=None if seconds is None else _expiry(seconds)
    )


def _refuse_unknown(fields: Iterable[str]) -> None:
    for name in fields:
        raise RequestError(400, f"unknown field: {name[:80]}", param=name[:80], code="unknown_field")


def _expiry(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise invalid("expires_after[seconds]", f"must be a whole number, not {text[:20]!r}")
    return check_expiry("expires_after[seconds]", int(text))


def check_expiry(name: str, seconds: int) -> int:
    """OpenAI's bounds for how long a file is kept."""
    if not _LEAST_EXPIRY_S <= seconds <= _MOST_EXPIRY_S:
        raise invalid(name, f"must be from {_LEAST_EXPIRY_S} to {_MOST_EXPIRY_S} seconds, not {seconds}")
    return seconds


def _safe_name(filename: str) -> str:
    """Only shown, never opened: the bytes are kept under the file's id."""
    printable = "".join(character for character in filename if character.isprintable())
    return printable.replace("\\", "/").rpartition("/")[2][:_LONGEST_NAME] or "file"


def _too_large(limit: int) -> RequestError:
    return RequestError(
        413, f"file: larger than {limit} bytes; split it, or start the server with a larger --file_limit",
        param="file", code="file_too_large",
    )  # fmt: skip


def _missing(file_id: str, param: str) -> RequestError:
    return RequestError(404, f"there is no file {file_id[:80]!r}", param=param, code="file_not_found")


def _answer(resp: falcon.asgi.Response, content: Struct) -> None:
    resp.content_type = falcon.MEDIA_JSON
    resp.data = _ENCODER.encode(content)
