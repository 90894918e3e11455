"""What a step computes, case by case; ``Bench`` checks the invariants on the way."""

from collections.abc import Iterable

import pytest
from fakes.bench import Bench, rules

from shoal.messages import Sampling
from shoal.scheduler.plan import Step, message
from shoal.wire import unpack_ids


def rows(step: Step | None) -> dict[int, tuple[int, int, bool]]:
    """request number → (start, count, samples)."""
    assert step is not None
    return {row.request.request_no: (row.start, row.count, row.samples) for row in step.rows}


def numbers(start: int, length: int) -> list[int]:
    """A prompt that shares nothing with those of another start."""
    return [start * 1000 + n for n in range(length)]


def bench_of(num_blocks: int = 64, most_drafts: int = 0, **changes: object) -> Bench:
    return Bench(rules(**changes), num_blocks, most_drafts=most_drafts)


def submit_all(bench: Bench, lengths: Iterable[int], max_tokens: int = 10) -> None:
    for index, length in enumerate(lengths):
        bench.submit(numbers(index + 1, length), max_tokens)


def test_a_prompt_is_computed_in_chunks_and_sampled_after_the_last() -> None:
    bench = bench_of(token_budget=8)
    submit_all(bench, [19])
    assert rows(bench.plan()) == {1: (0, 8, False)}
    assert rows(bench.plan()) == {1: (8, 8, False)}
    assert bench.plan() is None
    bench.answer()
    assert rows(bench.plan()) == {1: (16, 3, True)}
    bench.answer()
    assert rows(bench.plan()) == {1: (19, 1, True)}


def test_the_next_plan_leaves_before_the_result_of_the_last() -> None:
    bench = bench_of()
    submit_all(bench, [3], max_tokens=3)
    assert rows(bench.plan()) == {1: (0, 3, True)}
    assert rows(bench.plan()) == {1: (3, 1, True)}
    assert bench.request(1).pending == 2
    bench.answer()
    assert rows(bench.plan()) == {1: (4, 1, True)}
    bench.answer()
    assert bench.plan() is None
    bench.answer()
    assert bench.core.stale_rows == 0
    assert bench.clients[1].answer == bench.clients[1].expected()


def drafts(step: Step | None) -> dict[int, int]:
    """request number → how many tokens may be guessed."""
    assert step is not None
    return {row.request.request_no: row.drafts for row in step.rows}


def test_what_decodes_leave_of_the_budget_may_be_guessed() -> None:
    bench = bench_of(token_budget=8, most_drafts=5)
    submit_all(bench, [3, 3], max_tokens=30)
    assert drafts(bench.plan()) == {1: 0, 2: 0}
    assert drafts(bench.plan()) == {1: 3, 2: 3}
    bench.submit(numbers(9, 30), 5)
    bench.answer()
    bench.answer()
    assert drafts(bench.plan()) == {1: 0, 2: 0, 3: 0}
    bench.run()


def test_where_guesses_are_in_flight_the_next_row_starts_at_the_last_token_whichever_that_is() -> None:
    bench = bench_of(token_budget=8, most_drafts=3)
    submit_all(bench, [3], max_tokens=30)
    bench.plan()
    bench.answer()
    step = bench.plan()
    assert (rows(step), drafts(step)) == ({1: (4 - 1, 1, True)}, {1: 3})
    step = bench.plan()
    assert (rows(step), drafts(step)) == ({1: (-1, 1, True)}, {1: 3})
    assert bench.request(1).virtual == 4 + 2 * 4
    bench.answer()
    bench.answer()
    assert (bench.request(1).pending, bench.request(1).drafted) == (0, 0)
    assert bench.request(1).planned == bench.request(1).known - 1
    bench.run()


@pytest.mark.parametrize(("prompts", "ahead"), [(3, True), (4, False)])
def test_steps_with_guesses_for_several_are_not_planned_ahead(prompts: int, ahead: bool) -> None:
    bench = bench_of(token_budget=64, most_drafts=3)
    submit_all(bench, [3] * prompts, max_tokens=30)
    bench.plan()
    bench.answer()
    assert set(drafts(bench.plan()).values()) == {3}
    assert (bench.plan() is not None) == ahead
    bench.answer()
    assert bench.plan() is not None
    bench.run()


def test_no_more_is_guessed_than_a_request_may_have() -> None:
    bench = bench_of(most_drafts=5)
    submit_all(bench, [3], max_tokens=6)
    bench.plan()
    bench.answer()
    assert drafts(bench.plan()) == {1: 4}
    assert bench.plan() is None, "the one in flight may bring all that is left"
    bench.run()
    assert bench.clients[1].answer == bench.clients[1].expected()


def test_nothing_is_guessed_where_draws_depend_on_the_draws_before_them() -> None:
    bench = bench_of(token_budget=64, most_drafts=5)
    bench.submit(numbers(1, 3), 20, allowed_ids=(1, 2, 3))
    bench.submit(numbers(2, 3), 20)
    bench.plan()
    assert drafts(bench.plan()) == {1: 0, 2: 5}
    bench.run()


def test_guesses_take_no_block_that_somebody_who_runs_may_need() -> None:
    bench = bench_of(num_blocks=4, token_budget=64, most_drafts=9, block_size=4, instance_num=1)
    submit_all(bench, [6], max_tokens=9)
    bench.plan()
    assert drafts(bench.plan()) == {1: 4 - 1 + 2}
    assert bench.core.pool.available == 1
    bench.run()


def test_decodes_come_first_and_prompts_fill_the_rest() -> None:
    bench = bench_of(token_budget=8)
    submit_all(bench, [3, 3])
    bench.plan()
    bench.submit(numbers(9, 30), 5)
    assert rows(bench.plan()) == {1: (3, 1, True), 2: (3, 1, True), 3: (0, 6, False)}


def test_a_long_prompt_leaves_half_to_those_behind_it_shortest_first() -> None:
    bench = bench_of(token_budget=8)
    submit_all(bench, [40, 30, 3])
    assert rows(bench.plan()) == {3: (0, 3, True), 2: (0, 1, False), 1: (0, 4, False)}


def test_a_short_late_request_ends_before_a_long_early_one() -> None:
    bench = bench_of(num_blocks=200, token_budget=8, session_len=200)
    submit_all(bench, [150], max_tokens=2)
    for _ in range(3):
        bench.plan()
        bench.answer()
    bench.submit(numbers(7, 5), 4)
    while bench.clients[2].end is None:
        bench.plan()
        bench.answer()
    assert bench.clients[1].end is None
    bench.run()


def test_no_more_sequences_than_slots() -> None:
    bench = bench_of(instance_num=2, token_budget=64)
    submit_all(bench, [3, 3, 3])
    assert set(rows(bench.plan())) == {1, 2}
    assert len(bench.core.book.waiting) == 1
    bench.cancel(1)
    step = bench.plan()
    assert set(rows(step)) == {2, 3}
    assert step is not None
    assert step.leave == (step.admitted[0].slot,)


def test_priority_goes_before_arrival() -> None:
    bench = bench_of(instance_num=1)
    bench.submit(numbers(1, 3), 5, priority=1)
    bench.submit(numbers(2, 3), 5, priority=1)
    bench.submit(numbers(3, 3), 5, priority=0)
    assert set(rows(bench.plan())) == {3}


def test_a_better_priority_takes_the_slot_of_a_worse_one() -> None:
    bench = bench_of(instance_num=1)
    bench.submit(numbers(1, 3), 5, priority=1)
    bench.plan()
    bench.submit(numbers(2, 3), 5, priority=0)
    step = bench.plan()
    assert set(rows(step)) == {2}
    assert step is not None
    assert step.preempted == 1
    bench.run()


def test_too_small_a_budget_is_rotated_among_decodes() -> None:
    bench = bench_of(instance_num=6, token_budget=4)
    submit_all(bench, [1] * 6, max_tokens=20)
    for _ in range(3):
        bench.plan()
        bench.answer()
    before = [bench.request(number).generated for number in range(1, 7)]
    for _ in range(6):
        bench.plan()
        bench.answer()
    after = [bench.request(number).generated for number in range(1, 7)]
    assert [late - early for early, late in zip(before, after, strict=True)] == [4] * 6
    bench.run()


@pytest.mark.parametrize("budget", [1, 2, 3, 4, 8])
def test_neither_decodes_nor_prompts_starve(budget: int) -> None:
    bench = bench_of(num_blocks=200, instance_num=9, token_budget=budget)
    submit_all(bench, [1] * 8, max_tokens=40)
    while min(bench.request(number).generated for number in range(1, 9)) < 1:
        bench.plan()
        bench.answer()
    bench.submit(numbers(50, 12), 30)
    before = sum(bench.request(number).generated for number in range(1, 9))
    for _ in range(12):
        bench.plan()
        bench.answer()
    assert bench.request(9).planned >= 4
    assert sum(bench.request(number).generated for number in range(1, 9)) >= before + 4
    bench.run()


def test_a_full_prompt_hit_still_computes_its_last_token() -> None:
    bench = bench_of(token_budget=64)
    bench.submit(numbers(1, 16), 4)
    bench.plan()
    bench.submit(numbers(1, 16), 4)
    assert rows(bench.plan())[2] == (12, 4, True)
    assert bench.request(2).cached_tokens == 12
    assert bench.request(2).blocks[:3] == bench.request(1).blocks[:3]
    bench.run()


def test_out_of_blocks_idle_ones_go_first_then_the_youngest() -> None:
    bench = bench_of(num_blocks=6, token_budget=64)
    bench.submit(numbers(9, 8), 1)
    bench.run()
    assert bench.core.pool.idle == 2
    submit_all(bench, [8, 8], max_tokens=12)
    preempted = []
    while not preempted:
        step = bench.plan()
        assert step is not None
        preempted += [bench.core.book.waiting] if step.preempted else []
        bench.answer()
    assert [request.request_no for request in bench.core.book.waiting] == [3]
    (waiting,) = bench.core.book.waiting
    assert waiting.planned == waiting.pending == 0
    assert waiting.generated == len(bench.clients[3].answer) > 0
    bench.run()
    assert [bench.clients[number].answer for number in (2, 3)] == [
        bench.clients[number].expected() for number in (2, 3)
    ]


def test_a_prompt_enters_only_when_all_of_it_fits() -> None:
    bench = bench_of(num_blocks=10, token_budget=8)
    submit_all(bench, [32, 20], max_tokens=4)
    step = bench.plan()
    assert set(rows(step)) == {1}
    assert len(bench.core.book.waiting) == 1
    bench.run()


def test_the_message_says_what_the_step_says() -> None:
    bench = bench_of(token_budget=8)
    bench.submit(numbers(1, 10), 9, seed=5, generated=3)
    step = bench.plan()
    assert step is not None
    plan = message(step, 4, 77)
    (seat,) = plan.admit
    assert (plan.crew_epoch, plan.step_id) == (4, 77)
    assert unpack_ids(seat.prompt) == numbers(1, 10)
    assert unpack_ids(seat.generated) == bench.clients[1].expected()[:3]
    assert seat.sampling == Sampling(5)
    assert [unpack_ids(raw) for raw in (plan.slots, plan.starts, plan.counts)] == [[seat.slot], [0], [8]]
    assert plan.samples == b"\x00"
    assert unpack_ids(plan.block_counts) == [2]
    assert unpack_ids(plan.new_blocks) == bench.request(1).blocks
    second = bench.plan()
    assert second is not None
    assert second.admitted == ()
    assert second.rows[0].new_blocks == tuple(bench.request(1).blocks[2:])


def test_nothing_to_do_is_no_plan() -> None:
    bench = bench_of()
    assert bench.plan() is None
