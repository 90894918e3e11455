"""One SQLite file, opened by each process for itself and used from one thread of its own, off the event loop.

WAL, so that readers never wait for a writer; a writer waits for another one (``BEGIN IMMEDIATE``). What is committed
survives the death of any process.
"""

import asyncio
import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Final, TypeVar

from shoal.errors import RequestError, StartError

_LOGGER: Final = logging.getLogger("shoal.storage")
_BUSY_PATIENCE_S: Final = 20.0
_BUSY_RETRY_S: Final = 0.01
_RETRY_AFTER_S: Final = 5.0

R = TypeVar("R")


class Database:
    """Opened at the first use, which must come after a fork."""

    def __init__(
        self, path: Path, migrations: Sequence[str], *, kind: str = "store", flag: str = "data_dir"
    ) -> None:
        """``migrations[n]`` is the SQL script that makes version n + 1 of the schema from version n. ``kind`` is what
        is kept in it: a file of another kind, or of another program, is left alone. ``flag`` says where it lies."""
        self._path = path
        self._application_id = int.from_bytes(blake2b(f"shoal {kind}".encode(), digest_size=4).digest()) >> 1
        self._flag = flag
        self._migrations = migrations
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=path.stem)
        self._connection: sqlite3.Connection | None = None

    async def run(self, work: Callable[[sqlite3.Connection], R]) -> R:
        """``work`` in one transaction, in the database's thread. What it raises undoes it; RequestError 503 where the
        file cannot be read or written."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._transact, work)

    def run_here(self, work: Callable[[sqlite3.Connection], R]) -> R:
        """The same for a caller that has no event loop."""
        return self._thread.submit(self._transact, work).result()

    def check(self) -> None:
        """Before any fork: makes the file or brings it up to date. Raises StartError where it is not usable."""
        try:
            self._open().close()
        except (OSError, sqlite3.Error) as error:
            message = (
                f"{self._path}: cannot be used as a store: {error}; name another place with --{self._flag}"
            )
            raise StartError(message) from error

    def submit(self, work: Callable[[sqlite3.Connection], R]) -> "Future[R]":
        """``run`` that nothing stops: ``work`` is done in its turn, even if who waits for it is cancelled."""
        return self._thread.submit(self._transact, work)

    def post(self, work: Callable[[sqlite3.Connection], object]) -> None:
        """``submit`` for a caller that cannot wait: a failure is logged."""
        self.submit(work).add_done_callback(_log_failure)

    def close(self) -> None:
        """Waits for what is running."""
        self._thread.shutdown(wait=True)
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _transact(self, work: Callable[[sqlite3.Connection], R]) -> R:
        try:
            if self._connection is None:
                self._connection = self._open()
            with transaction(self._connection):
                return work(self._connection)
        except (sqlite3.Error, OSError) as error:
            message = f"the server cannot use its store {self._path.name}: {error}"
            raise RequestError(503, message, code="store_failed", retry_after_s=_RETRY_AFTER_S) from error

    def _open(self) -> sqlite3.Connection:
        prepare_folder(self._path.parent)
        self._path.touch(mode=0o600)
        connection = sqlite3.connect(
            self._path, timeout=_BUSY_PATIENCE_S, isolation_level=None, check_same_thread=False
        )
        try:
            self._set_up(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _set_up(self, connection: sqlite3.Connection) -> None:
        connection.row_factory = sqlite3.Row
        self._check_kind(connection)
        _use_write_ahead_log(connection)
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")
        self._migrate(connection)

    def _check_kind(self, connection: sqlite3.Connection) -> None:
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (kind,) = connection.execute("PRAGMA application_id").fetchone()
        if tables and kind != self._application_id:
            raise sqlite3.DatabaseError("it holds something else, perhaps of another program")

    def _migrate(self, connection: sqlite3.Connection) -> None:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > len(self._migrations):
            raise sqlite3.DatabaseError(f"it was written by a newer Shoal (schema {version})")
        for number in range(version, len(self._migrations)):
            with transaction(connection):
                (current,) = connection.execute("PRAGMA user_version").fetchone()
                if current > number:
                    continue
                for statement in self._migrations[number].split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {self._application_id}")
                connection.execute(f"PRAGMA user_version = {number + 1}")


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    """SQLite does not wait by itself where two processes change a new file's mode at once: one is told at once that
    the file is locked, whatever the connection's timeout (https://www.sqlite.org/c3ref/busy_handler.html)."""
    deadline = time.monotonic() + _BUSY_PATIENCE_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            busy = error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
            if not busy or time.monotonic() > deadline:
                raise
        time.sleep(_BUSY_RETRY_S)


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All or nothing; takes the write lock at once, so that two writers never deadlock."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # a full disk has undone it already
            connection.execute("ROLLBACK")
        raise


def _log_failure(done: "Future[object]") -> None:
    error = None if done.cancelled() else done.exception()
    if error is not None:
        _LOGGER.error("store failed", exc_info=error)


def prepare_folder(path: Path) -> None:
    """Makes a folder for its owner alone."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} is not writable")
