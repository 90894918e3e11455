"""Responses of /v1/responses that are kept: what was asked, what was answered, and after which other one."""

import sqlite3
import time
from pathlib import Path
from typing import Final

from msgspec import Struct

from shoal.storage.database import Database

KEPT_S: Final = 30 * 86_400
_LONGEST_CHAIN: Final = 10_000
_FIRST: Final = """
CREATE TABLE responses (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, previous TEXT, status TEXT NOT NULL, owner TEXT NOT NULL,
    expires_at REAL NOT NULL, input BLOB NOT NULL, output BLOB NOT NULL, record BLOB NOT NULL);
CREATE INDEX responses_by_expiry ON responses (expires_at)
"""


class StoredResponse(Struct, kw_only=True):
    """One response. The blobs are JSON that the routes write and read."""

    id: str
    tenant: str
    previous: str | None
    status: str
    owner: str = ""
    """Who works on it, see ``process.identity``; empty once it has ended."""
    input: bytes
    """The items of this turn alone."""
    output: bytes
    """The items answered."""
    record: bytes
    """The response object as it is shown."""


def open_database(data_dir: str) -> Database:
    """A file of its own: long answers do not keep batches waiting."""
    return Database(Path(data_dir) / "responses.sqlite", (_FIRST,))


def put(connection: sqlite3.Connection, response: StoredResponse) -> None:
    """Inserts or replaces; forgets what has expired."""
    connection.execute("DELETE FROM responses WHERE expires_at < ?", (time.time(),))
    connection.execute(
        "INSERT OR REPLACE INTO responses (id, tenant, previous, status, owner, expires_at, input, output, record)"
        " VALUES (:id, :tenant, :previous, :status, :owner, :expires_at, :input, :output, :record)",
        {name: getattr(response, name) for name in response.__struct_fields__}
        | {"expires_at": time.time() + KEPT_S},
    )


def find(connection: sqlite3.Connection, tenant: str, response_id: str) -> StoredResponse | None:
    """A response of the tenant."""
    row = connection.execute(
        "SELECT id, tenant, previous, status, owner, input, output, record FROM responses"
        " WHERE tenant = ? AND id = ? AND expires_at >= ?",
        (tenant, response_id, time.time()),
    ).fetchone()
    return None if row is None else StoredResponse(**row)


def chain(connection: sqlite3.Connection, tenant: str, response_id: str) -> list[StoredResponse]:
    """The response and those before it, the first one first, as far as they are there."""
    found: list[StoredResponse] = []
    wanted: str | None = response_id
    while wanted is not None and len(found) < _LONGEST_CHAIN:
        response = find(connection, tenant, wanted)
        if response is None:
            break
        found.append(response)
        wanted = response.previous
    return found[::-1]


def delete(connection: sqlite3.Connection, tenant: str, response_id: str) -> bool:
    """Whether there was such a response."""
    return bool(
        connection.execute("DELETE FROM responses WHERE tenant = ? AND id = ?", (tenant, response_id)).rowcount
    )
