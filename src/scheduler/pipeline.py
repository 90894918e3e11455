"""The plans in flight: step numbers, and which result answers which plan. Called by core.

At most two plans are outstanding, so that a rank finds the next one waiting; where several sequences may have guesses,
one: such a step is long beside the scheduler's turn, and who arrives meanwhile would wait for two. Results come in
order; one that answers no outstanding plan is dropped and counted. One that answers a plan with other rows than it
asked for means that scheduler and ranks disagree about who sits where: that crew is lost.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from shoal.messages import StepPlan, StepResult, TokenLogprob
from shoal.scheduler.plan import Step, message
from shoal.scheduler.request import Sampled
from shoal.wire import unpack_ids

DEPTH = 2
_SEVERAL = 4
"""Sequences with guesses whose step is not followed by another before its result."""


class ResultMismatch(Exception):
    """A result that does not fit the plan it names."""


@dataclass(frozen=True, slots=True)
class Flight:
    """A plan that has been sent and not been answered."""

    step_id: int
    drafts: dict[tuple[int, int], int]
    """(slot, epoch) of the rows that sample → how many drafts each may have."""
    seats: tuple[tuple[int, int], ...]
    """(slot, epoch) of all rows."""
    tokens: int
    """Without drafts."""
    sent_ns: int

    @property
    def rows(self) -> int:
        """How many sequences it computes something of."""
        return len(self.seats)


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
        alone = any(flight.rows >= _SEVERAL and any(flight.drafts.values()) for flight in self._flights)
        return not alone and len(self._flights) < DEPTH

    @property
    def oldest_sent_ns(self) -> int | None:
        """When the plan that is waited for longest was sent."""
        return self._flights[0].sent_ns if self._flights else None

    @property
    def seats(self) -> Iterable[tuple[int, int]]:
        """(slot, epoch) of all rows in flight, each once."""
        return dict.fromkeys(seat for flight in self._flights for seat in flight.seats)

    def restart(self, crew_epoch: int) -> None:
        """Another crew: what was in flight is lost."""
        self.crew_epoch = crew_epoch
        self._flights.clear()

    def send(self, step: Step, now_ns: int) -> StepPlan:
        """Numbers a step, remembers it as outstanding and returns it as a message."""
        self.last_step_id += 1
        drafts = {(row.slot, row.epoch): row.drafts for row in step.rows if row.samples}
        seats = tuple((row.slot, row.epoch) for row in step.rows)
        self._flights.append(Flight(self.last_step_id, drafts, seats, step.tokens, now_ns))
        return message(step, self.crew_epoch, self.last_step_id)

    def collect(self, result: StepResult) -> tuple[Flight, list[Sampled]] | None:
        """The plan that ``result`` answers and its rows; None for a late, double or out-of-order result."""
        wanted = self._flights[0].step_id if self._flights else None
        if result.crew_epoch != self.crew_epoch or result.step_id != wanted:
            self.stale_results += 1
            return None
        flight = self._flights[0]
        rows = _rows(result, flight)
        self._flights.popleft()
        return flight, rows


def _rows(result: StepResult, flight: Flight) -> list[Sampled]:
    """A row for each that the plan asked for, with no more tokens than it allowed. Raises ResultMismatch."""
    try:
        slots, epochs, ids = (unpack_ids(raw) for raw in (result.slots, result.epochs, result.ids))
        logprobs = result.logprobs or (None,) * len(slots)
        drawn: dict[tuple[int, int], list[tuple[int, TokenLogprob | None]]] = {}
        for slot, epoch, token_id, logprob in zip(slots, epochs, ids, logprobs, strict=True):
            drawn.setdefault((slot, epoch), []).append((token_id, logprob))
    except ValueError as error:
        raise ResultMismatch(f"the arrays of step {result.step_id} do not fit together: {error}") from error
    most = {key: drafts + 1 for key, drafts in flight.drafts.items()}
    if drawn.keys() != most.keys() or any(len(tokens) > most[key] for key, tokens in drawn.items()):
        named = {key: len(tokens) for key, tokens in drawn.items()}
        raise ResultMismatch(
            f"the result of step {result.step_id} names rows with so many tokens {named}, the plan asked for at most "
            f"{most}"
        )
    return [
        Sampled(slot, epoch, tuple(tokens), flight.drafts[slot, epoch])
        for (slot, epoch), tokens in drawn.items()
    ]
