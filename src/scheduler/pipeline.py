"""The plans in flight: step numbers, and which result answers which plan. Called by core.

At most two plans are outstanding, so that a rank finds the next one waiting. Results come in order; one that
answers no outstanding plan is dropped and counted. One that answers a plan with other rows than it asked for
means that scheduler and ranks disagree about who sits where: that crew is lost.
"""

from collections import deque
from dataclasses import dataclass

from shoal.messages import StepPlan, StepResult
from shoal.scheduler.plan import Step, message
from shoal.scheduler.request import Sampled
from shoal.wire import unpack_ids

DEPTH = 2


class ResultMismatch(Exception):
    """A result that does not fit the plan it names."""


@dataclass(frozen=True, slots=True)
class Flight:
    """A plan that has been sent and not been answered."""

    step_id: int
    expected: frozenset[tuple[int, int]]
    """(slot, epoch) of the rows that sample."""
    rows: int
    tokens: int
    sent_ns: int


class Pipeline:
    """Plans in flight of one crew epoch; step ids rise for the whole life of the scheduler."""

    def __init__(self) -> None:
        self.crew_epoch = 0
        self.last_step_id = 0
        self.stale_results = 0
        self._flights: deque[Flight] = deque()

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def has_room(self) -> bool:
        """Whether another plan may leave."""
        return len(self._flights) < DEPTH

    @property
    def oldest_sent_ns(self) -> int | None:
        """When the plan that is waited for longest was sent."""
        return self._flights[0].sent_ns if self._flights else None

    def restart(self, crew_epoch: int) -> None:
        """Another crew: what was in flight is lost."""
        self.crew_epoch = crew_epoch
        self._flights.clear()

    def send(self, step: Step, now_ns: int) -> StepPlan:
        """Numbers a step, remembers it as outstanding and returns it as a message."""
        self.last_step_id += 1
        expected = frozenset((row.slot, row.epoch) for row in step.rows if row.samples)
        self._flights.append(Flight(self.last_step_id, expected, len(step.rows), step.tokens, now_ns))
        return message(step, self.crew_epoch, self.last_step_id)

    def collect(self, result: StepResult) -> tuple[Flight, list[Sampled]] | None:
        """The plan that ``result`` answers and its rows; None for a late, double or out-of-order result."""
        wanted = self._flights[0].step_id if self._flights else None
        if result.crew_epoch != self.crew_epoch or result.step_id != wanted:
            self.stale_results += 1
            return None
        rows = _rows(result)
        flight = self._flights[0]
        named = {(row.slot, row.epoch) for row in rows}
        if named != flight.expected or len(rows) != len(named):
            raise ResultMismatch(
                f"the result of step {result.step_id} names rows {sorted(named)}, "
                f"the plan asked for {sorted(flight.expected)}"
            )
        self._flights.popleft()
        return flight, rows


def _rows(result: StepResult) -> list[Sampled]:
    try:
        slots, epochs, ids = (unpack_ids(raw) for raw in (result.slots, result.epochs, result.ids))
        logprobs = result.logprobs or (None,) * len(slots)
        return [Sampled(*row) for row in zip(slots, epochs, ids, logprobs, strict=True)]
    except ValueError as error:
        raise ResultMismatch(f"the arrays of step {result.step_id} do not fit together: {error}") from error
