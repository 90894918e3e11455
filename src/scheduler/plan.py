"""What the next step computes. Pure: no socket, no clock; only the book, the pool and the index change.

Decodes first, one token each; then chunks of prompts, running and waiting ones, in turn (priority, then the tenant
that was served least, then arrival; see fairness.py), until the token budget, the slots or the blocks run out. Four
rules keep everybody moving:

* Where decodes would eat the whole budget while a prompt waits, a quarter of it is kept for prompts, and the
  decodes that were served least recently go first.
* The first prompt in turn may always take half of what the decodes left; the other half goes to those behind
  it, of each tenant the ones that finish within this step first. So a short late prompt is not held up by a long
  early one.
* What is left at the end may be spent on guesses: tokens that the ranks find by looking their sequence's last ones
  up in what came before, and that they compute along with it (Saxena 2023, prompt lookup decoding).
* Out of blocks, a running sequence makes room by preempting the last in order, never one ahead of itself; a
  waiting one only preempts lower priorities, and enters only when its whole prompt fits beside what the
  running ones still need.

Called by core.
"""

from dataclasses import dataclass, replace

from shoal.messages import Seat, StepPlan
from shoal.scheduler.apply import preempt
from shoal.scheduler.blocks import BlockPool
from shoal.scheduler.book import Book
from shoal.scheduler.request import Request, State, blocks_for, youngest
from shoal.wire import pack_ids

_PROMPT_SHARE = 4
"""One part in so many of the budget is kept for prompts when decodes fill it."""
_LOOKAHEAD = 32
"""How many waiting requests are considered behind the first."""


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens [start, start + count) of one sequence."""

    request: Request
    slot: int
    epoch: int
    start: int
    """-1: the last known token, wherever plans in flight put it."""
    count: int
    samples: bool
    new_blocks: tuple[int, ...]
    drafts: int = 0
    """How many tokens the ranks may guess and compute behind the last."""


@dataclass(frozen=True, slots=True)
class Step:
    """A decided step."""

    leave: tuple[int, ...]
    admitted: tuple[Request, ...]
    rows: tuple[Row, ...]
    preempted: int

    @property
    def tokens(self) -> int:
        """Tokens computed in this step, guesses left out."""
        return sum(row.count for row in self.rows)


def plan(book: Book, pool: BlockPool, token_budget: int, most_drafts: int) -> Step | None:
    """The next step, or None where nothing can be computed now. most_drafts: of a row."""
    book.plans += 1
    sketch = Sketch(book, pool, token_budget)
    sketch.add_decodes(keep=sketch.prompt_share())
    sketch.add_prompts()
    sketch.add_decodes(keep=0)
    sketch.add_drafts(most_drafts)
    return sketch.close()


def message(step: Step, crew_epoch: int, step_id: int) -> StepPlan:
    """The step as the ranks read it. The seats are built when the plan is made final, before any result."""
    return StepPlan(
        crew_epoch=crew_epoch,
        step_id=step_id,
        leave=pack_ids(step.leave),
        admit=tuple(_seat_of(request) for request in step.admitted),
        slots=pack_ids(row.slot for row in step.rows),
        starts=pack_ids(row.start for row in step.rows),
        counts=pack_ids(row.count for row in step.rows),
        samples=bytes(row.samples for row in step.rows),
        block_counts=pack_ids(len(row.new_blocks) for row in step.rows),
        new_blocks=pack_ids(block for row in step.rows for block in row.new_blocks),
        drafts=pack_ids(row.drafts for row in step.rows) if any(row.drafts for row in step.rows) else b"",
    )


def _seat_of(request: Request) -> Seat:
    generated = request.tokens[request.prompt_len :].tobytes()
    # Once a token was generated, the prompt's log-probabilities have all been told.
    prompt_logprobs = -1 if generated else request.prompt_logprobs
    return Seat(
        request.slot,
        request.epoch,
        request.prompt,
        generated,
        request.sampling,
        prompt_logprobs,
        request.pooling,
    )


class Sketch:
    """A step in the making."""

    def __init__(self, book: Book, pool: BlockPool, token_budget: int) -> None:
        self._book = book
        self._pool = pool
        self._size = pool.index.block_size
        self._budget = token_budget
        self._left = token_budget
        self._rows: dict[Request, Row] = {}
        self._preempted = 0

    def prompt_share(self) -> int:
        """How much of the budget decodes must leave to prompts."""
        if not (self._running_prompts() or self._book.waiting):
            return 0
        return self._budget // _PROMPT_SHARE or self._book.plans % 2

    def add_decodes(self, keep: int) -> None:
        """One token for each running sequence that waits for nothing else, but for ``keep`` of the budget."""
        seated = self._book.seated.values()
        due = [request for request in seated if request.todo == 1 and request not in self._rows]
        if len(due) > self._left - keep:
            due.sort(key=lambda request: (request.served_at, request.order))
        else:
            due.sort(key=lambda request: request.order)
        for request in due:
            if self._left > keep and request.state is State.RUNNING:
                self._compute(request, 1)

    def add_prompts(self) -> None:
        """Chunks of prompts with what is left."""
        lead = self._seated_lead() if self._left else None
        if lead is None:
            return
        spare = max(self._left - lead.todo, self._left // 2)
        self._add_behind(lead, spare)
        if lead.state is State.RUNNING:
            self._compute(lead, min(lead.todo, self._left))

    def add_drafts(self, most: int) -> None:
        """Lets the ranks guess up to ``most`` tokens of each sequence that decodes, as budget and blocks allow: all
        get the same, and a block is left for everybody who runs."""
        rows = [row for row in self._rows.values() if row.count == 1 and row.samples and row.request.can_draft]
        for row in rows if most else ():
            request = row.request
            spare = self._left // len(rows)
            blocks = len(request.blocks) + max(0, self._pool.available - len(self._book.seated))
            room = blocks * self._size - request.planned
            drafts = min(most, spare, room, request.limit - request.virtual)
            if drafts > 0:
                blocks_too = row.new_blocks + self._extend(request, drafts)
                self._rows[request] = replace(row, new_blocks=blocks_too, drafts=drafts)
                request.drafted += drafts

    def close(self) -> Step | None:
        """The step; blocks that it fills may be found from the next plan on."""
        if not self._rows:
            return None
        for request in self._rows:
            self._pool.index.publish(request)
        leave, admitted = self._book.tell_ranks()
        return Step(leave, admitted, tuple(self._rows.values()), self._preempted)

    def _running_prompts(self) -> list[Request]:
        return [request for request in self._book.seated.values() if request.todo > 1]

    def _seated_lead(self) -> Request | None:
        """The first prompt in turn, in its seat; a waiting one goes ahead of running ones by priority only."""
        running = min(self._running_prompts(), key=self._book.waiting.rank, default=None)
        first = self._book.waiting.first()
        if first and (running is None or first.priority < running.priority) and self._seat(first):
            return first
        return running if running is not None and running.state is State.RUNNING else None

    def _add_behind(self, lead: Request, spare: int) -> None:
        """Spends up to ``spare`` tokens on the prompts behind the lead."""
        doors_open = True
        prompts = [request for request in self._running_prompts() if request is not lead]
        for request in self._book.waiting.in_turn(prompts, spare, _LOOKAHEAD):
            if spare <= 0:
                return
            if request.state is State.WAITING:
                doors_open = doors_open and self._seat(request)
            if request.state is State.RUNNING:
                spare -= self._compute(request, min(request.todo, spare))

    def _seat(self, request: Request) -> bool:
        """Gives a waiting request a slot and the cached part of its prompt, if all of it will fit."""
        hits = [] if request.reads_whole_prompt else self._pool.index.match(request)
        while not self._fits(request, hits):
            victim = youngest(self._movable())
            if victim is None or victim.priority <= request.priority:
                return False
            self._preempt(victim)
        self._book.seat(request)
        self._pool.share(hits)
        request.blocks = hits
        request.hits = request.published = len(hits)
        request.planned = len(hits) * self._size
        if request.cached_tokens < 0:
            request.cached_tokens = min(request.planned, request.prompt_len)
        return True

    def _fits(self, request: Request, hits: list[int]) -> bool:
        running = self._book.seated.values()
        if not self._book.free_slots:
            return False
        needed = blocks_for(request.known, self._size) - len(hits) + self._pool.count_idle(hits)
        owed = sum(max(0, self._missing(other, other.todo)) for other in running)
        return not running or needed + owed + len(running) <= self._pool.available

    def _compute(self, request: Request, count: int) -> int:
        """Adds a row of up to ``count`` tokens, as the blocks allow; returns how many it has."""
        missing = self._missing(request, count)
        if missing > self._pool.available:
            self._make_room(request)
            room = (len(request.blocks) + self._pool.available) * self._size - request.planned
            count = min(count, room)
        if count <= 0:
            return 0
        self._record(request, count)
        return count

    def _record(self, request: Request, count: int) -> None:
        samples = request.planned + count == request.virtual
        start = -1 if request.drafted else request.planned
        blocks = self._extend(request, count)
        self._rows[request] = Row(request, request.slot, request.epoch, start, count, samples, blocks)
        self._book.serve(request, count)
        request.pending += samples
        self._left -= count

    def _extend(self, request: Request, count: int) -> tuple[int, ...]:
        """``count`` more tokens are planned, and blocks taken for them: those that the ranks have not been told of."""
        request.blocks += self._pool.take(max(0, self._missing(request, count)))
        unsent = tuple(request.blocks[request.sent_blocks :])
        request.sent_blocks = len(request.blocks)
        request.planned += count
        return unsent

    def _missing(self, request: Request, count: int) -> int:
        return blocks_for(request.planned + count, self._size) - len(request.blocks)

    def _make_room(self, request: Request) -> None:
        """Preempts from the end of the order until the request's next token fits, or it is last itself."""
        while self._pool.available == 0 and self._missing(request, 1) > 0:
            victim = youngest(self._movable())
            if victim is None or victim.order <= request.order:
                return
            self._preempt(victim)

    def _movable(self) -> list[Request]:
        return [request for request in self._book.seated.values() if request not in self._book.arriving]

    def _preempt(self, victim: Request) -> None:
        if row := self._rows.pop(victim, None):
            self._left += row.count
            self._book.take_back(victim, row.count)
        preempt(self._book, self._pool, victim)
        self._preempted += 1
