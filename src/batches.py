"""``python -m shoal.batches SETTINGS.json``: carries out what /v1/batches took in.

Just another frontend to the scheduler: it has the frontends' routes in its own process and calls them with each line's
body, at the lowest priority and in the name of the key that asked. It loads nothing before there is a batch. A line's
outcome is recorded when it is there, so after a death of anything the batch goes on with the lines that have none.
"""

import asyncio
import logging
import signal
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct

from shoal import config, logs, process
from shoal.config import Settings
from shoal.storage import batches as store
from shoal.storage.batches import Batch, LineError, Result
from shoal.storage.opened import Storage, open_storage

if TYPE_CHECKING:
    from shoal.frontend.inside import Caller

_LOG: Final = logging.getLogger("shoal.batches")
_LOOK_EVERY_S: Final = 1.0
_SWEEP_EVERY_S: Final = 3600.0
_PRIORITY: Final = 1 << 20
"""Behind everything that clients can ask for."""
_MOST_LINES: Final = 50_000
_MOST_ERRORS: Final = 100
_ENCODER: Final = msgspec.json.Encoder()


class Line(Struct, kw_only=True):
    """A line of the input file."""

    custom_id: str
    method: str
    url: str
    body: dict[str, Any]


_LINE_DECODER: Final = msgspec.json.Decoder(Line)


class Outcome(Struct, kw_only=True):
    """A line of the output or error file, in OpenAI's form."""

    id: str
    custom_id: str
    response: dict[str, Any] | None = None
    error: dict[str, str] | None = None


def main() -> int:
    """Runs until SIGTERM; returns the exit code."""
    process.die_with_supervisor()
    settings = config.load(Path(sys.argv[1]))
    logs.configure("batches", settings.log_level)
    asyncio.run(_serve(settings))
    return 0


async def _serve(settings: Settings) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    storage = open_storage(settings.data_dir)
    watching = asyncio.create_task(Batches(settings, storage).run())
    ending = asyncio.create_task(ended.wait())
    await asyncio.wait({watching, ending}, return_when=asyncio.FIRST_COMPLETED)
    if watching.done():
        watching.result()
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    storage.batches.close()


class Batches:
    """The open batches, each a task; all share one limit of lines under way."""

    def __init__(self, settings: Settings, storage: Storage) -> None:
        self._settings = settings
        self._storage = storage
        self._caller: Caller | None = None
        self._running: dict[str, asyncio.Task[None]] = {}
        self._swept_s = -_SWEEP_EVERY_S

    async def run(self) -> None:
        """Looks for batches until cancelled."""
        try:
            while True:
                await self._look()
                await asyncio.sleep(_LOOK_EVERY_S)
        finally:
            for task in self._running.values():
                task.cancel()
            await asyncio.gather(*self._running.values(), return_exceptions=True)
            if self._caller is not None:
                await self._caller.stop()

    async def _look(self) -> None:
        if not (Path(self._settings.data_dir) / "batches.sqlite").exists():
            return
        database = self._storage.batches
        loop = asyncio.get_running_loop()
        if loop.time() - self._swept_s >= _SWEEP_EVERY_S:
            self._swept_s = loop.time()
            await database.run(self._storage.files.sweep)
        for batch in await database.run(store.list_open):
            if batch.id not in self._running:
                self._begin(batch)

    def _begin(self, batch: Batch) -> None:
        if self._caller is None:
            # The routes with all they need are imported here: a server without batches pays nothing for this process.
            from shoal.frontend.inside import Caller

            self._caller = Caller(self._settings, _PRIORITY)
        logs.event(
            _LOG, "batch_taken_up", batch=batch.id, status=batch.status, done=batch.completed + batch.failed
        )
        task = asyncio.create_task(_Work(self._storage, self._caller, batch.id).run())
        self._running[batch.id] = task
        task.add_done_callback(lambda ended: self._note_end(batch.id, ended))

    def _note_end(self, batch_id: str, task: asyncio.Task[None]) -> None:
        """A batch that failed for a reason of ours is taken up again at the next look."""
        del self._running[batch_id]
        error = None if task.cancelled() else task.exception()
        if error is not None:
            _LOG.error("batch_interrupted batch=%s", batch_id, exc_info=error)


class _Work:
    """One batch, from where it stands to its end."""

    def __init__(self, storage: Storage, caller: "Caller", batch_id: str) -> None:
        self._storage = storage
        self._database = storage.batches
        self._caller = caller
        self._id = batch_id

    async def run(self) -> None:
        """Validates, answers the lines, writes the files; goes on from what is recorded."""
        batch = await self._reload()
        if batch.status == "validating":
            batch = await self._validate(batch)
        if batch.status == "in_progress":
            batch = await self._answer_lines(batch)
        if batch.status in ("in_progress", "finalizing", "cancelling"):
            batch = await self._database.run(self._finalize)
        logs.event(
            _LOG,
            "batch_ended",
            batch=batch.id,
            status=batch.status,
            completed=batch.completed,
            failed=batch.failed,
        )

    async def _reload(self) -> Batch:
        return await self._database.run(lambda connection: store.get(connection, self._id))

    async def _validate(self, batch: Batch) -> Batch:
        path = await self._input_path(batch)
        total, errors = (
            (0, [_gone()]) if path is None else await asyncio.to_thread(validate, path, batch.endpoint)
        )

        def settle(connection: sqlite3.Connection) -> Batch:
            current = store.get(connection, self._id)
            if current.status == "validating":
                current.errors, current.total = errors, total
                if errors:
                    current.status, current.failed_at = "failed", store.now()
                else:
                    current.status, current.in_progress_at = "in_progress", store.now()
                store.save(connection, current)
            return current

        return await self._database.run(settle)

    async def _input_path(self, batch: Batch) -> Path | None:
        file = await self._database.run(
            lambda connection: self._storage.files.find(connection, batch.tenant, batch.input_file_id)
        )
        return None if file is None else self._storage.files.path(file.id)

    async def _answer_lines(self, batch: Batch) -> Batch:
        """Until all have an outcome, the batch is cancelled, or its time is over. What runs then is given up."""
        path = await self._input_path(batch)
        if path is None:
            return batch
        done = await self._database.run(lambda connection: store.recorded_lines(connection, self._id))
        tasks: set[asyncio.Task[None]] = set()
        dispatching = asyncio.create_task(self._dispatch(batch, path, done, tasks))
        try:
            while not dispatching.done() or tasks:
                await asyncio.wait({dispatching, *tasks}, timeout=_LOOK_EVERY_S)
                if dispatching.done():
                    dispatching.result()
                tasks -= {task for task in tasks if _finished(task)}
                current = await self._reload()
                if current.status != "in_progress" or current.expires_at <= store.now():
                    return current
            return await self._reload()
        finally:
            for task in (dispatching, *tasks):
                task.cancel()
            await asyncio.gather(dispatching, *tasks, return_exceptions=True)

    async def _dispatch(self, batch: Batch, path: Path, done: set[int], tasks: set[asyncio.Task[None]]) -> None:
        for number, line in _lines(path):
            if number in done:
                continue
            await self._caller.places.acquire()
            task = asyncio.create_task(self._answer_line(batch, number, _LINE_DECODER.decode(line)))
            task.add_done_callback(lambda _: self._caller.places.release())
            tasks.add(task)

    async def _answer_line(self, batch: Batch, number: int, line: Line) -> None:
        request_id = f"{batch.id}-{number}"
        answer = await self._caller.post(line.url, _ENCODER.encode(line.body), request_id, batch.tenant)
        failed = answer.status >= 400
        outcome = Outcome(
            id=f"batch_req_{batch.id.removeprefix('batch_')}_{number}",
            custom_id=line.custom_id,
            response={
                "status_code": answer.status,
                "request_id": request_id,
                "body": msgspec.json.decode(answer.body),
            },
        )
        result = Result(number, failed, _ENCODER.encode(outcome))
        await self._database.run(lambda connection: store.record(connection, batch.id, result))

    def _finalize(self, connection: sqlite3.Connection) -> Batch:
        """The output files and the last status, in one transaction."""
        batch = store.get(connection, self._id)
        if batch.status == "in_progress" and batch.completed + batch.failed < batch.total:
            self._expire_rest(connection, batch)
            batch = store.get(connection, self._id)
            batch.status, batch.expired_at = "expired", store.now()
        elif batch.status == "cancelling":
            batch.status, batch.cancelled_at = "cancelled", store.now()
        else:
            batch.finalizing_at = store.now()
            batch.status, batch.completed_at = "completed", store.now()
        batch.output_file_id = self._write(connection, batch, failed=False)
        batch.error_file_id = self._write(connection, batch, failed=True)
        store.forget_results(connection, batch.id)
        store.save(connection, batch)
        return batch

    def _expire_rest(self, connection: sqlite3.Connection, batch: Batch) -> None:
        path = self._storage.files.path(batch.input_file_id)
        done = store.recorded_lines(connection, batch.id)
        for number, line in _lines(path) if path.exists() else ():
            if number not in done:
                outcome = Outcome(
                    id=f"batch_req_{batch.id.removeprefix('batch_')}_{number}",
                    custom_id=_LINE_DECODER.decode(line).custom_id,
                    error={
                        "code": "batch_expired",
                        "message": "this request was not answered before the completion window ended",
                    },
                )
                store.record(connection, batch.id, Result(number, True, _ENCODER.encode(outcome)))

    def _write(self, connection: sqlite3.Connection, batch: Batch, failed: bool) -> str | None:
        partial = self._storage.files.begin()
        try:
            if not store.write_outputs(connection, batch.id, failed, partial):
                return None
            file = self._storage.files.keep(
                connection,
                partial,
                tenant=batch.tenant,
                filename=f"{batch.id}_{'error' if failed else 'output'}.jsonl",
                purpose="batch_output",
                expires_after_s=batch.output_expires_after_s,
            )
        finally:
            partial.unlink(missing_ok=True)
        return file.id


def validate(path: Path, endpoint: str) -> tuple[int, list[LineError]]:
    """How many requests an input file holds, and what is wrong with it."""
    errors: list[LineError] = []
    seen: set[str] = set()
    total = 0
    for number, raw in _lines(path):
        total += 1
        if total > _MOST_LINES:
            too_many = LineError(
                code="too_many_lines", message=f"more than {_MOST_LINES} lines; split the file"
            )
            return total, [too_many]
        error = _fault(raw, endpoint, seen)
        if error is not None and len(errors) < _MOST_ERRORS:
            error.line = number
            errors.append(error)
    if not total:
        errors.append(LineError(code="empty_file", message="the input file holds no request"))
    return total, errors


def _fault(raw: bytes, endpoint: str, seen: set[str]) -> LineError | None:
    try:
        line = _LINE_DECODER.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return LineError(code="invalid_json_line", message=f"no request in JSON: {str(error)[:200]}")
    if line.custom_id in seen:
        message = f"custom_id {line.custom_id[:80]!r} stands on an earlier line too"
        return LineError(code="duplicate_custom_id", message=message, param="custom_id")
    seen.add(line.custom_id)
    if line.method != "POST":
        return LineError(code="invalid_method", message="method must be POST", param="method")
    if line.url != endpoint:
        message = f"url is {line.url[:80]!r}, the batch's endpoint is {endpoint}"
        return LineError(code="mismatched_endpoint", message=message, param="url")
    if line.body.get("stream"):
        return LineError(code="stream_not_allowed", message="a batch cannot stream", param="body.stream")
    if line.body.get("background"):
        message = "a batch is in the background already; leave it out"
        return LineError(code="background_not_allowed", message=message, param="body.background")
    return None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, counted from 1."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def _gone() -> LineError:
    return LineError(code="file_not_found", message="the input file was deleted", param="input_file_id")


def _finished(task: asyncio.Task[None]) -> bool:
    """Whether it is; raises what it raised."""
    if task.done():
        task.result()
    return task.done()


if __name__ == "__main__":
    sys.exit(main())
