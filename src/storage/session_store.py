"""The sessions as one process has them: begins and ends turns off the event loop, renews leases, forgets what expired.

The interactive route begins and ends turns through it, /v1/sessions reads, ``app.py`` runs ``keep``.
"""

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Final, TypeVar

from shoal.errors import RequestError
from shoal.storage import leases, sessions
from shoal.storage.leases import Holder, Lease
from shoal.storage.sessions import Ask, Begun, Ending, Entry, Replay, Session

_LOGGER: Final = logging.getLogger("shoal.storage")
_SWEEP_EVERY_S: Final = 60.0
_BUSY_PATIENCE_S: Final = 0.25
"""A client that hangs up and asks again at once may come before its first turn has ended."""
_BUSY_POLL_S: Final = 0.02

R = TypeVar("R")


class SessionStore:
    """Each process has its own; the file is opened at the first use."""

    def __init__(self, path: Path, ttl_s: float) -> None:
        """``ttl_s``: how long a session may lie unused; 0: for ever."""
        self._database = sessions.open_sessions(path)
        self._ttl_s = ttl_s
        self._held: set[str] = set()
        """Tokens of the leases of the turns that run in this process."""

    def check(self) -> None:
        """Before any fork. Raises StartError where the file is not usable."""
        self._database.check()

    # --- turns ---

    def ask(self, *, tenant: str, session: int, label: str, retryable: bool, digest: bytes) -> Ask:
        """A turn that wants to begin now."""
        now = time.time()
        return Ask(
            tenant=tenant, session=session, label=label, retryable=retryable, digest=digest, now=now,
            idle_since=self._idle_since(now),
        )  # fmt: skip

    async def begin(self, ask: Ask) -> Begun | Replay:
        """Takes the session for one turn; it must be ended, or given up. RequestError 409 while another one runs."""
        deadline_s = time.monotonic() + _BUSY_PATIENCE_S
        while True:
            try:
                return await self._begin(ask)
            except RequestError as error:
                if error.status != 409 or time.monotonic() > deadline_s:
                    raise
            await asyncio.sleep(_BUSY_POLL_S)

    async def end(self, ending: Ending) -> None:
        """Records a turn, also when the caller is cancelled meanwhile. RequestError 503 where that fails: then nothing
        is recorded, and the turn is over all the same."""
        await asyncio.shield(asyncio.wrap_future(self.end_soon(ending)))

    def end_soon(self, ending: Ending) -> "Future[None]":
        """``end`` for a caller that cannot wait."""
        lease = ending.begun.lease

        def settle(done: "Future[None]") -> None:
            error = done.exception()
            if error is not None:
                _LOGGER.error("session turn not recorded session=%d: %s", lease.session, error)
                self.give_up(lease)
            else:
                self._held.discard(lease.token)

        future = self._database.submit(lambda connection: sessions.end(connection, ending))
        future.add_done_callback(settle)
        return future

    def give_up(self, lease: Lease) -> None:
        """Ends a turn that leaves nothing behind; may come for one that has ended. Returns at once."""
        self._held.discard(lease.token)
        self._database.post(lambda connection: leases.give_back(connection, lease))

    async def find_holder(self, tenant: str, session: int) -> Holder | None:
        """The turn that runs in a session, in whichever process."""
        return await self._run(lambda connection: leases.find_holder(connection, tenant, session, time.time()))

    async def _begin(self, ask: Ask) -> Begun | Replay:
        future = self._database.submit(lambda connection: sessions.begin(connection, ask))
        try:
            begun = await asyncio.shield(asyncio.wrap_future(future))
        except asyncio.CancelledError:
            future.add_done_callback(self._give_up_begun)
            raise
        if isinstance(begun, Begun):
            self._held.add(begun.lease.token)
        return begun

    def _give_up_begun(self, done: "Future[Begun | Replay]") -> None:
        begun = None if done.exception() is not None else done.result()
        if isinstance(begun, Begun):
            self.give_up(begun.lease)

    # --- sessions ---

    async def read(self, tenant: str, session: int) -> tuple[Session, list[Entry]] | None:
        """A session with its messages."""
        now = time.time()

        def work(connection: sqlite3.Connection) -> tuple[Session, list[Entry]] | None:
            found = sessions.find(connection, tenant, session, self._idle_since(now), now)
            return None if found is None else (found, sessions.read_entries(connection, tenant, session))

        return await self._run(work)

    async def list_sessions(
        self, tenant: str, *, after: int | None, descending: bool, limit: int
    ) -> list[Session]:
        """The tenant's sessions; see ``sessions.list_sessions``."""
        now = time.time()
        return await self._run(
            lambda connection: sessions.list_sessions(
                connection, tenant, after=after, descending=descending, limit=limit,
                idle_since=self._idle_since(now), now=now,
            )
        )  # fmt: skip

    async def delete(self, tenant: str, session: int) -> bool:
        """Whether there was such a session. RequestError 409 while a turn runs in it."""
        return await self._run(lambda connection: sessions.delete(connection, tenant, session, time.time()))

    async def delete_all(self, tenant: str) -> tuple[int, int]:
        """How many went, and how many stayed because a turn runs in them."""
        return await self._run(lambda connection: sessions.delete_all(connection, tenant, time.time()))

    def expires(self, session: Session) -> float | None:
        """Unix time in seconds; None: never."""
        return session.updated + self._ttl_s if self._ttl_s else None

    # --- upkeep ---

    async def keep(self) -> None:
        """Until cancelled: renews the leases of running turns and, less often, forgets what expired."""
        sweep_at_s = 0.0
        while True:
            with contextlib.suppress(RequestError):  # logged by ``_upkeep``; the next round tries again
                if time.monotonic() >= sweep_at_s:
                    sweep_at_s = time.monotonic() + _SWEEP_EVERY_S
                    await self._upkeep(self._sweep)
                if self._held:
                    await self._upkeep(self._renew)
            await asyncio.sleep(leases.RENEW_EVERY_S)

    async def _upkeep(self, work: Callable[[sqlite3.Connection], None]) -> None:
        try:
            await self._run(work)
        except RequestError as error:
            _LOGGER.error("sessions: %s", error.message)
            raise

    def _sweep(self, connection: sqlite3.Connection) -> None:
        now = time.time()
        gone = sessions.sweep(connection, self._idle_since(now), now)
        if gone:
            _LOGGER.info("sessions expired count=%d", gone)

    def _renew(self, connection: sqlite3.Connection) -> None:
        leases.renew(connection, [*self._held], time.time())

    def _idle_since(self, now: float) -> float:
        return now - self._ttl_s if self._ttl_s else 0.0

    async def _run(self, work: Callable[[sqlite3.Connection], R]) -> R:
        return await self._database.run(work)
