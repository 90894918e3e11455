"""Interactive sessions in SQLite: conversations, and the answers that a retried request gets again.

A turn's messages, its answer among them, are written in the transaction that ends its lease: whatever dies at whatever
moment, a session holds whole turns only. The functions here read and write within the caller's transaction.
"""

import secrets
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from shoal.errors import RequestError
from shoal.storage import leases
from shoal.storage.database import Database
from shoal.storage.leases import Lease

FRESH: Final = -1
"""Asks for a session id that is not taken."""
REPLAY_S: Final = 3600.0
"""For so long a retried request gets its answer again."""
_MOST_ID: Final = (1 << 31) - 1
"""Of the ids that the server picks: clients in many languages hold them in 32 bits."""

_FIRST: Final = f"""
CREATE TABLE sessions (
    tenant TEXT NOT NULL, id INTEGER NOT NULL, created REAL NOT NULL, updated REAL NOT NULL,
    turns INTEGER NOT NULL, generated_tokens INTEGER NOT NULL, context BLOB NOT NULL, before BLOB NOT NULL,
    PRIMARY KEY (tenant, id));
CREATE INDEX sessions_by_age ON sessions (updated);
CREATE TABLE messages (
    tenant TEXT NOT NULL, session INTEGER NOT NULL, ordinal INTEGER NOT NULL, turn INTEGER NOT NULL,
    entry BLOB NOT NULL, PRIMARY KEY (tenant, session, ordinal),
    FOREIGN KEY (tenant, session) REFERENCES sessions (tenant, id) ON DELETE CASCADE);
CREATE TABLE answers (
    tenant TEXT NOT NULL, request_id TEXT NOT NULL, session INTEGER NOT NULL, turn INTEGER NOT NULL,
    digest BLOB NOT NULL, answer BLOB, recorded REAL NOT NULL, PRIMARY KEY (tenant, request_id)) WITHOUT ROWID;
CREATE INDEX answers_by_age ON answers (recorded);
{leases.SCHEMA}"""

Mark = Literal["", "cancelled", "disconnected"]


class Entry(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One message as it is kept."""

    message: dict[str, Any]
    """As the chat template gets it: role, content, …"""
    created: float
    """Unix time in seconds."""
    tokens: int = 0
    """Of an answer."""
    finish_reason: str = ""
    """Of an answer."""
    mark: Mark = ""
    """Why an answer is not complete."""


class Context(Struct, frozen=True, array_like=True):
    """The tokens of a conversation as the model last saw them: what the next turn's prompt goes on from."""

    ids: bytes = b""
    """int32."""
    characters: int = 0
    """Of the text that they spell."""
    digest: bytes = b""
    """Of that text, and of the vocabulary."""
    stop_id: int = -1
    """The token that ended the answer; not among ``ids``."""

    @property
    def tokens(self) -> int:
        """How many there are."""
        return len(self.ids) // 4


class Session(Struct, frozen=True, kw_only=True):
    """What is known of a session, but for its messages. Times are Unix times in seconds."""

    id: int
    created: float
    updated: float
    turns: int
    generated_tokens: int
    """Of all answers."""
    context: Context
    running: bool
    messages: int


class Ask(Struct, frozen=True, kw_only=True):
    """A turn that wants to begin."""

    tenant: str
    session: int
    """``FRESH`` for a new one."""
    label: str
    """The HTTP request's id."""
    retryable: bool
    """The client chose the label: a request with the same one and the same digest is a retry."""
    digest: bytes
    now: float
    idle_since: float
    """A session not used since then is forgotten."""


class Begun(Struct, frozen=True, kw_only=True):
    """A turn that may run."""

    lease: Lease
    turn: int
    """Its number, from 1."""
    entries: list[Entry]
    """What was said before."""
    context: Context
    generated_tokens: int
    """Of the answers before."""
    exists: bool
    """Whether the session has a history."""


class Replay(Struct, frozen=True):
    """The turn has been run: its answer, as it was recorded."""

    answer: bytes


class Ending(Struct, frozen=True, kw_only=True):
    """How a turn ends."""

    ask: Ask
    begun: Begun
    keeps: bool
    """The session goes on; else it is forgotten."""
    entries: Sequence[Entry]
    """The turn's messages, the answer last."""
    context: Context
    answer: bytes | None
    """What a retry gets; None: a retry takes this turn back and runs again."""
    generated_tokens: int
    now: float


def open_sessions(path: Path) -> Database:
    """The store of one server."""
    return Database(path, (_FIRST,), kind="sessions", flag="session_store")


# --- turns -----------------------------------------------------------------------------------------------


def begin(connection: sqlite3.Connection, ask: Ask) -> Begun | Replay:
    """Takes the session's lease and reads its history. RequestError 409 while another turn runs."""
    earlier = _find_retried(connection, ask) if ask.retryable else None
    if earlier is not None and earlier["answer"] is not None:
        return Replay(earlier["answer"])
    session = earlier["session"] if earlier is not None else ask.session
    if session == FRESH:
        session = _fresh_id(connection, ask.tenant)
    lease = leases.take(connection, ask.tenant, session, ask.label, ask.now)
    connection.execute(
        "DELETE FROM sessions WHERE tenant = ? AND id = ? AND updated <= ?",
        (ask.tenant, session, ask.idle_since),
    )
    row = connection.execute(
        "SELECT * FROM sessions WHERE tenant = ? AND id = ?", (ask.tenant, session)
    ).fetchone()
    if row is None:
        return Begun(lease=lease, turn=1, entries=[], context=Context(), generated_tokens=0, exists=False)
    again = earlier is not None and earlier["turn"] == row["turns"]
    entries = _read_entries(connection, ask.tenant, session)
    kept = [entry for turn, entry in entries if not (again and turn == row["turns"])]
    dropped = sum(entry.tokens for _, entry in entries) - sum(entry.tokens for entry in kept)
    return Begun(
        lease=lease,
        turn=row["turns"] if again else row["turns"] + 1,
        entries=kept,
        context=msgspec.msgpack.decode(row["before" if again else "context"], type=Context),
        generated_tokens=row["generated_tokens"] - dropped,
        exists=bool(kept),
    )


def end(connection: sqlite3.Connection, ending: Ending) -> None:
    """Records a turn and ends its lease. RequestError 409 where the lease was lost: then nothing is recorded."""
    lease, ask, turn = ending.begun.lease, ending.ask, ending.begun.turn
    if not leases.give_back(connection, lease):
        message = (
            f"this turn of session {lease.session} was given up: the server hung, and another request went on "
            "with the session; send it again"
        )
        raise RequestError(409, message, param="session_id", code="session_lost", retry_after_s=1)
    if ending.keeps:
        _append(connection, ending)
    else:
        _delete_history(connection, lease.tenant, lease.session)
    if ask.retryable and (ending.keeps or ending.begun.exists):
        connection.execute(
            "INSERT OR REPLACE INTO answers (tenant, request_id, session, turn, digest, answer, recorded)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (ask.tenant, ask.label, lease.session, turn, ask.digest, ending.answer, ending.now),
        )


def _find_retried(connection: sqlite3.Connection, ask: Ask) -> sqlite3.Row | None:
    row: sqlite3.Row | None = connection.execute(
        "SELECT session, turn, answer FROM answers WHERE tenant = ? AND request_id = ? AND digest = ? AND recorded > ?",
        (ask.tenant, ask.label, ask.digest, ask.now - REPLAY_S),
    ).fetchone()
    if row is None and ask.session == FRESH:
        _refuse_while_first_runs(connection, ask)
    return row


def _refuse_while_first_runs(connection: sqlite3.Connection, ask: Ask) -> None:
    """The first try has picked a session of its own, whose lease would not keep this one out."""
    rows = connection.execute(
        "SELECT session FROM leases WHERE tenant = ? AND label = ?", (ask.tenant, ask.label)
    ).fetchall()
    for row in rows:
        holder = leases.find_holder(connection, ask.tenant, row["session"], ask.now)
        if holder is not None:
            raise leases.busy(row["session"], holder)


def _fresh_id(connection: sqlite3.Connection, tenant: str) -> int:
    while True:
        session = 1 + secrets.randbelow(_MOST_ID)
        taken = connection.execute(
            "SELECT 1 FROM sessions WHERE tenant = :tenant AND id = :id"
            " UNION SELECT 1 FROM leases WHERE tenant = :tenant AND session = :id",
            {"tenant": tenant, "id": session},
        ).fetchone()
        if taken is None:
            return session


def _append(connection: sqlite3.Connection, ending: Ending) -> None:
    begun, lease, now = ending.begun, ending.begun.lease, ending.now
    key = (lease.tenant, lease.session)
    before = msgspec.msgpack.encode(begun.context) if ending.answer is None else b""
    connection.execute(
        "INSERT INTO sessions (tenant, id, created, updated, turns, generated_tokens, context, before)"
        " VALUES (:tenant, :id, :now, :now, :turns, :generated, :context, :before) ON CONFLICT DO UPDATE SET"
        " updated = :now, turns = :turns, generated_tokens = :generated, context = :context, before = :before",
        {
            "tenant": lease.tenant, "id": lease.session, "now": now, "turns": begun.turn, "before": before,
            "generated": begun.generated_tokens + ending.generated_tokens,
            "context": msgspec.msgpack.encode(ending.context),
        },
    )  # fmt: skip
    first = len(begun.entries)
    connection.execute("DELETE FROM messages WHERE tenant = ? AND session = ? AND ordinal >= ?", (*key, first))
    connection.executemany(
        "INSERT INTO messages (tenant, session, ordinal, turn, entry) VALUES (?, ?, ?, ?, ?)",
        [(*key, first + n, begun.turn, msgspec.json.encode(entry)) for n, entry in enumerate(ending.entries)],
    )


# --- sessions --------------------------------------------------------------------------------------------


def find(
    connection: sqlite3.Connection, tenant: str, session: int, idle_since: float, now: float
) -> Session | None:
    """A session of the tenant that has a history."""
    row = connection.execute(
        f"{_SELECT} WHERE tenant = ? AND id = ? AND updated > ?", (tenant, session, idle_since)
    ).fetchone()
    return None if row is None else _read(connection, tenant, row, now)


def list_sessions(
    connection: sqlite3.Connection,
    tenant: str,
    *,
    after: int | None,
    descending: bool,
    limit: int,
    idle_since: float,
    now: float,
) -> list[Session]:
    """The tenant's sessions by the time they began, those behind ``after``. RequestError 400 where there is no such."""
    direction, beyond = ("DESC", "<") if descending else ("ASC", ">")
    if after is not None and find(connection, tenant, after, idle_since, now) is None:
        raise RequestError(400, f"after: there is no session {after}", param="after", code="invalid_value")
    rows = connection.execute(
        f"{_SELECT} WHERE tenant = :tenant AND updated > :idle_since AND (:after IS NULL OR (created, id) {beyond}"
        " (SELECT created, id FROM sessions WHERE tenant = :tenant AND id = :after))"
        f" ORDER BY created {direction}, id {direction} LIMIT :limit",
        {"tenant": tenant, "after": after, "idle_since": idle_since, "limit": limit},
    ).fetchall()
    return [_read(connection, tenant, row, now) for row in rows]


def read_entries(connection: sqlite3.Connection, tenant: str, session: int) -> list[Entry]:
    """The messages in order."""
    return [entry for _, entry in _read_entries(connection, tenant, session)]


def delete(connection: sqlite3.Connection, tenant: str, session: int, now: float) -> bool:
    """Forgets a session and what retries would get of it; False where there is none. RequestError 409 while a turn
    runs in it."""
    holder = leases.find_holder(connection, tenant, session, now)
    if holder is not None:
        raise leases.busy(session, holder)
    connection.execute("DELETE FROM answers WHERE tenant = ? AND session = ?", (tenant, session))
    return _delete_history(connection, tenant, session)


def delete_all(connection: sqlite3.Connection, tenant: str, now: float) -> tuple[int, int]:
    """Forgets the tenant's sessions but for those in which a turn runs; how many went and how many stayed."""
    rows = connection.execute("SELECT id FROM sessions WHERE tenant = ?", (tenant,)).fetchall()
    idle = [row["id"] for row in rows if leases.find_holder(connection, tenant, row["id"], now) is None]
    for session in idle:
        delete(connection, tenant, session, now)
    return len(idle), len(rows) - len(idle)


def sweep(connection: sqlite3.Connection, idle_since: float, now: float) -> int:
    """Forgets sessions that nobody used, answers that nobody will ask for again, and leases of dead processes; how
    many sessions went."""
    leases.sweep(connection, now)
    connection.execute("DELETE FROM answers WHERE recorded <= ?", (now - REPLAY_S,))
    return connection.execute(
        "DELETE FROM sessions WHERE updated <= ? AND NOT EXISTS (SELECT 1 FROM leases"
        " WHERE leases.tenant = sessions.tenant AND leases.session = sessions.id)",
        (idle_since,),
    ).rowcount


_SELECT: Final = (
    "SELECT id, created, updated, turns, generated_tokens, context, (SELECT count(*) FROM messages"
    " WHERE messages.tenant = sessions.tenant AND messages.session = sessions.id) AS messages FROM sessions"
)


def _read(connection: sqlite3.Connection, tenant: str, row: sqlite3.Row, now: float) -> Session:
    return Session(
        id=row["id"],
        created=row["created"],
        updated=row["updated"],
        turns=row["turns"],
        generated_tokens=row["generated_tokens"],
        context=msgspec.msgpack.decode(row["context"], type=Context),
        running=leases.find_holder(connection, tenant, row["id"], now) is not None,
        messages=row["messages"],
    )


def _read_entries(connection: sqlite3.Connection, tenant: str, session: int) -> list[tuple[int, Entry]]:
    rows = connection.execute(
        "SELECT turn, entry FROM messages WHERE tenant = ? AND session = ? ORDER BY ordinal", (tenant, session)
    )
    return [(row["turn"], msgspec.json.decode(row["entry"], type=Entry)) for row in rows]


def _delete_history(connection: sqlite3.Connection, tenant: str, session: int) -> bool:
    return bool(
        connection.execute("DELETE FROM sessions WHERE tenant = ? AND id = ?", (tenant, session)).rowcount
    )
