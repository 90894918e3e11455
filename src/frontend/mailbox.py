"""Where one HTTP exchange waits for news of its sequences.

``Switchboard`` puts, ``Generation`` takes; both run on the same event loop. A mailbox is read by one task.
"""

import asyncio

from msgspec import Struct

from shoal.messages import Finished, PooledVector, Rejected, ScoredPrompt, TokenRun


class Lost(Struct, frozen=True):
    """The scheduler that carried the sequence is gone, or its tokens did not arrive whole."""

    code: str
    detail: str


News = TokenRun | ScoredPrompt | PooledVector | Finished | Rejected | Lost


class Mailbox:
    """An unbounded queue that hands over all it has at once."""

    __slots__ = ("_items", "_waiter")

    def __init__(self) -> None:
        self._items: list[tuple[int, News]] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, index: int, news: News) -> None:
        """Adds news of the choice ``index``."""
        self._items.append((index, news))
        self._wake()

    async def take(self, patience_s: float | None = None) -> list[tuple[int, News]]:
        """All that has come since the last call; waits for something, or until patience is over (then: [])."""
        if not self._items:
            await self._wait(patience_s)
        items, self._items = self._items, []
        return items

    async def peek(self, patience_s: float) -> list[tuple[int, News]]:
        """What the next ``take`` will begin with."""
        if not self._items:
            await self._wait(patience_s)
        return self._items

    async def _wait(self, patience_s: float | None) -> None:
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = None if patience_s is None else loop.call_later(patience_s, self._wake)
        try:
            await self._waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
