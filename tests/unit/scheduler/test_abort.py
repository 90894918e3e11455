"""Ends that somebody asks for or a pattern brings: aborts, sleep's refusals, repetition; what is open, listed."""

import pytest
from fakes.bench import Bench, rules

from shoal.messages import Rejected, RepetitionLimit, Sampling, Submit
from shoal.scheduler.apply import apply
from shoal.scheduler.core import Core
from shoal.scheduler.request import Ended, Event, Request, Sampled
from shoal.scheduler.slumber import Slumber
from shoal.wire import pack_ids


def submit_of(number: int, **changes: object) -> Submit:
    values: dict[str, object] = {
        "request_no": number,
        "label": f"request-{number}",
        "prompt": pack_ids([1, 2, 3]),
        "sampling": Sampling(1),
        "max_tokens": 40,
    }
    return Submit(**(values | changes))  # type: ignore[arg-type]


def test_an_abort_ends_running_and_waiting_sequences_of_one_label() -> None:
    bench = Bench(rules(instance_num=1), 64)
    first, second = bench.submit([1, 2], 9), bench.submit([1, 2], 9)
    bench.plan()
    bench.answer()
    assert bench.abort(second) == 1
    assert bench.abort(second) == 0
    assert bench.abort(first) == 1
    ends = [bench.clients[number].end for number in (first, second)]
    assert [end.reason for end in ends if isinstance(end, Ended)] == ["aborted", "aborted"]
    assert bench.clients[first].answer == bench.clients[first].expected()[:1]
    bench.run()


def test_an_abort_of_all_is_one_tenants_or_everybodys() -> None:
    bench = Bench(rules(), 64)
    for tenant in ("a", "a", "b"):
        bench.submit([1, 2], 9, tenant=tenant)
    assert bench.abort(tenant="a") == 2
    assert len(bench.core.book) == 1
    assert bench.abort() == 1


def test_a_label_of_another_tenant_is_not_reached() -> None:
    core = Core(rules())
    core.crew_up(1, 64)
    core.submit(1, submit_of(1, tenant="a"), 0)
    assert core.abort("request-1", "b") == ([], 0)
    assert core.abort("request-1", "a")[1] == 1


def test_what_is_open() -> None:
    core = Core(rules(instance_num=1))
    core.crew_up(1, 64)
    for number in (1, 2):
        core.submit(1, submit_of(number, tenant="a", group=1, arrival_ns=1_000_000), 5_000_000)
    core.submit(2, submit_of(1, tenant="b", priority=3, arrival_ns=2_000_000), 5_000_000)
    core.plan()
    ours, theirs = core.survey(None, 9_000_000)
    assert (ours.label, ours.tenant, ours.running, ours.waiting) == ("request-1", "a", 1, 1)
    assert (ours.prompt_tokens, ours.generated_tokens, ours.age_ms) == (6, 0, 8)
    assert (theirs.tenant, theirs.priority, theirs.waiting) == ("b", 3, 1)
    assert core.survey("b", 9_000_000) == (theirs,)


def test_asleep_nothing_is_accepted_until_woken() -> None:
    core = Core(rules())
    core.crew_up(1, 64)
    core.rest(1)
    refused = core.submit(1, submit_of(1), 0)
    assert isinstance(refused, Rejected)
    assert (refused.code, refused.reason) == (503, "asleep")
    assert "POST /wakeup" in refused.detail
    core.rest(0)
    assert isinstance(core.submit(1, submit_of(1), 0), Request)


def test_a_later_wish_replaces_an_earlier_one_and_all_who_asked_are_told() -> None:
    slumber = Slumber()
    slumber.ask(1, 10, 1, until_ns=100)
    slumber.ask(2, 20, 2, until_ns=900)
    assert (slumber.level, slumber.until_ns) == (2, 100)
    assert not slumber.is_settled(asleep=1, serving=False)
    assert slumber.is_settled(asleep=2, serving=False)
    slumber.ask(1, 11, 0, until_ns=0)
    assert not slumber.is_settled(asleep=2, serving=False)
    assert slumber.is_settled(asleep=0, serving=True)
    assert slumber.take_askers() == [(1, 10), (2, 20), (1, 11)]
    assert slumber.take_askers() == []


def end_of(tokens: list[int], limit: RepetitionLimit) -> tuple[str, int]:
    """How an answer that consists of ``tokens`` ends, and after how many."""
    core = Core(rules())
    core.crew_up(1, 64)
    request = core.submit(1, submit_of(1, repetition=limit), 0)
    assert isinstance(request, Request)
    for count, token in enumerate(tokens, 1):
        events = _sample(core, request, token)
        if ends := [event for event in events if isinstance(event, Ended)]:
            return ends[0].reason, count
    return "", len(tokens)


def _sample(core: Core, request: Request, token: int) -> list[Event]:
    core.plan()
    return apply(core.book, core.pool, [Sampled(request.slot, request.epoch, ((token, None),), 0)])[0]


@pytest.mark.parametrize(
    ("tokens", "limit", "expected"),
    [
        ([7, 7, 7, 7, 7], RepetitionLimit(1, 4, 3), ("repetition", 3)),
        ([1, 2, 3, 2, 3, 2, 3, 9], RepetitionLimit(2, 4, 3), ("repetition", 7)),
        ([1, 2, 3, 2, 3, 9, 3, 2], RepetitionLimit(2, 4, 3), ("", 8)),
        ([7, 7, 7, 7, 7, 7], RepetitionLimit(2, 4, 3), ("repetition", 6)),
        ([1, 2, 3, 1, 2, 3], RepetitionLimit(1, 2, 2), ("", 6)),
        ([1, 2, 3, 1, 2, 3], RepetitionLimit(1, 3, 2), ("repetition", 6)),
        ([3, 3], RepetitionLimit(1, 3, 3), ("", 2)),
    ],
)
def test_a_pattern_that_is_repeated_ends_the_answer(
    tokens: list[int], limit: RepetitionLimit, expected: tuple[str, int]
) -> None:
    """The prompt's tokens, [1, 2, 3], are no part of the pattern."""
    assert end_of(tokens, limit) == expected


@pytest.mark.parametrize("limit", [(0, 3, 2), (4, 3, 2), (1, 257, 2), (1, 3, 1)])
def test_patterns_that_make_no_sense_are_refused(limit: tuple[int, int, int]) -> None:
    core = Core(rules())
    core.crew_up(1, 64)
    refused = core.submit(1, submit_of(1, repetition=RepetitionLimit(*limit)), 0)
    assert isinstance(refused, Rejected)
    assert refused.code == 400
    assert refused.detail.startswith("repetition: ")
