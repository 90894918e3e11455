"""The scheduler's core and a fake rank in one process and in virtual time, with every invariant checked.

Each method is one thing that can happen; after each, ``check`` holds what must always hold. Used by the
property tests and by the unit tests of plan and apply.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fakes.fake_rank import FakeRank, never, pooled_vector, prompt_logprob, reference

from shoal.messages import Pooling, Rejected, Sampling, StepPlan, StepResult, Submit
from shoal.scheduler.apply import DEADLY, NON_FINITE
from shoal.scheduler.core import Core, Rules
from shoal.scheduler.plan import Step
from shoal.scheduler.request import Emitted, Ended, Event, Pooled, Request, Scored
from shoal.wire import pack_ids

VOCAB = 7
_START_NS = 1_000_000_000_000


def rules(**changes: object) -> Rules:
    """Small ones."""
    values: dict[str, object] = {
        "instance_num": 4,
        "session_len": 64,
        "block_size": 4,
        "token_budget": 8,
        "max_queued_requests": 1000,
        "max_queued_tokens": 100_000,
        "prefix_key": b"test",
    }
    return Rules(**(values | changes))  # type: ignore[arg-type]


@dataclass(slots=True)
class Client:
    """What the client of one request has seen."""

    prompt: list[int]
    seed: int
    max_tokens: int
    stop_ids: tuple[int, ...]
    deadline_ns: int
    cancelled: bool = False
    aborted: bool = False
    got: list[int] | None = None
    scores: bool = False
    pooling: Pooling = ""
    scored: int = 1
    """Index of the first prompt token whose log-probability has not come."""
    vector: bytes = b""
    end: Ended | Rejected | None = None

    @property
    def answer(self) -> list[int]:
        """Tokens so far."""
        return self.got or []

    def expected(self) -> list[int]:
        """The whole answer."""
        return reference(self.prompt, self.seed, self.max_tokens, VOCAB, self.stop_ids)


class Bench:
    """One core, one rank after the other, any number of clients."""

    def __init__(
        self,
        with_rules: Rules,
        num_blocks: int,
        is_bad: Callable[[Sampling, int], bool] = never,
        most_drafts: int = 0,
        is_deadly: Callable[[Sampling, int], bool] = never,
    ) -> None:
        """is_bad: whether a sequence's logits are not finite once it has so many tokens; is_deadly: whether a rank dies
        that computes it then."""
        self.core = Core(with_rules)
        self.clients: dict[int, Client] = {}
        self.now_ns = _START_NS
        self.epoch = 0
        self.steps: list[Step] = []
        self._num_blocks = num_blocks
        self._is_bad = is_bad
        self._most_drafts = most_drafts
        self._is_deadly = is_deadly
        self.deaths = 0
        """Of ranks, by a request."""
        self.kills = 0
        """Of ranks, by others."""
        self._sent: deque[tuple[StepPlan, Step]] = deque()
        self._last_result: StepResult | None = None
        self._slot_epochs: dict[int, int] = {}
        self.crew_up()

    def submit(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        seed: int = 1,
        priority: int = 0,
        stop_ids: tuple[int, ...] = (),
        deadline_ms: int = 0,
        generated: int = 0,
        scores: bool = False,
        pooling: Pooling = "",
        tenant: str = "",
        cache_salt: str = "",
        group: int = 0,
        allowed_ids: tuple[int, ...] = (),
    ) -> int:
        """A new request; ``generated`` of its tokens are already with the client. Returns its number."""
        number = len(self.clients) + 1
        deadline_ns = self.now_ns + deadline_ms * 1_000_000 if deadline_ms else 0
        client = Client(list(prompt), seed, max_tokens, stop_ids, deadline_ns, scores=scores, pooling=pooling)
        client.got = client.expected()[:generated]
        client.scored = len(prompt) if generated else 1
        self.clients[number] = client
        message = Submit(
            request_no=number,
            label=f"request-{number}",
            prompt=pack_ids(prompt),
            generated=pack_ids(client.got),
            sampling=Sampling(seed, allowed_ids=allowed_ids),
            max_tokens=max_tokens,
            stop_ids=stop_ids,
            priority=priority,
            arrival_ns=self.now_ns,
            deadline_ns=deadline_ns,
            attempt=int(generated > 0),
            prompt_logprobs=0 if scores else -1,
            pooling=pooling,
            tenant=tenant,
            cache_salt=cache_salt,
            group=group,
        )
        outcome = self.core.submit(1, message, self.now_ns)
        if isinstance(outcome, Rejected):
            client.end = outcome
        assert self.core.submit(1, message, self.now_ns) is None or isinstance(outcome, Rejected)
        self.check()
        return number

    def request(self, number: int) -> Request:
        """An open request."""
        found = self.core.book.find(1, number)
        assert found is not None
        return found

    def cancel(self, number: int) -> None:
        """Twice: the second has no effect."""
        if number in self.clients:
            self.clients[number].cancelled = True
        self._take(self.core.cancel(1, number))
        assert self.core.cancel(1, number) == []
        self.check()

    def abort(self, number: int = 0, tenant: str | None = None) -> int:
        """One HTTP request of one sequence, or all of a tenant's; returns how many HTTP requests that were."""
        for each, client in self.clients.items():
            request = self.core.book.find(1, each)
            if request and number in (0, each) and tenant in (None, request.tenant):
                client.aborted = True
        events, requests = self.core.abort(f"request-{number}" if number else "", tenant)
        self._take(events)
        self.check()
        return requests

    def tick(self, milliseconds: int) -> None:
        """Time passes."""
        self.now_ns += milliseconds * 1_000_000
        self._take(self.core.expire(self.now_ns))
        self.check()

    def plan(self) -> Step | None:
        """The next plan leaves, if there is one."""
        step = self.core.plan()
        if step is not None:
            assert step.tokens + sum(row.drafts for row in step.rows) <= self.core.rules.token_budget
            self._see_seats(step)
            self.steps.append(step)
            self._sent.append((self.core.dispatch(step, self.now_ns), step))
        self.check()
        return step

    def answer(self) -> bool:
        """The rank computes its next plan and the result arrives; or it dies of it, and another comes."""
        if not self._sent:
            return False
        plan, step = self._sent.popleft()
        if any(self._is_deadly(row.request.sampling, row.request.generated) for row in step.rows):
            self.deaths += 1
            self._replace_crew()
            return True
        self._last_result = self._rank.step(plan)
        collected = self.core.collect(self._last_result)
        assert collected is not None
        self._take(collected.events)
        self.check()
        return True

    def repeat(self) -> None:
        """The last result arrives once more, or late from an older crew."""
        if self._last_result is not None:
            before = self.core.pipeline.stale_results
            assert self.core.collect(self._last_result) is None
            assert self.core.pipeline.stale_results == before + 1
        self.check()

    def crash(self) -> None:
        """The ranks are killed with everything in flight; others come."""
        self.kills += 1
        self._replace_crew()

    def _replace_crew(self) -> None:
        self._sent.clear()
        self._take(self.core.crew_lost())
        assert self.core.plan() is None
        self.check()
        self.crew_up()

    def crew_up(self) -> None:
        """A new crew serves."""
        self.epoch += 1
        self._rank = FakeRank(self._num_blocks, self.core.rules.block_size, VOCAB, self._is_bad)
        self._take(self.core.crew_up(self.epoch, self._num_blocks, self._most_drafts))
        self.check()

    def run(self, most_steps: int = 2000) -> int:
        """Plans ahead by two and collects until everything has ended; returns how many steps that took."""
        steps = 0
        while steps < most_steps:
            while self.plan():
                pass
            if not self.answer():
                break
            steps += 1
        assert not len(self.core.book), f"{len(self.core.book)} requests did not end in {steps} steps"
        assert self.core.pool.held == 0
        return steps

    def check(self) -> None:
        """What must hold whatever has happened."""
        core = self.core
        assert core.discrepancy() == ""
        held = {block for request in core.book.seated.values() for block in request.blocks}
        assert len(held) + core.pool.available == core.pool.num_blocks
        for slot, request in core.book.seated.items():
            assert request.slot == slot
            assert request.planned <= request.virtual <= request.limit
            assert 0 <= request.pending <= 2
            assert 0 <= request.drafted <= request.pending * self._most_drafts
        assert len(core.book) == len(core.book.seated) + len(core.book.waiting)
        assert core.book.queued_tokens == sum(request.known for request in core.book.waiting)
        assert all(not request.blocks and not request.planned for request in core.book.waiting)
        self._check_sharing()

    def _check_sharing(self) -> None:
        """Only requests of one tenant and one salt hold the same block."""
        owners: dict[int, tuple[str, str]] = {}
        for request in self.core.book.seated.values():
            for block in request.blocks:
                owner = (request.tenant, request.cache_salt)
                assert owners.setdefault(block, owner) == owner

    def _see_seats(self, step: Step) -> None:
        for request in step.admitted:
            assert request.epoch > self._slot_epochs.get(request.slot, 0)
            self._slot_epochs[request.slot] = request.epoch
        slots = [row.slot for row in step.rows]
        assert len(slots) == len(set(slots)) <= self.core.rules.instance_num

    def _take(self, events: list[Event]) -> None:
        for event in events:
            client = self.clients[event.request.request_no]
            assert client.end is None, "an event after the last one"
            if isinstance(event, Emitted):
                self._see_token(client, event)
            elif isinstance(event, Scored):
                _see_scores(client, event)
            elif isinstance(event, Pooled):
                assert client.pooling
                client.vector = event.vector
            else:
                client.end = event
                _judge(client, event, self.now_ns)
                if event.detail == DEADLY:
                    suspicious = self._is_deadly(event.request.sampling, event.request.generated)
                    assert suspicious or self.kills >= 2, "it failed for what another one did"

    def _see_token(self, client: Client, event: Emitted) -> None:
        assert client.got is not None
        assert event.position == len(client.got)
        client.got.append(event.token_id)
        assert client.got == client.expected()[: len(client.got)], "a token of somebody else"


def _see_scores(client: Client, event: Scored) -> None:
    """In order and without a gap; after a preemption they may come again."""
    assert client.scores
    assert event.position <= client.scored
    for at, logprob in enumerate(event.logprobs, event.position):
        assert logprob == prompt_logprob(client.prompt[: at + 1])
    client.scored = max(client.scored, event.position + len(event.logprobs))


def _judge(client: Client, ended: Ended, now_ns: int) -> None:
    """Whether a request may end like that."""
    if client.scores and (client.answer or ended.reason in ("stop", "length")):
        assert client.scored == len(client.prompt), "a prompt's log-probabilities come before its first token"
    match ended.reason:
        case "stop" if client.pooling:
            assert client.vector == pooled_vector(client.prompt, client.pooling)
            assert not client.answer
        case "length":
            assert client.answer == client.expected()
            assert len(client.answer) == client.max_tokens
        case "stop":
            assert client.answer == client.expected()
            assert client.answer[-1] == ended.stop_id
            assert ended.stop_id in client.stop_ids
        case "cancelled":
            assert client.cancelled
        case "aborted":
            assert client.aborted
        case "deadline":
            assert 0 < client.deadline_ns <= now_ns
        case "failed":
            assert ended.detail in (DEADLY, NON_FINITE)
