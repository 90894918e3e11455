"""Random schedules of submits, cancels, deadlines, faults and steps, with pools so small that everything
happens: sharing, eviction, preemption. ``fakes.bench`` checks the invariants after each event.

The planted faults at the end show that the property would notice: each takes one safeguard away.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from fakes.bench import Bench, rules
from fakes.fake_rank import PlanInvalid
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from shoal.messages import Sampling
from shoal.scheduler import pipeline
from shoal.scheduler.blocks import BlockPool
from shoal.scheduler.book import Book
from shoal.scheduler.plan import Sketch
from shoal.scheduler.prefix import PrefixIndex
from shoal.scheduler.quota import Quota, Quotas
from shoal.scheduler.request import Request, Sampled
from shoal.scheduler.suspects import Suspects

BAD_SEED = 13
DEADLY_SEED = 17
SESSION_LEN = 40

WORLDS = st.fixed_dictionaries(
    {
        "instance_num": st.integers(1, 5),
        "block_size": st.sampled_from([1, 2, 3, 4]),
        "token_budget": st.sampled_from([1, 2, 3, 5, 9, 16, 64]),
        "prefix_caching": st.sampled_from([True, True, True, False]),
        "session_len": st.just(SESSION_LEN),
        "most_drafts": st.sampled_from([0, 1, 3, 15]),
    }
)
LIMITS = st.fixed_dictionaries(
    {
        "quotas": st.sampled_from(
            [
                {},
                {"a": Quota(max_concurrent=2)},
                {"a": Quota(tokens_per_minute=600), "b": Quota(1, 60, 0, priority=0)},
            ]
        ),
        "max_concurrent_requests": st.sampled_from([0, 0, 4]),
    }
)
SUBMITS = st.fixed_dictionaries(
    {
        "stem": st.integers(0, 1),
        "length": st.integers(1, 17),
        "tail": st.integers(0, 3),
        "max_tokens": st.integers(1, 20),
        "seed": st.sampled_from([1, 2, 3, 2**63, BAD_SEED, DEADLY_SEED]),
        "priority": st.sampled_from([0, 0, 0, 1, -1]),
        "stop_ids": st.sampled_from([(), (), (3,), (1, 5)]),
        "deadline_ms": st.sampled_from([0, 0, 0, 1, 5, 20]),
        "generated": st.sampled_from([0, 0, 0, 1, 4]),
        "tenant": st.sampled_from(["", "a", "a", "b"]),
        "cache_salt": st.sampled_from(["", "", "salt"]),
        "scores": st.sampled_from([False, False, True]),
        "pooling": st.sampled_from(["", "", "", "", "mean", "last"]),
        "allowed_ids": st.sampled_from([(), (), (), (1, 2)]),
    }
)
EVENTS = st.one_of(
    st.tuples(st.just("submit"), st.lists(SUBMITS, min_size=1, max_size=4)),
    st.tuples(st.just("step"), st.integers(1, 12)),
    st.tuples(st.just("step"), st.integers(1, 12)),
    st.tuples(st.just("plan"), st.none()),
    st.tuples(st.just("answer"), st.none()),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("abort"), st.integers(0, 30)),
    st.tuples(st.just("tick"), st.integers(1, 10)),
    st.tuples(st.just("repeat"), st.none()),
    st.tuples(st.just("crash"), st.none()),
)
SCHEDULES = st.tuples(
    st.builds(lambda world, limits: world | limits, WORLDS, LIMITS),
    st.integers(0, 6),
    st.lists(SUBMITS, min_size=4, max_size=8),
    st.lists(EVENTS, min_size=8, max_size=40),
)
Schedule = tuple[dict[str, Any], int, list[dict[str, Any]], list[tuple[str, Any]]]
"""The rules, spare blocks beyond what the longest request needs, who is there first, what happens then."""


def is_bad(sampling: Sampling, generated: int) -> bool:
    """One seed's requests get logits that are not finite after two tokens."""
    return sampling.seed == BAD_SEED and generated >= 2


def is_deadly(sampling: Sampling, generated: int) -> bool:
    """One seed's requests end a rank at their second token."""
    return sampling.seed == DEADLY_SEED and generated >= 1


def prompt_of(stem: int, length: int, tail: int) -> list[int]:
    """Prompts of one stem share a prefix up to their last tokens."""
    return [(stem + n * n) % 7 for n in range(length)] + [6] * tail


def submit(bench: Bench, values: dict[str, Any]) -> None:
    """Submits what the strategy made."""
    rest = {name: value for name, value in values.items() if name not in ("stem", "length", "tail")}
    rest["generated"] = 0 if values["pooling"] else min(values["generated"], values["max_tokens"] - 1)
    rest["stop_ids"] = () if rest["generated"] else values["stop_ids"]
    bench.submit(prompt_of(values["stem"], values["length"], values["tail"]), **rest)


def step(bench: Bench, times: int) -> None:
    """The pipelined rhythm of the real loop."""
    for _ in range(times):
        while bench.plan():
            pass
        bench.answer()


def run_schedule(schedule: Schedule) -> None:
    """Whatever the order of events, every invariant holds and everything ends."""
    world, spare_blocks, first, events = schedule
    least = -(-SESSION_LEN // world["block_size"])
    world = dict(world)
    most_drafts = world.pop("most_drafts")
    bench = Bench(rules(**world), least + spare_blocks, is_bad, most_drafts, is_deadly)
    acts: dict[str, Callable[[Any], object]] = {
        "submit": lambda batch: [submit(bench, values) for values in batch],
        "step": lambda times: step(bench, times),
        "plan": lambda _: bench.plan(),
        "answer": lambda _: bench.answer(),
        "cancel": lambda n: bench.cancel(1 + n % len(bench.clients)),
        "abort": lambda n: bench.abort(1 + n % len(bench.clients)),
        "tick": bench.tick,
        "repeat": lambda _: bench.repeat(),
        "crash": lambda _: bench.crash(),
    }
    for name, value in [("submit", first), *events]:
        acts[name](value)
    bench.run()
    for client in bench.clients.values():
        assert client.end is not None


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(SCHEDULES)
def test_any_schedule(schedule: Schedule) -> None:
    """The invariants of the design."""
    run_schedule(schedule)


def _any_owner(book: Book, slot: int, epoch: int) -> object:
    return book.seated.get(slot)


def _one_early(index: PrefixIndex, request: Request) -> int:
    return min(len(request.blocks), request.known // index.block_size)


_GIVE_BACK = BlockPool.give_back


def _keep_one(pool: BlockPool, blocks: list[int]) -> None:
    _GIVE_BACK(pool, blocks[1:])


def _not_told(book: Book) -> tuple[tuple[int, ...], tuple[Request, ...]]:
    arriving = tuple(book.arriving)
    book.arriving.clear()
    return (), arriving


def _pools(request: Request) -> bool:
    return request.pooling == "mean"


def _scores(request: Request) -> bool:
    return request.prompt_logprobs >= 0 and not request.generated


def _unlimited(sketch: Sketch, most: int) -> None:
    for request, row in sketch._rows.items():
        if row.count == 1 and row.samples:
            sketch._rows[request] = replace(row, drafts=most)
            request.drafted += most


def _none_told(slot: int, epoch: int, tokens: Any, drafts: int) -> Sampled:
    return Sampled(slot, epoch, tokens, 0)


PLANTED: dict[str, tuple[object, str, object, type[Exception]]] = {
    "results_taken_without_epoch": (Book, "owner", _any_owner, AssertionError),
    "epoch_not_raised": (Book, "_raised", staticmethod(lambda epoch: max(1, epoch)), AssertionError),
    "block_published_one_early": (PrefixIndex, "_filled", _one_early, PlanInvalid),
    "block_not_given_back": (BlockPool, "give_back", _keep_one, AssertionError),
    "salt_left_out_of_digests": (PrefixIndex, "_root", lambda index, request: b"", AssertionError),
    "end_not_told_to_quotas": (Quotas, "leave", lambda quotas, request: None, AssertionError),
    "share_not_counted": (BlockPool, "share", lambda pool, blocks: None, AssertionError),
    "ranks_not_told_who_left": (Book, "tell_ranks", _not_told, PlanInvalid),
    "hits_under_prompt_logprobs": (Request, "reads_whole_prompt", property(_pools), AssertionError),
    "drafts_without_limit": (Sketch, "add_drafts", _unlimited, AssertionError),
    "drafts_not_taken_back": (pipeline, "Sampled", _none_told, AssertionError),
    "drafts_of_constrained_rows": (Request, "can_draft", property(lambda request: True), PlanInvalid),
    "blame_for_being_there": (
        Suspects,
        "accuse",
        lambda self, computed: next(iter(computed), None),
        AssertionError,
    ),
    "hits_under_a_mean": (Request, "reads_whole_prompt", property(_scores), PlanInvalid),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_fault_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The property fails, and as expected, where a safeguard is missing."""
    owner, attribute, fault, error = PLANTED[name]
    monkeypatch.setattr(owner, attribute, fault)
    quick = settings(
        max_examples=500,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    with pytest.raises(error):
        quick(given(SCHEDULES)(run_schedule))()
