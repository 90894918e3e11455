"""Who may have brought a crew down, and how that is found out. Pure; called by core.

Whoever was in a plan in flight when a crew died is a suspect. All are computed again; where the crew dies once more
before they have got past the place where they were, one half of them and then the other, while everybody else waits,
those too that are cleared already; and so on. Only a request with which alone a crew has died ``MOST_DEATHS`` times in
a row fails: nobody does for having been in the same batch, nor because somebody killed a process once.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from shoal.scheduler.fairness import FairQueue
from shoal.scheduler.request import Request, State

MOST_DEATHS = 3

_Places = dict[Request, int]
"""Suspect → how many tokens may have existed of it when the crew died: with more it is cleared."""


@dataclass(frozen=True, slots=True)
class _Trial:
    suspects: _Places
    alone: bool
    """Nobody else is seated until all are cleared."""


class Suspects:
    """Trials, one after the other; those that wait meanwhile are held back in ``waiting``."""

    def __init__(self, waiting: FairQueue) -> None:
        self._waiting = waiting
        self._trial = _Trial({}, alone=False)
        self._next: deque[_Trial] = deque()

    def accuse(self, computed: Iterable[Request]) -> Request | None:
        """A crew died over these, which are still seated. The one that is to fail for it, if any."""
        places, before = {request: request.virtual for request in computed}, self._trial.suspects
        again = {request: before[request] for request in places if request in before}
        accused = again or places
        if not accused:
            return None
        culprit, trials = None, _halves(again) if again else [_Trial(places, alone=False)]
        if len(accused) == 1:
            (request,) = accused
            request.deaths += 1
            if request.deaths >= MOST_DEATHS:
                culprit, trials = request, []
        untried = {request: place for request, place in before.items() if request not in accused}
        if untried:
            trials.append(_Trial(untried, self._trial.alone))
        self._next.extendleft(reversed(trials))
        self._begin()
        return culprit

    def review(self) -> None:
        """Clears those that have got past the place where a crew died; the next trial begins once all of one are."""
        suspects = self._trial.suspects
        if not suspects:
            return
        for request in [each for each, place in suspects.items() if _is_past(each, place)]:
            request.deaths = 0
            del suspects[request]
        if not suspects:
            self._begin()

    def bystanders(self, seated: Iterable[Request]) -> list[Request]:
        """Who must not run now, so that what becomes of the crew is the doing of those on trial."""
        return [each for each in seated if each not in self._trial.suspects] if self._trial.alone else []

    def _begin(self) -> None:
        self._trial = self._next.popleft() if self._next else _Trial({}, alone=False)
        self._waiting.restrict(self._trial.suspects if self._trial.alone else None)
        self.review()


def _halves(accused: _Places) -> list[_Trial]:
    items = list(accused.items())
    middle = len(items) // 2
    return [_Trial(dict(half), alone=True) for half in (items[:middle], items[middle:]) if half]


def _is_past(request: Request, place: int) -> bool:
    return request.state is State.DONE or request.known > place
