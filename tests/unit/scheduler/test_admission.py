"""Which submits are refused, with which code; the book's queue and deadlines."""

from typing import Any

import pytest
from fakes.bench import Bench, rules

from shoal.messages import Rejected, Sampling, Submit
from shoal.scheduler.admission import Speed, retry_ms
from shoal.scheduler.core import Core
from shoal.scheduler.request import Request
from shoal.scheduler.stats import Series
from shoal.wire import pack_ids


def submit_of(number: int = 1, length: int = 5, **changes: Any) -> Submit:
    values: dict[str, Any] = {
        "request_no": number,
        "label": "x",
        "prompt": pack_ids(range(length)),
        "sampling": Sampling(1),
        "max_tokens": 5,
    }
    return Submit(**(values | changes))


def core_of(num_blocks: int = 32, **changes: Any) -> Core:
    core = Core(rules(**changes))
    core.crew_up(1, num_blocks)
    return core


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": b""}, "at least one"),
        ({"prompt": b"12345"}, "int32"),
        ({"generated": b"1"}, "int32"),
        ({"prompt": pack_ids([3, -4])}, "negative"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"generated": pack_ids(range(5))}, "already has"),
        ({"max_tokens": 60}, "65 tokens, more than session_len 64"),
        ({"max_tokens": 40}, "11 KV blocks of 4 tokens, the server has 10"),
    ],
)
def test_what_can_never_run_is_refused_with_400(changes: dict[str, Any], words: str) -> None:
    outcome = core_of(10).submit(1, submit_of(**changes), 0)
    assert isinstance(outcome, Rejected)
    assert outcome.code == 400
    assert words in outcome.detail


def test_the_largest_that_fits_is_accepted_and_runs_alone() -> None:
    bench = Bench(rules(), 10)
    number = bench.submit([1] * 5, 36)
    bench.run()
    assert len(bench.clients[number].answer) == 36


def test_before_the_first_crew_and_while_draining_503() -> None:
    core = Core(rules())
    early = core.submit(1, submit_of(), 0)
    assert isinstance(early, Rejected)
    assert early.code == 503
    core.crew_up(1, 32)
    core.drain()
    late = core.submit(1, submit_of(), 0)
    assert isinstance(late, Rejected)
    assert late.code == 503


def test_a_full_queue_is_429_but_not_for_who_was_admitted_once() -> None:
    core = core_of(instance_num=1, max_queued_requests=2, max_queued_tokens=20)
    outcomes = [core.submit(1, submit_of(number), 0, Speed(tokens_per_s=5.0)) for number in range(5)]
    assert [isinstance(outcome, Rejected) for outcome in outcomes] == [False, False, False, True, True]
    refused = outcomes[3]
    assert isinstance(refused, Rejected)
    assert (refused.code, refused.retry_ms) == (429, 3000)
    slow = core.submit(1, submit_of(9), 0, Speed(tokens_per_s=5.0, request_s=8.0))
    assert isinstance(slow, Rejected)
    assert slow.retry_ms == 8000, "all of them wait, and each takes eight seconds: none has a slot yet"
    assert isinstance(core.submit(1, submit_of(9, attempt=1), 0), Request)


def test_queued_tokens_are_limited_but_a_lone_long_prompt_is_not() -> None:
    core = core_of(max_queued_tokens=20)
    assert isinstance(core.submit(1, submit_of(1, 30), 0), Request)
    refused = core.submit(1, submit_of(2), 0)
    assert isinstance(refused, Rejected)
    assert "30 tokens are waiting" in refused.detail


def test_a_submit_that_comes_twice_is_one_request() -> None:
    core = core_of()
    assert isinstance(core.submit(1, submit_of(), 0), Request)
    assert core.submit(1, submit_of(), 0) is None
    assert isinstance(core.submit(2, submit_of(), 0), Request)
    assert len(core.book) == 2


def test_a_frontend_that_goes_takes_only_its_own() -> None:
    core = core_of()
    for frontend in (1, 1, 2):
        core.submit(frontend, submit_of(len(core.book)), 0)
    assert [event.request.frontend_no for event in core.cancel_frontend(1)] == [1, 1]
    assert len(core.book) == 1


def test_deadlines_come_in_order_and_once() -> None:
    core = core_of()
    for number, deadline_ns in enumerate([30, 10, 0, 20]):
        core.submit(1, submit_of(number, deadline_ns=deadline_ns), 0)
    assert core.book.next_deadline_ns() == 10
    core.cancel(1, 1)
    assert core.book.next_deadline_ns() == 20
    assert [event.request.request_no for event in core.expire(25)] == [3]
    assert core.expire(25) == []
    assert core.book.next_deadline_ns() == 30


def test_an_arrival_from_the_future_counts_as_now() -> None:
    outcome = core_of().submit(1, submit_of(arrival_ns=10**18), 500)
    assert isinstance(outcome, Request)
    assert outcome.arrival_ns == 500


@pytest.mark.parametrize(
    ("tokens", "speed", "expected"), [(0, 9.0, 1000), (500, 100.0, 5000), (10**9, 1.0, 60_000)]
)
def test_retry_after_is_how_long_the_queue_takes(tokens: int, speed: float, expected: int) -> None:
    assert retry_ms(tokens, speed) == expected
    assert retry_ms(tokens, 0.0) == 1000


def test_a_histogram_counts_up_to_its_bounds_inclusively() -> None:
    series = Series((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 3.0):
        series.add(value)
    frozen = series.frozen()
    assert (frozen.counts, frozen.total) == ((2, 2, 1), 8.0)
