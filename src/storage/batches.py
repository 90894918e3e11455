"""Batches and the results of their lines, in SQLite: /v1/batches writes them, the batches' process carries them out.

A line's result is recorded once, in the transaction that counts it; the output file is written from these records
when all are there. So a batch goes on after any death where it was, and no line stands in the output twice.
"""

import sqlite3
import time
from pathlib import Path
from typing import Final, Literal

import msgspec
from msgspec import Struct

from shoal.storage.database import Database

Status = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
OPEN: Final[tuple[Status, ...]] = ("validating", "in_progress", "finalizing", "cancelling")

_FIRST: Final = """
CREATE TABLE files (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, filename TEXT NOT NULL, purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL, created_at INTEGER NOT NULL, expires_at INTEGER);
CREATE TABLE batches (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, status TEXT NOT NULL, record BLOB NOT NULL);
CREATE INDEX batches_by_status ON batches (status);
CREATE TABLE results (
    batch TEXT NOT NULL REFERENCES batches (id) ON DELETE CASCADE, line INTEGER NOT NULL, failed INTEGER NOT NULL,
    output BLOB NOT NULL, PRIMARY KEY (batch, line)) WITHOUT ROWID
"""


class LineError(Struct, kw_only=True):
    """What is wrong with an input file."""

    code: str
    message: str
    line: int | None = None
    """Counted from 1."""
    param: str | None = None


class Batch(Struct, kw_only=True):
    """A batch as it is kept. Times are Unix times in seconds."""

    id: str
    tenant: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    status: Status = "validating"
    metadata: dict[str, str] | None = None
    output_expires_after_s: int | None = None
    errors: list[LineError] = []
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0


class Result(Struct, frozen=True):
    """One line's outcome."""

    line: int
    failed: bool
    output: bytes
    """The line of the output or error file, JSON."""


def open_database(data_dir: str) -> Database:
    """Files and batches share one."""
    return Database(Path(data_dir) / "batches.sqlite", (_FIRST,))


def insert(connection: sqlite3.Connection, batch: Batch) -> None:
    """A new batch."""
    connection.execute(
        "INSERT INTO batches (id, tenant, status, record) VALUES (?, ?, ?, ?)",
        (batch.id, batch.tenant, batch.status, msgspec.json.encode(batch)),
    )


def save(connection: sqlite3.Connection, batch: Batch) -> None:
    """Writes back what was read in the same transaction."""
    connection.execute(
        "UPDATE batches SET status = ?, record = ? WHERE id = ?",
        (batch.status, msgspec.json.encode(batch), batch.id),
    )


def find(connection: sqlite3.Connection, tenant: str, batch_id: str) -> Batch | None:
    """A batch of the tenant."""
    row = connection.execute(
        "SELECT record FROM batches WHERE tenant = ? AND id = ?", (tenant, batch_id)
    ).fetchone()
    return None if row is None else _read(row)


def list_batches(connection: sqlite3.Connection, tenant: str, after: str | None, limit: int) -> list[Batch]:
    """The tenant's batches, the newest first, those older than ``after``."""
    rows = connection.execute(
        "SELECT record FROM batches WHERE tenant = :tenant"
        " AND (:after IS NULL OR rowid < (SELECT rowid FROM batches WHERE id = :after))"
        " ORDER BY rowid DESC LIMIT :limit",
        {"tenant": tenant, "after": after, "limit": limit},
    )
    return [_read(row) for row in rows]


def list_open(connection: sqlite3.Connection) -> list[Batch]:
    """The batches that are not done with, the oldest first."""
    marks = ", ".join("?" * len(OPEN))
    rows = connection.execute(f"SELECT record FROM batches WHERE status IN ({marks}) ORDER BY rowid", OPEN)
    return [_read(row) for row in rows]


def get(connection: sqlite3.Connection, batch_id: str) -> Batch:
    """A batch that is known to be there."""
    return _read(connection.execute("SELECT record FROM batches WHERE id = ?", (batch_id,)).fetchone())


def record(connection: sqlite3.Connection, batch_id: str, result: Result) -> Batch:
    """Keeps a line's outcome; a second one for the same line is dropped. Returns the batch with its counts."""
    added = connection.execute(
        "INSERT OR IGNORE INTO results (batch, line, failed, output) VALUES (?, ?, ?, ?)",
        (batch_id, result.line, result.failed, result.output),
    ).rowcount
    batch = get(connection, batch_id)
    if added and result.failed:
        batch.failed += 1
    elif added:
        batch.completed += 1
    save(connection, batch)
    return batch


def recorded_lines(connection: sqlite3.Connection, batch_id: str) -> set[int]:
    """The lines that have an outcome."""
    return {row["line"] for row in connection.execute("SELECT line FROM results WHERE batch = ?", (batch_id,))}


def write_outputs(connection: sqlite3.Connection, batch_id: str, failed: bool, path: Path) -> int:
    """Writes the output file, or the error file, in the input's order; how many lines it has."""
    rows = connection.execute(
        "SELECT output FROM results WHERE batch = ? AND failed = ? ORDER BY line", (batch_id, failed)
    )
    with path.open("wb") as file:
        return sum(file.write(row["output"] + b"\n") > 0 for row in rows)


def forget_results(connection: sqlite3.Connection, batch_id: str) -> None:
    """The files hold them now."""
    connection.execute("DELETE FROM results WHERE batch = ?", (batch_id,))


def now() -> int:
    """Unix time in seconds."""
    return int(time.time())


def _read(row: sqlite3.Row) -> Batch:
    return msgspec.json.decode(row["record"], type=Batch)
