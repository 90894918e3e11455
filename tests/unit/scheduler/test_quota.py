"""Limits of tenants and of everybody: who is refused, until when, and that counts come back to zero."""

from typing import Any

import pytest
from fakes.bench import Bench, rules
from hypothesis import given
from hypothesis import strategies as st

from shoal.messages import Rejected, Sampling, Submit
from shoal.scheduler.admission import Speed
from shoal.scheduler.core import Core
from shoal.scheduler.quota import Bucket, Quota
from shoal.scheduler.request import Request
from shoal.wire import pack_ids

S = 1_000_000_000
MEASURED = Speed(tokens_per_s=100.0, request_s=6.0)


def submit_of(number: int, tenant: str = "a", length: int = 5, **changes: Any) -> Submit:
    values: dict[str, Any] = {
        "request_no": number,
        "label": f"request-{number}",
        "prompt": pack_ids(range(number * 100, number * 100 + length)),
        "sampling": Sampling(1),
        "max_tokens": 5,
        "tenant": tenant,
    }
    return Submit(**(values | changes))


def core_of(most_open: int = 0, **quota: Any) -> Core:
    core = Core(rules(quotas={"a": Quota(**quota)}, max_concurrent_requests=most_open, instance_num=64))
    core.crew_up(1, 64)
    return core


def refusal(outcome: object) -> Rejected:
    assert isinstance(outcome, Rejected)
    assert outcome.code == 429
    return outcome


def accepted(outcome: object) -> Request:
    assert isinstance(outcome, Request), outcome
    return outcome


def test_requests_at_once() -> None:
    core = core_of(max_concurrent=2)
    accepted(core.submit(1, submit_of(1), 0))
    accepted(core.submit(2, submit_of(1), 0))
    refused = refusal(core.submit(1, submit_of(2), 0, MEASURED))
    assert refused.reason == "concurrency"
    assert refused.retry_ms == 3000, "two are open and each takes six seconds"
    assert "a has 2 requests open, the most is 2" in refused.detail
    accepted(core.submit(1, submit_of(3, tenant="b"), 0))
    core.cancel(2, 1)
    accepted(core.submit(1, submit_of(4), 0))


def test_all_sequences_of_a_request_count_once_and_come_in_together() -> None:
    core = core_of(max_concurrent=1, requests_per_minute=1)
    for number in range(1, 5):
        accepted(core.submit(1, submit_of(number, group=1), 0))
    refusal(core.submit(2, submit_of(1, group=1), 0))
    for number in range(1, 4):
        core.cancel(1, number)
    refused = refusal(core.submit(1, submit_of(9), 61 * S))
    assert refused.reason == "concurrency"
    core.cancel(1, 4)
    accepted(core.submit(1, submit_of(10), 61 * S))


def test_all_sequences_of_a_refused_request_are_refused_whatever_changes_meanwhile() -> None:
    core = core_of(max_concurrent=1)
    accepted(core.submit(1, submit_of(1), 0))
    refusal(core.submit(1, submit_of(2, group=2), 0))
    core.cancel(1, 1)
    refused = refusal(core.submit(1, submit_of(3, group=2), 0))
    assert refused.request_no == 3
    accepted(core.submit(1, submit_of(4, group=4), 0))


def test_requests_a_minute() -> None:
    core = core_of(requests_per_minute=3)
    for number in range(1, 4):
        accepted(core.submit(1, submit_of(number), 0))
    refused = refusal(core.submit(1, submit_of(4), 5 * S))
    assert (refused.reason, refused.retry_ms) == ("request_rate", 15_000)
    refusal(core.submit(1, submit_of(5), 20 * S - 1_000_000))
    accepted(core.submit(1, submit_of(6), 20 * S))
    accepted(core.submit(1, submit_of(7, tenant="b"), 20 * S))


def test_refused_requests_cost_nothing() -> None:
    core = core_of(requests_per_minute=1)
    accepted(core.submit(1, submit_of(1), 0))
    for number in range(2, 30):
        refusal(core.submit(1, submit_of(number), S))
    accepted(core.submit(1, submit_of(30), 60 * S))


def test_tokens_a_minute_are_prompts_and_answers() -> None:
    bench = Bench(rules(quotas={"a": Quota(tokens_per_minute=60)}), 64)
    bench.submit([1] * 20, 10, tenant="a")
    bench.run()
    core, now_ns = bench.core, bench.now_ns
    accepted(core.submit(1, submit_of(2, length=30), now_ns))
    refused = refusal(core.submit(1, submit_of(3, length=1), now_ns))
    assert (refused.reason, refused.retry_ms) == ("token_rate", 1000)


def test_a_prompt_of_several_choices_is_paid_for_once_and_others_each() -> None:
    core = core_of(tokens_per_minute=100)
    same = pack_ids(range(30))
    for number in range(1, 4):
        accepted(core.submit(1, submit_of(number, group=1, prompt=same), 0))
    accepted(core.submit(1, submit_of(4, group=1, length=40), 0))
    refused = refusal(core.submit(1, submit_of(5, length=40), 0))
    assert refused.retry_ms == 6000


def test_a_prompt_above_the_limit_waits_for_a_full_bucket_and_then_owes() -> None:
    core = core_of(tokens_per_minute=20)
    accepted(core.submit(1, submit_of(1, length=50), 0))
    assert refusal(core.submit(1, submit_of(2, length=50), 0)).retry_ms == 150_000
    accepted(core.submit(1, submit_of(3, length=50), 150 * S))


def test_the_limit_of_everybody() -> None:
    core = core_of(most_open=2)
    accepted(core.submit(1, submit_of(1, tenant=""), 0))
    accepted(core.submit(1, submit_of(2, tenant="b"), 0))
    refused = refusal(core.submit(1, submit_of(3, tenant="c"), 0, MEASURED))
    assert refused.detail.startswith("2 requests are open, the most is 2")
    core.cancel_frontend(1)
    accepted(core.submit(2, submit_of(4, tenant="c"), 0))


def test_what_was_admitted_once_is_not_held_against_a_limit_again_but_counts() -> None:
    core = core_of(max_concurrent=1)
    accepted(core.submit(1, submit_of(1, attempt=1), 0))
    accepted(core.submit(1, submit_of(2, attempt=1), 0))
    refusal(core.submit(1, submit_of(3), 0))
    core.cancel_frontend(1)
    assert core.discrepancy() == ""
    accepted(core.submit(1, submit_of(4), 0))


@pytest.mark.parametrize(("priority", "allowed"), [(-1, False), (0, True), (7, True)])
def test_a_key_says_how_urgent_its_requests_may_be(priority: int, allowed: bool) -> None:
    outcome = core_of(priority=0).submit(1, submit_of(1, priority=priority), 0)
    assert isinstance(outcome, Request) == allowed
    if isinstance(outcome, Rejected):
        assert outcome.code == 400
        assert "priority -1" in outcome.detail


@given(
    st.integers(1, 1000),
    st.lists(st.tuples(st.integers(0, 30 * S), st.integers(1, 300)), min_size=1, max_size=60),
)
def test_a_bucket_never_gives_more_than_its_rate_and_one_fill(
    per_minute: int, takings: list[tuple[int, int]]
) -> None:
    bucket, now_ns, given_out = Bucket(per_minute), S, 0
    for pause_ns, amount in takings:
        now_ns += pause_ns
        wait_ms = bucket.wait_ms(amount, now_ns)
        if wait_ms:
            assert bucket.wait_ms(amount, now_ns + wait_ms * 1_000_000) == 0, "then it is there"
            now_ns += wait_ms * 1_000_000
        bucket.take(amount)
        given_out += min(amount, per_minute)
        assert given_out <= per_minute + per_minute * (now_ns - S) / (60 * S) + 1e-6


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 3), st.integers(1, 4), st.booleans()), max_size=40)
)
def test_counts_of_open_requests_add_up(acts: list[tuple[str, int, int, bool]]) -> None:
    core = core_of(max_concurrent=3)
    numbers = iter(range(1, 10_000))
    for tenant, frontend, sequences, ends in acts:
        group = next(numbers)
        for _ in range(sequences):
            core.submit(frontend, submit_of(next(numbers), tenant, group=group), 0)
        if ends:
            core.cancel(frontend, group + 1)
        assert core.discrepancy() == ""
        mine = {request.group for request in core.book.all() if request.tenant == "a"}
        assert len(mine) <= 3
    for frontend in (1, 2, 3):
        core.cancel_frontend(frontend)
    assert len(core.book.quotas) == 0
    assert core.discrepancy() == ""
