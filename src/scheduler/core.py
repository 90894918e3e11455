"""Everything the scheduler decides, without a socket or a clock: the loop is the hands, this is the head.

Owns the book, the pool, the index and the plans in flight. Called by the loop; the property tests drive it
with a fake rank in virtual time.
"""

from dataclasses import dataclass, replace

from shoal.messages import Limits, Rejected, StepPlan, StepResult, Submit
from shoal.scheduler.admission import Gate, admit, unfit
from shoal.scheduler.apply import apply, crew_lost, finish
from shoal.scheduler.blocks import BlockPool
from shoal.scheduler.book import Book
from shoal.scheduler.pipeline import Flight, Pipeline
from shoal.scheduler.plan import Step, plan
from shoal.scheduler.prefix import PrefixIndex
from shoal.scheduler.request import Event, Request

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


@dataclass(frozen=True, slots=True)
class Collected:
    """What a result brought."""

    flight: Flight
    events: list[Event]


class Core:
    """The scheduler's state and the only ways to change it."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.book = Book(rules.instance_num)
        index = PrefixIndex(rules.block_size, rules.prefix_key, enabled=rules.prefix_caching)
        self.pool = BlockPool(0, index)
        self.pipeline = Pipeline()
        self.stale_rows = 0
        self.gate = Gate(None, rules.max_queued_requests, rules.max_queued_tokens)
        self.serving = False
        self._serial = 0

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

    def submit(
        self, frontend_no: int, submit: Submit, now_ns: int, tokens_per_s: float = 0.0
    ) -> Request | Rejected | None:
        """A request that waits now, or why not; None for one that is open already."""
        if self.book.find(frontend_no, submit.request_no):
            return None
        self._serial += 1
        outcome = admit(submit, frontend_no, self._serial, self.gate, self.book, now_ns, tokens_per_s)
        if isinstance(outcome, Request):
            self.book.enter(outcome)
        return outcome

    def cancel(self, frontend_no: int, request_no: int) -> list[Event]:
        """Ends a request; nothing where it has ended or never was."""
        request = self.book.find(frontend_no, request_no)
        return [finish(self.book, self.pool, request, "cancelled")] if request else []

    def cancel_frontend(self, frontend_no: int) -> list[Event]:
        """Ends everything of a frontend that has gone."""
        return [
            finish(self.book, self.pool, request, "cancelled") for request in self.book.of_frontend(frontend_no)
        ]

    def cancel_all(self) -> list[Event]:
        """Ends everything."""
        return [
            finish(self.book, self.pool, request, "cancelled", detail=SHUT_DOWN) for request in self.book.all()
        ]

    def expire(self, now_ns: int) -> list[Event]:
        """Ends what has passed its deadline, running or waiting."""
        late = self.book.expired(now_ns)
        return [finish(self.book, self.pool, request, "deadline") for request in late]

    def plan(self) -> Step | None:
        """The next step, if a crew is up, the pipeline has room and there is something to compute."""
        if not self.serving or not self.pipeline.has_room or not len(self.book):
            return None
        return plan(self.book, self.pool, self.rules.token_budget)

    def dispatch(self, step: Step, now_ns: int) -> StepPlan:
        """The step as the message to send to every rank; it is outstanding from now on."""
        return self.pipeline.send(step, now_ns)

    def collect(self, result: StepResult) -> Collected | None:
        """What a result brought; None where it answers no plan in flight. Raises ResultMismatch."""
        answered = self.pipeline.collect(result)
        if answered is None:
            return None
        flight, rows = answered
        events, stale = apply(self.book, self.pool, rows)
        self.stale_rows += stale
        return Collected(flight, events)

    def crew_up(self, crew_epoch: int, num_blocks: int) -> list[Event]:
        """A crew with empty memory serves from now on; ends what waits and would not fit any more."""
        self.serving = True
        self.pipeline.restart(crew_epoch)
        self.pool.reset(num_blocks)
        rules = self.rules
        limits = Limits(rules.session_len, num_blocks, rules.block_size, rules.instance_num)
        self.gate = replace(self.gate, limits=limits)
        waiting = [(request, unfit(request.limit, limits)) for request in list(self.book.waiting)]
        return [finish(self.book, self.pool, request, "failed", detail=why) for request, why in waiting if why]

    def crew_lost(self) -> list[Event]:
        """The crew is gone, with its memory and the plans in flight."""
        self.serving = False
        self.pipeline.restart(0)
        return crew_lost(self.book, self.pool)

    def discrepancy(self) -> str:
        """What does not add up in the pool; empty when all is well."""
        return self.pool.discrepancy(request.blocks for request in self.book.seated.values())
