"""Who is at work on a session: one row while a turn runs, so that no session has two, whichever frontends they reach.

A lease ends with its turn. Where the process that took it has died without ending it, the next to ask takes it over at
once: a process is told by its pid and start time. One that hangs loses it when it is not renewed in time.
"""

import os
import secrets
import sqlite3
from functools import cache
from pathlib import Path
from typing import Final

from msgspec import Struct

from shoal.errors import RequestError

LIFETIME_S: Final = 30.0
RENEW_EVERY_S: Final = 8.0
_RETRY_AFTER_S: Final = 1.0

SCHEMA: Final = """
CREATE TABLE leases (
    tenant TEXT NOT NULL, session INTEGER NOT NULL, token TEXT NOT NULL UNIQUE, owner TEXT NOT NULL,
    label TEXT NOT NULL, expires REAL NOT NULL, PRIMARY KEY (tenant, session)) WITHOUT ROWID
"""


class Lease(Struct, frozen=True):
    """The right to run one turn of one session."""

    tenant: str
    session: int
    token: str
    """Told once: whoever takes the lease over has another."""


class Holder(Struct, frozen=True):
    """A turn that runs."""

    label: str
    """Its HTTP request's id, under which the scheduler knows it."""


def find_holder(connection: sqlite3.Connection, tenant: str, session: int, now: float) -> Holder | None:
    """The turn that runs in a session; None where none does, or none any more."""
    row = connection.execute(
        "SELECT owner, label, expires FROM leases WHERE tenant = ? AND session = ?", (tenant, session)
    ).fetchone()
    if row is None or row["expires"] <= now or not is_alive(row["owner"]):
        return None
    return Holder(row["label"])


def take(connection: sqlite3.Connection, tenant: str, session: int, label: str, now: float) -> Lease:
    """Begins a turn. Raises RequestError 409 while another one runs."""
    holder = find_holder(connection, tenant, session, now)
    if holder is not None:
        raise busy(session, holder)
    lease = Lease(tenant, session, secrets.token_hex(16))
    connection.execute(
        "INSERT OR REPLACE INTO leases (tenant, session, token, owner, label, expires) VALUES (?, ?, ?, ?, ?, ?)",
        (tenant, session, lease.token, this_process(os.getpid()), label, now + LIFETIME_S),
    )
    return lease


def busy(session: int, holder: Holder) -> RequestError:
    """The refusal of a second turn."""
    message = (
        f"session {session} is busy: request {holder.label} is still being answered; wait for it, or end it by a call "
        "with this session_id and cancel: true"
    )
    return RequestError(409, message, param="session_id", code="session_busy", retry_after_s=_RETRY_AFTER_S)


def renew(connection: sqlite3.Connection, tokens: list[str], now: float) -> None:
    """Says that these turns still run."""
    connection.executemany(
        "UPDATE leases SET expires = ? WHERE token = ?", [(now + LIFETIME_S, token) for token in tokens]
    )


def give_back(connection: sqlite3.Connection, lease: Lease) -> bool:
    """Ends a turn; False where the lease had been lost."""
    return bool(connection.execute("DELETE FROM leases WHERE token = ?", (lease.token,)).rowcount)


def sweep(connection: sqlite3.Connection, now: float) -> None:
    """Forgets the leases of processes that are gone."""
    for row in connection.execute("SELECT token, owner, expires FROM leases").fetchall():
        if row["expires"] <= now or not is_alive(row["owner"]):
            connection.execute("DELETE FROM leases WHERE token = ?", (row["token"],))


# --- processes -------------------------------------------------------------------------------------------


@cache
def this_process(pid: int) -> str:
    """Names the running process, whose pid this is, so that no later one has the same name."""
    return f"{_machine()} {pid} {_start_ticks(pid)}"


def is_alive(owner: str) -> bool:
    """Whether the process of that name runs. One of another container is taken to: its lease ends by itself."""
    boot, namespace, pid, ticks = owner.split(" ")
    own_boot, own_namespace = _machine().split(" ")
    if boot != own_boot:
        return False
    return namespace != own_namespace or _start_ticks(int(pid)) == int(ticks)


@cache
def _machine() -> str:
    """This boot of the kernel, and the namespace that pids are counted in."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _start_ticks(pid: int) -> int:
    """When the process started, in clock ticks since the boot; -1 where there is none, or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return -1
    return -1 if fields[0] in "ZX" else int(fields[19])
