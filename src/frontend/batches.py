"""/v1/batches: takes them in, shows them, cancels them. ``shoal.batches`` carries them out."""

import secrets
import sqlite3
from typing import Annotated, Final

import falcon
import falcon.asgi
import msgspec

from shoal.errors import RequestError
from shoal.frontend import body, files, paging
from shoal.frontend.exchange import exchange_of
from shoal.frontend.prompts import invalid
from shoal.frontend.routes import Operation, Parameter, Route
from shoal.frontend.schemas.base import doc
from shoal.frontend.schemas.batches import (
    BatchCounts,
    BatchError,
    BatchErrors,
    BatchList,
    BatchObject,
    CreateBatchRequest,
    OutputExpiry,
)
from shoal.frontend.service import Service
from shoal.frontend.values import whole
from shoal.storage import batches as store
from shoal.storage.batches import Batch

_ENCODER: Final = msgspec.json.Encoder()
ENDPOINTS: Final = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
_WINDOW_S: Final = 86_400
_MOST_PAIRS, _LONGEST_KEY, _LONGEST_VALUE = 16, 64, 512
_BATCH_ID: Final = Parameter(
    name="batch_id", place="path", type=Annotated[str, doc("The batch's id.", "batch_0123456789abcdef01234567")]
)


def routes(service: Service) -> list[Route]:
    """Create, list, describe, cancel."""
    return [
        Route(
            path="/v1/batches",
            resource=Batches(service),
            operations={
                "POST": Operation(
                    summary="Have a file of requests answered at low priority",
                    body=CreateBatchRequest,
                    answer=BatchObject,
                    errors=(404,),
                ),
                "GET": Operation(
                    summary="List the batches", parameters=(paging.LIMIT, paging.AFTER), answer=BatchList
                ),
            },
        ),
        Route(
            path="/v1/batches/{batch_id}",
            resource=OneBatch(service),
            operations={
                "GET": Operation(
                    summary="Describe a batch", parameters=(_BATCH_ID,), answer=BatchObject, errors=(404,)
                )
            },
        ),
        Route(
            path="/v1/batches/{batch_id}/cancel",
            resource=BatchCancel(service),
            operations={
                "POST": Operation(
                    summary="Cancel a batch", parameters=(_BATCH_ID,), answer=BatchObject, errors=(404, 409)
                )
            },
        ),
    ]


class Batches:
    """The collection."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Takes a batch in."""
        request = await body.read(req, CreateBatchRequest)
        tenant = exchange_of(req).tenant
        _check(request)
        file = await files.find(self._service, tenant, request.input_file_id, "input_file_id")
        if file.purpose != "batch":
            raise invalid(
                "input_file_id", f"this file's purpose is {file.purpose}; upload it with purpose batch"
            )
        created = store.now()
        batch = Batch(
            id=f"batch_{secrets.token_hex(12)}",
            tenant=tenant,
            endpoint=request.endpoint,
            input_file_id=file.id,
            completion_window=request.completion_window,
            created_at=created,
            expires_at=created + _WINDOW_S,
            metadata=request.metadata,
            output_expires_after_s=_expiry(request.output_expires_after),
        )
        await self._service.storage.batches.run(lambda connection: store.insert(connection, batch))
        _answer(resp, batch)

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """A page of the key's batches."""
        tenant, after = exchange_of(req).tenant, req.get_param("after")
        limit = paging.read_limit(req, 20, 100)
        found = await self._service.storage.batches.run(
            lambda connection: store.list_batches(connection, tenant, after, limit + 1)
        )
        page = [shown(batch) for batch in found[:limit]]
        ends = (page[0].id, page[-1].id) if page else (None, None)
        resp.content_type = falcon.MEDIA_JSON
        resp.data = _ENCODER.encode(
            BatchList(data=page, first_id=ends[0], last_id=ends[1], has_more=len(found) > limit)
        )


class OneBatch:
    """One batch."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_get(self, req: falcon.asgi.Request, resp: falcon.asgi.Response, batch_id: str) -> None:
        """How far it is."""
        tenant = exchange_of(req).tenant
        _answer(
            resp,
            await self._service.storage.batches.run(lambda connection: _find(connection, tenant, batch_id)),
        )


class BatchCancel:
    """Its end."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response, batch_id: str) -> None:
        """Asks for it; what is done stays."""
        tenant = exchange_of(req).tenant

        def cancel(connection: sqlite3.Connection) -> Batch:
            batch = _find(connection, tenant, batch_id)
            if batch.status in ("cancelling", "cancelled"):
                return batch
            if batch.status not in ("validating", "in_progress"):
                raise RequestError(
                    409, f"the batch is {batch.status}: it cannot be cancelled any more", code="batch_ended"
                )
            batch.status, batch.cancelling_at = "cancelling", store.now()
            store.save(connection, batch)
            return batch

        _answer(resp, await self._service.storage.batches.run(cancel))


def shown(batch: Batch) -> BatchObject:
    """As clients see it."""
    errors = None
    if batch.errors:
        errors = BatchErrors(
            data=[
                BatchError(code=error.code, message=error.message, line=error.line, param=error.param)
                for error in batch.errors
            ]
        )
    return BatchObject(
        id=batch.id,
        endpoint=batch.endpoint,
        errors=errors,
        input_file_id=batch.input_file_id,
        completion_window=batch.completion_window,
        status=batch.status,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        created_at=batch.created_at,
        in_progress_at=batch.in_progress_at,
        expires_at=batch.expires_at,
        finalizing_at=batch.finalizing_at,
        completed_at=batch.completed_at,
        failed_at=batch.failed_at,
        expired_at=batch.expired_at,
        cancelling_at=batch.cancelling_at,
        cancelled_at=batch.cancelled_at,
        request_counts=BatchCounts(total=batch.total, completed=batch.completed, failed=batch.failed),
        metadata=batch.metadata,
    )


def _check(request: CreateBatchRequest) -> None:
    if request.endpoint not in ENDPOINTS:
        raise invalid("endpoint", f"must be one of {', '.join(ENDPOINTS)}, not {request.endpoint[:80]!r}")
    if request.completion_window != "24h":
        raise invalid("completion_window", f"must be 24h, not {request.completion_window[:40]!r}")
    check_metadata(request.metadata)


def check_metadata(metadata: dict[str, str] | None) -> None:
    """OpenAI's bounds; RequestError 400."""
    if metadata is None:
        return
    if len(metadata) > _MOST_PAIRS:
        raise invalid("metadata", f"has {len(metadata)} pairs; at most {_MOST_PAIRS} are taken")
    for key, value in metadata.items():
        if len(key) > _LONGEST_KEY or len(value) > _LONGEST_VALUE:
            raise invalid(
                f"metadata.{key[:_LONGEST_KEY]}",
                f"keys have up to {_LONGEST_KEY} and values up to {_LONGEST_VALUE} characters",
            )


def _expiry(wanted: OutputExpiry | None) -> int | None:
    if wanted is None:
        return None
    if wanted.anchor != "created_at":
        raise invalid("output_expires_after.anchor", f"must be created_at, not {wanted.anchor[:40]!r}")
    seconds = whole("output_expires_after.seconds", wanted.seconds, 0, 0, 1 << 31)
    return files.check_expiry("output_expires_after.seconds", seconds)


def _find(connection: sqlite3.Connection, tenant: str, batch_id: str) -> Batch:
    batch = store.find(connection, tenant, batch_id)
    if batch is None:
        raise RequestError(
            404, f"there is no batch {batch_id[:80]!r}", param="batch_id", code="batch_not_found"
        )
    return batch


def _answer(resp: falcon.asgi.Response, batch: Batch) -> None:
    resp.content_type = falcon.MEDIA_JSON
    resp.data = _ENCODER.encode(shown(batch))
