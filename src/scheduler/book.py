"""Who waits, who sits in which slot, and what the ranks have not been told of yet.

The only owner of slots and queues. Called by plan, apply and core; holds no blocks and makes no decisions.
"""

from heapq import heapify, heappop, heappush

from shoal.scheduler.fairness import FairQueue, Shares
from shoal.scheduler.quota import Quotas
from shoal.scheduler.request import Request, State

Key = tuple[int, int]


class Book:
    """Every request that has not ended."""

    def __init__(self, instance_num: int, quotas: Quotas) -> None:
        self.shares = Shares()
        self.waiting = FairQueue(self.shares)
        self.quotas = quotas
        self.seated: dict[int, Request] = {}
        """slot → its owner."""
        self.arriving: dict[Request, None] = {}
        """Seated, and the ranks have not been told of it yet."""
        self.queued_tokens = 0
        self.plans = 0
        """Plans made so far."""
        self._turns = 0
        self._requests: dict[Key, Request] = {}
        self._epochs = [0] * instance_num
        self._free_slots = list(range(instance_num - 1, -1, -1))
        self._leaving: list[int] = []
        self._deadlines: list[tuple[int, int, Request]] = []

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def free_slots(self) -> int:
        """How many more sequences may run."""
        return len(self._free_slots)

    def find(self, frontend_no: int, request_no: int) -> Request | None:
        """The request, unless it has ended or never was."""
        return self._requests.get((frontend_no, request_no))

    def of_frontend(self, frontend_no: int) -> list[Request]:
        """Everything a frontend has open."""
        return [request for (owner, _), request in self._requests.items() if owner == frontend_no]

    def all(self) -> list[Request]:
        """Everything open."""
        return list(self._requests.values())

    def owner(self, slot: int, epoch: int) -> Request | None:
        """Who sits in the slot, if it still is who sat there in that epoch."""
        request = self.seated.get(slot)
        return request if request is not None and request.epoch == epoch else None

    def enter(self, request: Request) -> None:
        """A new request joins the queue."""
        self._requests[request.frontend_no, request.request_no] = request
        self.shares.enter(request.tenant)
        self.quotas.enter(request)
        if request.deadline_ns:
            heappush(self._deadlines, (request.deadline_ns, request.serial, request))
        self._queue(request)

    def seat(self, request: Request) -> None:
        """From the queue into a free slot, whose epoch rises."""
        self._unqueue(request)
        slot = self._free_slots.pop()
        self._epochs[slot] = self._raised(self._epochs[slot])
        request.slot, request.epoch = slot, self._epochs[slot]
        request.state = State.RUNNING
        self.seated[slot] = request
        self.arriving[request] = None

    def unseat(self, request: Request) -> None:
        """Out of the slot and back to the queue."""
        self._vacate(request)
        request.state = State.WAITING
        self._queue(request)

    def close(self, request: Request) -> None:
        """Out of the book, wherever it stands."""
        if request.state is State.WAITING:
            self._unqueue(request)
        else:
            self._vacate(request)
        request.state = State.DONE
        del self._requests[request.frontend_no, request.request_no]
        self.shares.leave(request.tenant)
        self.quotas.leave(request)

    def serve(self, request: Request, tokens: int) -> None:
        """So many tokens of the request will be computed: its tenant pays, and it was served last of all."""
        self.shares.charge(request.tenant, tokens)
        self._turns += 1
        request.served_at = self._turns

    def serve_more(self, request: Request, tokens: int) -> None:
        """So many drafts of the request proved right: its tenant pays for them too."""
        self.shares.charge(request.tenant, tokens)

    def take_back(self, request: Request, tokens: int) -> None:
        """They will not be computed after all."""
        self.shares.charge(request.tenant, -tokens)

    def tell_ranks(self) -> tuple[tuple[int, ...], tuple[Request, ...]]:
        """Slots that end on the ranks and requests that take one, since the last call."""
        told = tuple(self._leaving), tuple(self.arriving)
        self._leaving.clear()
        self.arriving.clear()
        return told

    def forget_ranks(self) -> None:
        """The ranks remember no slot any more."""
        self._leaving.clear()
        self.arriving.clear()

    def expired(self, now_ns: int) -> list[Request]:
        """Open requests whose deadline has passed; each is returned once."""
        late = []
        while self._deadlines and self._deadlines[0][0] <= now_ns:
            request = heappop(self._deadlines)[2]
            if request.state is not State.DONE:
                late.append(request)
        return late

    def next_deadline_ns(self) -> int | None:
        """When the first open request expires."""
        while self._deadlines and self._deadlines[0][2].state is State.DONE:
            heappop(self._deadlines)
        if len(self._deadlines) > 2 * len(self._requests) + 64:
            self._deadlines = [entry for entry in self._deadlines if entry[2].state is not State.DONE]
            heapify(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    @staticmethod
    def _raised(epoch: int) -> int:
        return epoch + 1

    def _queue(self, request: Request) -> None:
        self.waiting.add(request)
        self.queued_tokens += request.known

    def _unqueue(self, request: Request) -> None:
        self.waiting.remove(request)
        self.queued_tokens -= request.known

    def _vacate(self, request: Request) -> None:
        del self.seated[request.slot]
        self._free_slots.append(request.slot)
        if request in self.arriving:
            del self.arriving[request]
        else:
            self._leaving.append(request.slot)
        request.slot = -1
