"""Whose turn it is: the waiting requests in order of priority, then of how little their tenant was served, then of
arrival. Owned by the book; called by it and by plan.

Tenants share by virtual token counters (Sheng et al. 2024, "Fairness in Serving Large Language Models"): each computed
token raises its tenant's count, and the lowest count goes first. Who had nothing open begins at the lowest count of
those who have, so that idle time saves up no credit; a debt is kept until nobody has anything open.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from heapq import heapify, heappop, heappush

from shoal.scheduler.request import Request, State

Order = tuple[int, int, int]


class Shares:
    """Tokens computed, by tenant."""

    def __init__(self) -> None:
        self._served: dict[str, int] = {}
        self._open: Counter[str] = Counter()

    def enter(self, tenant: str) -> None:
        """One more open request."""
        if not self._open[tenant]:
            least = min((self._served[other] for other, count in self._open.items() if count), default=0)
            self._served[tenant] = max(self._served.get(tenant, 0), least)
        self._open[tenant] += 1

    def leave(self, tenant: str) -> None:
        """One fewer; where it was the last of all, everybody begins anew."""
        self._open[tenant] -= 1
        if not self._open[tenant]:
            del self._open[tenant]
        if not self._open:
            self._served.clear()

    def charge(self, tenant: str, tokens: int) -> None:
        """Tokens were planned; negative ones were planned and will not be computed."""
        self._served[tenant] += tokens

    def served(self, tenant: str) -> int:
        """The tenant's count; only differences mean anything."""
        return self._served.get(tenant, 0)


class FairQueue:
    """Waiting requests."""

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        self._lines: dict[int, dict[str, list[Request]]] = {}
        """priority → tenant → in order of arrival; no line is empty."""
        self._length = 0
        self._allowed: Container[Request] | None = None
        """Whose turn it may be; None: everybody's."""
        self._held: dict[Request, None] = {}
        """The others."""

    def __len__(self) -> int:
        return self._length + len(self._held)

    def __iter__(self) -> Iterator[Request]:
        yield from (request for lines in self._lines.values() for line in lines.values() for request in line)
        yield from self._held

    def restrict(self, allowed: Container[Request] | None) -> None:
        """From now on it is the turn of these alone; of all where None. The container may shrink meanwhile."""
        requests = list(self)
        self._lines, self._length, self._held, self._allowed = {}, 0, {}, allowed
        for request in requests:
            self.add(request)

    def add(self, request: Request) -> None:
        """To its place in its tenant's line."""
        if self._allowed is not None and request not in self._allowed:
            self._held[request] = None
            return
        lines = self._lines.setdefault(request.priority, {})
        insort(lines.setdefault(request.tenant, []), request, key=_order)
        self._length += 1

    def remove(self, request: Request) -> None:
        """Out of its line."""
        if request in self._held:
            del self._held[request]
            return
        lines = self._lines[request.priority]
        line = lines[request.tenant]
        del line[bisect_left(line, request.order, key=_order)]
        self._length -= 1
        if not line:
            del lines[request.tenant]
        if not lines:
            del self._lines[request.priority]

    def first(self) -> Request | None:
        """Whose turn it is."""
        if not self._lines:
            return None
        lines = self._lines[min(self._lines)]
        return min((line[0] for line in lines.values()), key=self.rank)

    def rank(self, request: Request) -> tuple[int, int, Order]:
        """Sorts requests, waiting or not, by whose turn it is."""
        return request.priority, self._shares.served(request.tenant), request.order

    def in_turn(self, prompts: Iterable[Request], spare: int, most_waiting: int) -> Iterator[Request]:
        """The running ``prompts`` and up to so many waiting requests: who may take from ``spare`` tokens next.

        Tenants take turns as if each had been served what its requests before need. In one tenant's line those that
        ``spare`` suffices for go first, then the running ones, then who came first.
        """
        running: dict[int, dict[str, list[Request]]] = {}
        for request in prompts:
            running.setdefault(request.priority, {}).setdefault(request.tenant, []).append(request)
        for priority in sorted({*running, *self._lines}):
            for request in self._merged(priority, running.get(priority, {}), spare, most_waiting):
                if request.state is State.WAITING:
                    if not most_waiting:
                        continue
                    most_waiting -= 1
                yield request

    def _merged(
        self, priority: int, running: dict[str, list[Request]], spare: int, most: int
    ) -> Iterator[Request]:
        waiting = self._lines.get(priority, {}) if most else {}
        opened: dict[str, list[Request]] = {}
        turns = [
            (self._shares.served(tenant), _foremost(running.get(tenant), waiting.get(tenant)), tenant)
            for tenant in {*running, *waiting}
        ]
        heapify(turns)
        while turns:
            served, _, tenant = heappop(turns)
            if tenant not in opened:
                # What was preempted since this began stands in both.
                line = dict.fromkeys([*running.get(tenant, ()), *waiting.get(tenant, ())[:most]])
                opened[tenant] = sorted(line, key=lambda each: _eagerness(each, spare), reverse=True)
            request = opened[tenant].pop()
            cost = min(_cost(request), spare)
            yield request
            if opened[tenant]:
                heappush(turns, (served + cost, opened[tenant][-1].order, tenant))


def _order(request: Request) -> Order:
    return request.order


def _foremost(*lines: list[Request] | None) -> Order:
    return min(request.order for line in lines if line for request in line[:1])


def _cost(request: Request) -> int:
    return request.known if request.state is State.WAITING else request.todo


def _eagerness(request: Request, spare: int) -> tuple[bool, bool, Order]:
    return _cost(request) > spare, request.state is State.WAITING, request.order
