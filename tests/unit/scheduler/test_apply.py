"""How results change requests, and how requests end."""

import pytest
from fakes.bench import Bench, rules

from shoal.messages import Rejected, Sampling, StepResult, Submit
from shoal.scheduler.apply import GRAMMAR_FAILED, NON_FINITE, NOTHING_ALLOWED, apply
from shoal.scheduler.pipeline import ResultMismatch
from shoal.scheduler.request import Ended, Sampled
from shoal.wire import pack_ids


def ended(bench: Bench, number: int) -> Ended:
    end = bench.clients[number].end
    assert isinstance(end, Ended)
    return end


def test_a_stop_id_ends_a_request_while_its_next_token_is_in_flight() -> None:
    bench = Bench(rules(), 32)
    number = bench.submit([1, 2, 3], 30, stop_ids=(0, 1, 2, 3))
    bench.run()
    assert ended(bench, number).reason == "stop"
    assert ended(bench, number).stop_id == bench.clients[number].answer[-1]
    assert len(bench.clients[number].answer) < 30
    assert bench.core.stale_rows == 1


def test_decoded_blocks_are_found_by_the_next_turn() -> None:
    bench = Bench(rules(), 32)
    first = bench.submit([1, 2, 3], 14)
    bench.run()
    turn = [1, 2, 3, *bench.clients[first].answer, 4]
    second = bench.submit(turn, 2)
    bench.plan()
    assert bench.request(second).cached_tokens == 16
    bench.run()


def test_a_preempted_request_reports_the_hits_of_its_first_seat() -> None:
    bench = Bench(rules(instance_num=1), 32)
    number = bench.submit([1] * 9, 8, priority=1)
    bench.plan()
    bench.submit([2] * 9, 2)
    bench.run()
    request = ended(bench, number).request
    assert request.cached_tokens == 0
    assert bench.clients[number].answer == bench.clients[number].expected()


def test_non_finite_logits_end_one_request_and_take_its_blocks_out_of_the_index() -> None:
    bench = Bench(rules(token_budget=64), 32, lambda sampling, generated: sampling.seed == 9)
    bad = bench.submit([1] * 10, 5, seed=9)
    bench.plan()
    sharer = bench.submit([1] * 10, 5, seed=2)
    bench.plan()
    assert bench.request(sharer).hits == 2
    bench.answer()
    assert ended(bench, bad).reason == "failed"
    assert ended(bench, bad).detail == NON_FINITE
    assert len(bench.core.pool.index) == 0
    assert bench.request(sharer).slot == -1
    bench.run()
    assert bench.clients[sharer].answer == bench.clients[sharer].expected()


@pytest.mark.parametrize(("token_id", "detail"), [(-2, NOTHING_ALLOWED), (-3, GRAMMAR_FAILED)])
def test_a_request_that_can_draw_nothing_fails_and_its_blocks_are_still_good(
    token_id: int, detail: str
) -> None:
    bench = Bench(rules(token_budget=64), 32)
    stuck = bench.submit([1] * 10, 5)
    sharer = bench.submit([1] * 10, 5)
    bench.plan()
    seat, found = bench.request(stuck), len(bench.core.pool.index)
    events, stale = apply(
        bench.core.book, bench.core.pool, [Sampled(seat.slot, seat.epoch, ((token_id, None),), 0)]
    )
    assert [(type(each), each.request) for each in events] == [(Ended, seat)]
    assert isinstance(events[0], Ended)
    assert (events[0].reason, events[0].detail, stale) == ("failed", detail, 0)
    assert len(bench.core.pool.index) == found > 0
    assert bench.request(sharer).slot >= 0


def test_what_ran_goes_on_with_the_next_crew() -> None:
    bench = Bench(rules(instance_num=2), 32)
    numbers = [bench.submit([number] * 5, 5) for number in range(3)]
    bench.plan()
    bench.answer()
    bench.plan()
    bench.crash()
    bench.run()
    assert [ended(bench, number).reason for number in numbers] == ["length"] * 3


def test_what_waits_and_does_not_fit_the_next_crew_ends() -> None:
    bench = Bench(rules(instance_num=1), 32)
    bench.submit([1], 2)
    bench.plan()
    waiting = bench.core.submit(1, Submit(77, "big", pack_ids([1] * 40), Sampling(1), 20), bench.now_ns)
    assert not isinstance(waiting, Rejected)
    bench.crash()
    bench.core.crew_lost()
    (end,) = bench.core.crew_up(9, 3)
    assert isinstance(end, Ended)
    assert end.reason == "failed"
    assert "15 KV blocks" in end.detail


@pytest.mark.parametrize(
    "change",
    [
        {"slots": pack_ids([]), "epochs": pack_ids([]), "ids": pack_ids([])},
        {"epochs": pack_ids([9])},
        {"slots": pack_ids([0, 0]), "epochs": pack_ids([1, 1]), "ids": pack_ids([1, 1])},
        {"slots": pack_ids([0, 1]), "epochs": pack_ids([1, 1]), "ids": pack_ids([1, 1])},
        {"ids": b"123"},
        {"logprobs": (None, None)},
    ],
)
def test_a_result_with_other_rows_than_planned_is_refused(change: dict[str, object]) -> None:
    bench = Bench(rules(), 32)
    bench.submit([1, 2, 3], 5)
    bench.plan()
    right: dict[str, object] = {
        "crew_epoch": 1,
        "step_id": 1,
        "slots": pack_ids([0]),
        "epochs": pack_ids([1]),
        "ids": pack_ids([4]),
    }
    with pytest.raises(ResultMismatch):
        bench.core.collect(StepResult(**(right | change)))  # type: ignore[arg-type]
    assert bench.core.collect(StepResult(**right)) is not None  # type: ignore[arg-type]


@pytest.mark.parametrize(("crew_epoch", "step_id"), [(1, 2), (1, 0), (2, 1), (0, 1)])
def test_late_early_and_foreign_results_are_dropped_and_counted(crew_epoch: int, step_id: int) -> None:
    bench = Bench(rules(), 32)
    bench.submit([1, 2, 3], 5)
    bench.plan()
    wrong = StepResult(crew_epoch, step_id, pack_ids([0]), pack_ids([1]), pack_ids([4]))
    assert bench.core.collect(wrong) is None
    assert bench.core.pipeline.stale_results == 1
    bench.run()
