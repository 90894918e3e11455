"""Everything the scheduler decides, without a socket or a clock: the loop is the hands, this is the head.

Owns the book, the pool, the index and the plans in flight. Called by the loop; the property tests drive it
with a fake rank in virtual time.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from shoal.messages import FinishReason, Limits, OpenRequest, Rejected, StepPlan, StepResult, Submit
from shoal.scheduler.admission import Gate, Speed, admit, unfit
from shoal.scheduler.apply import apply, crew_lost, finish, preempt, read
from shoal.scheduler.blocks import BlockPool
from shoal.scheduler.book import Book
from shoal.scheduler.pipeline import Flight, Pipeline
from shoal.scheduler.plan import Step, plan
from shoal.scheduler.prefix import PrefixIndex
from shoal.scheduler.quota import Quota, Quotas
from shoal.scheduler.request import Emitted, Event, Group, Request, State
from shoal.scheduler.suspects import Suspects

_UNMEASURED = Speed()
SHUT_DOWN = "the server shut down before this answer was complete; send the request again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The settings that decisions depend on."""

    instance_num: int
    session_len: int
    block_size: int
    token_budget: int
    max_queued_requests: int
    max_queued_tokens: int
    prefix_caching: bool = True
    prefix_key: bytes
    quotas: Mapping[str, Quota] = field(default_factory=dict)
    """tenant → its limits."""
    max_concurrent_requests: int = 0
    """Open HTTP requests of everybody together; 0: any number."""


@dataclass(frozen=True, slots=True)
class Collected:
    """What a result brought."""

    flight: Flight
    accepted: int
    """Drafts that proved right."""
    events: list[Event]


class Core:
    """The scheduler's state and the only ways to change it."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.book = Book(rules.instance_num, Quotas(rules.quotas, rules.max_concurrent_requests))
        index = PrefixIndex(rules.block_size, rules.prefix_key, enabled=rules.prefix_caching)
        self.pool = BlockPool(0, index)
        self.pipeline = Pipeline()
        self._suspects = Suspects(self.book.waiting)
        self.stale_rows = 0
        self.gate = Gate(None, rules.max_queued_requests, rules.max_queued_tokens)
        self.serving = False
        self._serial = 0
        self._most_drafts = 0

    @property
    def limits(self) -> Limits | None:
        """What requests are held against; None until a crew has been up."""
        return self.gate.limits

    @property
    def draining(self) -> bool:
        """Whether new submits are refused."""
        return self.gate.draining

    def drain(self) -> None:
        """From now on nothing new is accepted."""
        self.gate = replace(self.gate, draining=True)

    def rest(self, level: int) -> None:
        """From now on the model sleeps, or is on its way: nothing new is accepted; at level 0 it is again."""
        self.gate = replace(self.gate, asleep=level)

    def submit(
        self, frontend_no: int, submit: Submit, now_ns: int, speed: Speed = _UNMEASURED
    ) -> Request | Rejected | None:
        """A request that waits now, or why not; None for one that is open already."""
        if self.book.find(frontend_no, submit.request_no):
            return None
        self._serial += 1
        outcome = admit(submit, frontend_no, self._serial, self.gate, self.book, now_ns, speed)
        if isinstance(outcome, Request):
            self.book.enter(outcome)
        return outcome

    def cancel(self, frontend_no: int, request_no: int) -> list[Event]:
        """Ends a request; nothing where it has ended or never was."""
        request = self.book.find(frontend_no, request_no)
        return [finish(self.book, self.pool, request, "cancelled")] if request else []

    def cancel_frontend(self, frontend_no: int) -> list[Event]:
        """Ends everything of a frontend that has gone."""
        self.book.quotas.forget(frontend_no)
        return self._end(self.book.of_frontend(frontend_no), "cancelled")

    def cancel_all(self) -> list[Event]:
        """Ends everything."""
        return self._end(self.book.all(), "cancelled", SHUT_DOWN)

    def abort(self, label: str, tenant: str | None) -> tuple[list[Event], int]:
        """Ends the HTTP requests of that label, of any label where it is empty; of one tenant, or of any where that
        is None. Their clients get what there is. How many HTTP requests they were is the second of the pair."""
        named = [
            request
            for request in self.book.all()
            if label in ("", request.label) and tenant in (None, request.tenant)
        ]
        return self._end(named, "aborted"), len({request.group for request in named})

    def survey(self, tenant: str | None, now_ns: int) -> tuple[OpenRequest, ...]:
        """The open HTTP requests of one tenant, or of all, the oldest first."""
        groups: dict[Group, list[Request]] = {}
        for request in self.book.all():
            if tenant in (None, request.tenant):
                groups.setdefault(request.group, []).append(request)
        oldest_first = sorted(groups.values(), key=lambda sequences: sequences[0].arrival_ns)
        return tuple(_described(sequences, now_ns) for sequences in oldest_first)

    def expire(self, now_ns: int) -> list[Event]:
        """Ends what has passed its deadline, running or waiting."""
        return self._end(self.book.expired(now_ns), "deadline")

    def plan(self) -> Step | None:
        """The next step, if a crew is up, the pipeline has room and there is something to compute."""
        if not self.serving or not self.pipeline.has_room or not len(self.book):
            return None
        self._suspects.review()
        for request in self._suspects.bystanders(self.book.seated.values()):
            preempt(self.book, self.pool, request)
        return plan(self.book, self.pool, self.rules.token_budget, self._most_drafts)

    def dispatch(self, step: Step, now_ns: int) -> StepPlan:
        """The step as the message to send to every rank; it is outstanding from now on."""
        return self.pipeline.send(step, now_ns)

    def collect(self, result: StepResult) -> Collected | None:
        """What a result brought; None where it answers no plan in flight. Raises ResultMismatch."""
        answered = self.pipeline.collect(result)
        if answered is None:
            return None
        flight, rows = answered
        readings = read(self.book, result.scored, result.pooled)
        events, stale = apply(self.book, self.pool, rows)
        self.stale_rows += stale
        for event in events:
            if isinstance(event, Emitted):
                self.book.quotas.spend(event.request.tenant, 1)
        return Collected(flight, sum(len(row.tokens) - 1 for row in rows), readings + events)

    def crew_up(self, crew_epoch: int, num_blocks: int, most_drafts: int = 0) -> list[Event]:
        """A crew with empty memory serves from now on, and may guess so many tokens of a sequence; ends what waits and
        would not fit any more."""
        self.serving = True
        self._most_drafts = most_drafts
        self.pipeline.restart(crew_epoch)
        self.pool.reset(num_blocks)
        rules = self.rules
        limits = Limits(rules.session_len, num_blocks, rules.block_size, rules.instance_num)
        self.gate = replace(self.gate, limits=limits)
        waiting = [
            (request, unfit(request.limit, limits, bool(request.pooling)))
            for request in list(self.book.waiting)
        ]
        return [finish(self.book, self.pool, request, "failed", detail=why) for request, why in waiting if why]

    def crew_lost(self) -> list[Event]:
        """The crew is gone, or rests, with its memory and the plans in flight. What ran will be computed again; see
        suspects.py for what does not go on."""
        computed = [request for seat in self.pipeline.seats if (request := self.book.owner(*seat))]
        self.serving = False
        self.pipeline.restart(0)
        return crew_lost(self.book, self.pool, self._suspects.accuse(computed))

    def discrepancy(self) -> str:
        """What does not add up in the pool or the accounts; empty when all is well."""
        blocks = self.pool.discrepancy(request.blocks for request in self.book.seated.values())
        return blocks or self.book.quotas.discrepancy(self.book.all())

    def _end(self, requests: Iterable[Request], reason: FinishReason, detail: str = "") -> list[Event]:
        return [finish(self.book, self.pool, request, reason, detail=detail) for request in requests]


def _described(sequences: list[Request], now_ns: int) -> OpenRequest:
    first = sequences[0]
    running = sum(request.state is State.RUNNING for request in sequences)
    return OpenRequest(
        label=first.label,
        tenant=first.tenant,
        priority=first.priority,
        running=running,
        waiting=len(sequences) - running,
        prompt_tokens=sum(request.prompt_len for request in sequences),
        generated_tokens=sum(request.generated for request in sequences),
        age_ms=(now_ns - first.arrival_ns) // 1_000_000,
    )
