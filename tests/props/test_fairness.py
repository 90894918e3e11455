"""Tenants that always have work are served alike, whatever they send; and nobody waits for ever."""

import pytest
from fakes.bench import Bench, rules
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.scheduler.fairness import Shares

LONGEST_PROMPT, LONGEST_ANSWER, SLOTS, BUDGET = 20, 4, 3, 8
BOUND = SLOTS * (LONGEST_PROMPT + LONGEST_ANSWER) + BUDGET
"""What runs in all slots at once, and a step: who has a seat keeps it."""
REQUESTS = st.lists(
    st.tuples(st.integers(1, LONGEST_PROMPT), st.integers(1, LONGEST_ANSWER)), min_size=8, max_size=30
)


def served_apart(requests: dict[str, list[tuple[int, int]]]) -> int:
    """The most that two tenants ever were apart while both had requests waiting."""
    bench = Bench(rules(instance_num=SLOTS, token_budget=BUDGET, prefix_caching=False), 200)
    for tenant, wanted in requests.items():
        for number, (length, answer) in enumerate(wanted):
            bench.submit([number % 7] * length, answer, tenant=tenant)
    book, apart = bench.core.book, 0
    while {request.tenant for request in book.waiting} == {*requests}:
        bench.plan()
        bench.answer()
        counts = [book.shares.served(tenant) for tenant in requests]
        apart = max(apart, max(counts) - min(counts))
    bench.run()
    return apart


@settings(max_examples=150, deadline=None)
@given(st.fixed_dictionaries({"a": REQUESTS, "b": REQUESTS, "c": REQUESTS}))
def test_tenants_that_have_work_are_served_alike(requests: dict[str, list[tuple[int, int]]]) -> None:
    assert served_apart(requests) <= BOUND


def test_the_bound_would_notice_an_unfair_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shares, "served", lambda shares, tenant: 0)
    flood = [(20, 4)] * 30
    bench = Bench(rules(instance_num=SLOTS, token_budget=BUDGET, prefix_caching=False), 200)
    for tenant in ("a", "b"):
        for length, answer in flood:
            bench.submit([1] * length, answer, tenant=tenant)
    for _ in range(40):
        bench.plan()
        bench.answer()
    counts = bench.core.book.shares._served
    assert abs(counts["a"] - counts["b"]) > BOUND
