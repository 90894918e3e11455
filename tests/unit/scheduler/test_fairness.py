"""Whose turn it is: tenants by what they were served, requests of one tenant by arrival, priorities before both."""

from collections import Counter

import pytest
from fakes.bench import Bench, rules

from shoal.scheduler.fairness import Shares


def bench_of(**changes: object) -> Bench:
    return Bench(rules(**{"session_len": 200, **changes}), 200)


def admitted(bench: Bench) -> list[int]:
    """Request numbers in the order in which they first got a seat."""
    return [request.request_no for step in bench.steps for request in step.admitted]


def tokens_by_tenant(bench: Bench, steps: int) -> Counter[str]:
    return Counter(
        {
            tenant: sum(
                row.count for step in bench.steps[:steps] for row in step.rows if row.request.tenant == tenant
            )
            for tenant in ("a", "b")
        }
    )


def prompt(number: int, length: int) -> list[int]:
    return [number * 1000 + n for n in range(length)]


def test_a_tenant_that_floods_does_not_keep_another_waiting() -> None:
    bench = bench_of(instance_num=1)
    for number in range(6):
        bench.submit(prompt(number, 8), 4, tenant="a")
    late = bench.submit(prompt(9, 8), 4, tenant="b")
    bench.run()
    assert admitted(bench) == [1, late, 2, 3, 4, 5, 6]


def test_without_tenants_who_comes_first_is_served_first() -> None:
    bench = bench_of(instance_num=1)
    for number in range(5):
        bench.submit(prompt(number, 8), 4)
    bench.run()
    assert admitted(bench) == [1, 2, 3, 4, 5]


def test_tenants_share_by_tokens_not_by_requests() -> None:
    """One tenant's prompts are four times as long: it gets one seat where the other gets four."""
    bench = bench_of(instance_num=1, token_budget=64)
    for number in range(4):
        bench.submit(prompt(number, 39), 1, tenant="a")
    for number in range(10, 26):
        bench.submit(prompt(number, 9), 1, tenant="b")
    bench.run()
    order = [bench.clients[number].prompt[0] // 1000 for number in admitted(bench)]
    half = order[: len(order) // 2]
    assert sum(number < 10 for number in half) == 2


def test_running_prompts_of_two_tenants_are_computed_in_step() -> None:
    """Four long prompts of one tenant against one of another: the budget is shared by tenants, not by prompts."""
    bench = bench_of(instance_num=8, token_budget=8)
    for number in range(4):
        bench.submit(prompt(number, 100), 1, tenant="a")
    bench.submit(prompt(9, 100), 1, tenant="b")
    for _ in range(22):
        bench.plan()
        bench.answer()
    served = tokens_by_tenant(bench, 22)
    assert abs(served["a"] - served["b"]) <= 16
    assert served["b"] > 60


def test_a_better_priority_goes_first_whoever_was_served_more() -> None:
    bench = bench_of(instance_num=1)
    bench.submit(prompt(1, 30), 2, tenant="a")
    bench.plan()
    bench.submit(prompt(2, 8), 1, tenant="b")
    urgent = bench.submit(prompt(3, 8), 1, tenant="a", priority=-1)
    bench.run()
    assert admitted(bench).index(urgent) < admitted(bench).index(2)


def test_a_short_prompt_passes_a_long_one_of_its_own_tenant_only_by_turns_of_another() -> None:
    """The other half of a step goes to the tenant that was served least, not to whoever sends the shortest prompts."""
    bench = bench_of(instance_num=8, token_budget=16)
    bench.submit(prompt(1, 120), 1, tenant="a")
    bench.plan()
    bench.answer()
    for number in range(10, 14):
        bench.submit(prompt(number, 3), 1, tenant="a")
    bench.submit(prompt(9, 50), 1, tenant="b")
    step = bench.plan()
    assert step is not None
    assert {row.request.tenant for row in step.rows} == {"a", "b"}


def test_idle_time_saves_up_no_credit_and_debts_are_kept() -> None:
    shares = Shares()
    shares.enter("a")
    shares.charge("a", 1000)
    shares.enter("b")
    assert shares.served("b") == shares.served("a") == 1000
    shares.charge("a", 500)
    shares.leave("a")
    shares.enter("a")
    assert shares.served("a") - shares.served("b") == 500
    shares.charge("b", 800)
    shares.leave("a")
    shares.enter("a")
    assert shares.served("a") == shares.served("b")


def test_once_nobody_is_there_everybody_begins_anew() -> None:
    shares = Shares()
    shares.enter("a")
    shares.charge("a", 1000)
    shares.leave("a")
    shares.enter("b")
    shares.enter("a")
    assert shares.served("a") == shares.served("b")


@pytest.mark.parametrize("tenants", [1, 2, 5])
def test_tokens_of_a_preempted_row_are_not_paid_for(tenants: int) -> None:
    bench = Bench(rules(token_budget=32, session_len=40), 10)
    for number in range(6):
        bench.submit(prompt(number, 9), 20, tenant=f"t{number % tenants}")
    paid: Counter[str] = Counter()
    while bench.plan():
        step = bench.steps[-1]
        paid.update({row.request.tenant: 0 for row in step.rows})
        for row in step.rows:
            paid[row.request.tenant] += row.count
        if tenants == 1:
            assert bench.core.book.shares.served("t0") == paid["t0"]
        bench.answer()
    bench.run()


def test_a_second_priority_behind_more_requests_than_are_looked_at() -> None:
    bench = Bench(rules(session_len=200, instance_num=4), 200)
    for number in range(40):
        bench.submit([number * 1000 + n for n in range(8)], 4, priority=0)
    bench.submit([n + 90000 for n in range(8)], 4, priority=1)
    bench.run()
    assert not len(bench.core.book)
