"""Which request fails where ranks die of one, and that no other does."""

import pytest
from fakes.bench import Bench, rules

from shoal.messages import Sampling
from shoal.scheduler.apply import DEADLY
from shoal.scheduler.request import Ended
from shoal.scheduler.suspects import MOST_DEATHS

DEADLY_SEED = 17


def is_deadly(sampling: Sampling, generated: int) -> bool:
    """After three tokens."""
    return sampling.seed == DEADLY_SEED and generated >= 3


def ends(bench: Bench) -> list[str]:
    found = []
    for client in bench.clients.values():
        assert isinstance(client.end, Ended)
        found.append(client.end.detail or client.end.reason)
    return found


@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("most_drafts", [0, 3])
def test_only_the_request_that_ranks_die_of_fails(count: int, most_drafts: int) -> None:
    for deadly in range(count):
        bench = Bench(rules(instance_num=8, token_budget=32), 64, most_drafts=most_drafts, is_deadly=is_deadly)
        for number in range(count):
            bench.submit([number] * 3, 6, seed=DEADLY_SEED if number == deadly else 1)
        bench.run()
        expected = ["length"] * count
        expected[deadly] = DEADLY
        assert ends(bench) == expected
        halvings = (count - 1).bit_length()
        assert MOST_DEATHS <= bench.deaths <= MOST_DEATHS + halvings + (count > 1)


def test_several_deadly_ones_are_all_found() -> None:
    bench = Bench(rules(instance_num=8, token_budget=32), 64, is_deadly=is_deadly)
    seeds = [1, DEADLY_SEED, 1, 1, DEADLY_SEED, DEADLY_SEED, 1]
    for number, seed in enumerate(seeds):
        bench.submit([number] * 3, 6, seed=seed)
    bench.run()
    assert ends(bench) == [DEADLY if seed == DEADLY_SEED else "length" for seed in seeds]


def test_who_comes_while_others_are_on_trial_waits_and_is_served() -> None:
    bench = Bench(rules(instance_num=8, token_budget=32), 64, is_deadly=is_deadly)
    for number in range(4):
        bench.submit([number] * 3, 6, seed=DEADLY_SEED if number == 2 else 1)
    while bench.deaths < 2:
        bench.plan()
        bench.answer()
    late = bench.submit([5], 2)
    bench.plan()
    assert bench.request(late) in list(bench.core.book.waiting)
    bench.run()
    assert ends(bench) == ["length", "length", DEADLY, "length", "length"]


def test_kills_from_outside_fail_nobody_that_goes_on_between_them() -> None:
    bench = Bench(rules(instance_num=4, token_budget=32), 64)
    for number in range(3):
        bench.submit([number] * 3, 20)
    for _ in range(8):
        for _ in range(4):
            bench.plan()
            bench.answer()
        bench.crash()
    bench.run()
    assert ends(bench) == ["length"] * 3


def test_one_that_ends_on_trial_lets_the_others_go_on() -> None:
    bench = Bench(rules(instance_num=4, token_budget=32), 64, is_deadly=is_deadly)
    numbers = [bench.submit([number] * 3, 6, seed=DEADLY_SEED if number == 0 else 1) for number in range(4)]
    while bench.deaths < 3:
        bench.plan()
        bench.answer()
    bench.cancel(numbers[0])
    bench.run()
    assert ends(bench)[1:] == ["length"] * 3
