"""The slot table against a plain model of it, and its refusal of plans that contradict it."""

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from plans import plan

from shoal.messages import Sampling, Seat
from shoal.wire import pack_ids, unpack_ids
from shoal.workers.drafts import Drafter
from shoal.workers.sampler import NOT_KEPT
from shoal.workers.slots import PlanInvalid, SlotTable

VOCAB, BLOCK, BLOCKS, SESSION = 97, 4, 64, 40


def table(num_slots: int = 5, *, sampling: bool = True) -> SlotTable:
    return SlotTable(num_slots, SESSION, BLOCKS, BLOCK, VOCAB, sampling=sampling)


def seat(slot: int, prompt: list[int], generated: list[int] | None = None, epoch: int = 1) -> Seat:
    return Seat(slot, epoch, pack_ids(prompt), pack_ids(generated or []), Sampling(seed=slot))


@dataclass
class Plain:
    """One sequence of the model that the table is compared with."""

    tokens: list[int]
    planned: int = 0
    blocks: list[int] = field(default_factory=list)


def test_random_steps_give_the_arrays_of_a_plain_model() -> None:
    rng = random.Random()
    slots, free = table(), list(range(BLOCKS))
    rng.shuffle(free)
    plain: dict[int, Plain] = {}
    for step in range(60):
        leave = [slot for slot in plain if rng.random() < 0.1 or len(plain[slot].tokens) > SESSION - 3]
        for slot in leave:
            free += plain.pop(slot).blocks
        admit = [
            seat(slot, [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 12))], epoch=step)
            for slot in range(5)
            if slot not in plain and (rng.random() < 0.5 or not plain)
        ]
        plain |= {new.slot: Plain(unpack_ids(new.prompt)) for new in admit}
        rows = []
        for slot in rng.sample(sorted(plain), rng.randrange(1, len(plain) + 1)):
            sequence = plain[slot]
            count = rng.randrange(1, len(sequence.tokens) - sequence.planned + 1)
            needed = -(-(sequence.planned + count) // BLOCK) - len(sequence.blocks)
            new = [free.pop() for _ in range(needed)]
            sequence.blocks += new
            samples = sequence.planned + count == len(sequence.tokens)
            rows.append((slot, sequence.planned, count, samples, new))
            sequence.planned += count
        planned = slots.apply(plan(rows, leave=pack_ids(leave), admit=tuple(admit)))
        inputs = slots.inputs(planned)
        expected = [
            (plain[slot].tokens[at], at, plain[slot].blocks[at // BLOCK] * BLOCK + at % BLOCK)
            for slot, start, count, _, _ in rows
            for at in range(start, start + count)
        ]
        found = zip(
            inputs.token_ids.tolist(), inputs.positions.tolist(), inputs.cache_slots.tolist(), strict=True
        )
        assert list(found) == expected
        ends = np.cumsum([row[2] for row in rows])
        assert inputs.query_starts.tolist() == [0, *ends]
        assert inputs.context_lens.tolist() == [row[1] + row[2] for row in rows]
        for row, blocks in zip(rows, inputs.block_tables.tolist(), strict=True):
            used = -(-(row[1] + row[2]) // BLOCK)
            assert blocks[:used] == plain[row[0]].blocks[:used]
        assert inputs.state_tokens.tolist() == [end - 1 for end, row in zip(ends, rows, strict=True) if row[3]]
        assert inputs.state_starts.tolist() == np.cumsum([0, *(row[3] for row in rows)]).tolist()
        assert inputs.sample_indices.tolist() == list(range(len(inputs.state_tokens)))
        sampled = planned.slots[planned.samples]
        ids = np.array([rng.randrange(VOCAB) for _ in sampled], np.int32)
        kept = slots.append(planned, ids)
        assert [each.tolist() for each in kept] == [sampled.tolist(), ids.tolist()]
        for slot, token_id in zip(sampled.tolist(), ids.tolist(), strict=True):
            plain[slot].tokens.append(token_id)


def test_prompt_and_generated_tokens_stay_apart_in_the_sampler() -> None:
    slots = table()
    rows = slots.apply(plan([(2, 0, 5, True, [3, 4])], admit=(seat(2, [1, 2, 3], [4, 5]),)))
    [sampler] = slots.samplers(np.array([2], np.int32))
    assert sampler.position == 2
    slots.append(rows, np.array([6], np.int32))
    assert sampler.position == 3


def test_guesses_are_computed_behind_the_last_token_and_the_wrong_ones_forgotten() -> None:
    drafter = Drafter(1e9)
    slots = SlotTable(5, SESSION, BLOCKS, BLOCK, VOCAB, sampling=True, drafter=drafter)
    seats = (seat(1, [7, 8, 9, 7, 8]), seat(3, [1, 2]), seat(4, [5, 6, 5]))
    rows = slots.apply(
        plan(
            [(1, 0, 5, True, [0, 1]), (3, 0, 2, True, [2]), (4, 0, 3, True, [3])],
            admit=seats,
        )
    )
    slots.append(rows, np.array([9, 3, 6], np.int32))
    # The first goes on 9 7 8 9 …, the second has seen nothing twice, the third may have no more than two guesses.
    again = [(1, -1, 1, True, [4]), (3, 2, 1, True, []), (4, -1, 1, True, [5])]
    rows = slots.apply(plan(again, drafts=pack_ids([4, 0, 2])))
    inputs = slots.inputs(rows)
    assert rows.counts.tolist() == [5, 1, 3]
    assert inputs.token_ids.tolist() == [9, 7, 8, 9, 7, 3, 6, 5, 6]
    assert inputs.positions.tolist() == [5, 6, 7, 8, 9, 2, 3, 4, 5]
    assert inputs.context_lens.tolist() == [10, 3, 6]
    assert inputs.state_tokens.tolist() == inputs.sample_indices.tolist() == list(range(9))
    assert inputs.state_starts.tolist() == [0, 5, 6, 9]
    drawn = np.array([7, 8, 1, NOT_KEPT, NOT_KEPT, 4, 5, 6, 5], np.int32)
    kept_slots, kept_ids = slots.append(rows, drawn)
    assert kept_slots.tolist() == [1, 1, 1, 3, 4, 4, 4]
    assert kept_ids.tolist() == [7, 8, 1, 4, 5, 6, 5]
    assert [sampler.position for sampler in slots.samplers(np.array([1, 3, 4], np.int32))] == [4, 2, 4]
    rows = slots.apply(plan([(1, 8, 1, True, []), (3, 3, 1, True, []), (4, 6, 1, True, [])]))
    inputs = slots.inputs(rows)
    assert inputs.token_ids.tolist() == [1, 4, 5]
    assert inputs.positions.tolist() == [8, 3, 6]


def test_without_a_drafter_a_plan_that_allows_guesses_is_computed_without() -> None:
    slots = table()
    slots.append(slots.apply(GOOD), np.array([3], np.int32))
    rows = slots.apply(plan([(0, -1, 1, True, [2])], drafts=pack_ids([4])))
    assert (rows.starts.tolist(), rows.counts.tolist(), rows.guessed.tolist()) == ([3], [1], [0])


GOOD = plan([(0, 0, 3, True, [1])], admit=(seat(0, [1, 2, 3]),))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"leave": pack_ids([1])}, "cannot leave"),
        ({"leave": b"\1\2"}, "length"),
        ({"admit": (seat(9, [1]),)}, "cannot be taken"),
        ({"admit": (seat(0, [1, 2, 3]), seat(0, [1, 2, 3]))}, "cannot be taken"),
        ({"admit": (seat(0, [1, 2, VOCAB]),)}, "do not fit the model"),
        ({"admit": (seat(0, [-1, 2, 3]),)}, "do not fit the model"),
        ({"admit": (seat(0, [1] * (SESSION + 1)),)}, "do not fit the model"),
        ({"admit": ()}, "free"),
        ({"slots": pack_ids([7])}, "existing slots"),
        ({"counts": pack_ids([4])}, "known tokens"),
        ({"counts": pack_ids([0])}, "known tokens"),
        ({"counts": pack_ids([2])}, "samples before"),
        ({"counts": pack_ids([2, 1])}, "differ in length"),
        ({"new_blocks": pack_ids([BLOCKS])}, "outside the cache"),
        ({"new_blocks": pack_ids([1, 2])}, "do not match"),
        ({"new_blocks": b"", "block_counts": pack_ids([0])}, "past its block table"),
        ({"new_blocks": pack_ids(range(11)), "block_counts": pack_ids([11])}, "more blocks"),
        ({"drafts": pack_ids([1])}, "only a row that decodes"),
        ({"drafts": pack_ids([0, 0])}, "differ in length"),
        (
            {"starts": pack_ids([2]), "counts": pack_ids([1]), "drafts": pack_ids([-1])},
            "only a row that decodes",
        ),
        ({"starts": pack_ids([2]), "counts": pack_ids([1]), "drafts": pack_ids([SESSION])}, "session length"),
        ({"starts": pack_ids([2]), "counts": pack_ids([1]), "drafts": pack_ids([2])}, "past its block table"),
        ({"starts": pack_ids([-2])}, "known tokens"),
    ],
)
def test_a_plan_that_contradicts_the_slots_is_refused(change: dict[str, Any], says: str) -> None:
    table().apply(GOOD)
    with pytest.raises(PlanInvalid, match=says):
        table().apply(replace(GOOD, **change))
