"""Prompt log-probabilities and pooled states: right, and the same bits however a prompt is cut and batched."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from decoding import SMALL_LLAMA, Driver, Sequence, load_whole, random_checkpoint
from msgspec.structs import replace

from shoal.messages import Pooling, Sampling, Seat, StepPlan, StepResult, TokenLogprob
from shoal.wire import pack_ids, unpack_ids
from shoal.workers import readings
from shoal.workers.decoder import Decoder
from shoal.workers.kv_cache import KVCache
from shoal.workers.parallel import SoloGroup, split
from shoal.workers.runner import Runner
from shoal.workers.slots import PlanInvalid, SlotTable

BLOCK, BLOCKS, SESSION, SLOTS = 4, 64, 48, 5
MODEL = replace(SMALL_LLAMA, logit_soft_cap=5.0)
PARAMETERS = load_whole(random_checkpoint(MODEL, random.randrange(1 << 30)), MODEL)


class Rank:
    """A runner, and who sits where."""

    def __init__(self) -> None:
        shard, group = split(MODEL, 1, 0), SoloGroup()
        cache = KVCache(MODEL, shard, PARAMETERS.dtype, BLOCKS, BLOCK)
        decoder = Decoder(MODEL, shard, PARAMETERS, cache, group, SESSION)
        slots = SlotTable(SLOTS, SESSION, BLOCKS, BLOCK, MODEL.vocab_size, sampling=True)
        self._runner = Runner(decoder, group, slots, 1)
        self._lengths: dict[int, int] = {}
        self._computed: dict[int, int] = {}
        self._free = list(range(BLOCKS))
        self._blocks: dict[int, int] = {}

    def step(self, counts: dict[int, int], *admit: Seat, leave: tuple[int, ...] = ()) -> StepResult:
        """Computes so many more tokens of each slot."""
        for slot in leave:
            del self._lengths[slot]
        for seat in admit:
            self._lengths[seat.slot] = len(unpack_ids(seat.prompt)) + len(unpack_ids(seat.generated))
            self._computed[seat.slot] = self._blocks[seat.slot] = 0
        starts = {slot: self._computed[slot] for slot in counts}
        taken = {}
        for slot, count in counts.items():
            self._computed[slot] += count
            taken[slot] = -(-self._computed[slot] // BLOCK) - self._blocks[slot]
            self._blocks[slot] += taken[slot]
        samples = [self._computed[slot] == self._lengths[slot] for slot in counts]
        for slot, sampled in zip(counts, samples, strict=True):
            self._lengths[slot] += sampled
        return self._runner.execute(
            StepPlan(
                crew_epoch=1,
                step_id=1,
                leave=pack_ids(leave),
                admit=admit,
                slots=pack_ids(counts),
                starts=pack_ids(starts.values()),
                counts=pack_ids(counts.values()),
                samples=bytes(samples),
                block_counts=pack_ids(taken.values()),
                new_blocks=pack_ids(self._free.pop() for _ in range(sum(taken.values()))),
            )
        )


def seat(slot: int, prompt: list[int], generated: tuple[int, ...] = (), **wishes: Any) -> Seat:
    return Seat(slot, 7, pack_ids(prompt), pack_ids(generated), Sampling(seed=3), **wishes)


def random_prompt(length: int) -> list[int]:
    return [random.randrange(MODEL.vocab_size) for _ in range(length)]


def reference_logprobs(prompt: list[int]) -> torch.Tensor:
    """float64 [positions, vocabulary]."""
    logits = Driver(MODEL, PARAMETERS, SESSION).logits([(Sequence(prompt), len(prompt))])
    return torch.log_softmax(logits.double(), dim=-1)


def read_in_chunks(prompt: list[int], chunks: list[int], company: bool, **wishes: Any) -> list[StepResult]:
    """Slot 2's prompt cut like this, alone or among other rows."""
    rank = Rank()
    results = []
    for number, count in enumerate(chunks):
        seats = [seat(2, prompt, **wishes)] if number == 0 else []
        rows = {2: count}
        if company and number == 0:
            seats = [seat(4, random_prompt(9)), *seats, seat(0, random_prompt(30), prompt_logprobs=1)]
            rows = {4: 9, 2: count, 0: 13}
        results.append(rank.step(rows, *seats))
    return results


def scores_of(results: list[StepResult], slot: int) -> list[TokenLogprob]:
    """In order, without a gap."""
    found: list[TokenLogprob] = []
    for result in results:
        for row in result.scored:
            if row.slot == slot:
                assert (row.epoch, row.position) == (7, 1 + len(found))
                found += row.logprobs
    return found


CUTS = [[23], [1, 22], [7, 1, 1, 14], [4] * 5 + [3], [22, 1]]


def test_prompt_logprobs_are_those_of_the_plain_run() -> None:
    prompt = random_prompt(23)
    expected = reference_logprobs(prompt)
    found = scores_of(read_in_chunks(prompt, [23], company=False, prompt_logprobs=3), 2)
    assert len(found) == 22
    for position, entry in enumerate(found, 1):
        row = expected[position - 1]
        assert entry.logprob == pytest.approx(row[prompt[position]].item(), abs=1e-5)
        best = torch.topk(row, 3)
        assert [token_id for token_id, _ in entry.top] == best.indices.tolist()
        assert [logprob for _, logprob in entry.top] == pytest.approx(best.values.tolist(), abs=1e-5)


@pytest.mark.parametrize("company", [False, True])
def test_prompt_logprobs_are_the_same_bits_however_the_prompt_is_cut(
    company: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_prompt(23)
    expected = scores_of(read_in_chunks(prompt, [23], company=False, prompt_logprobs=2), 2)
    monkeypatch.setattr(readings, "_SLICE_LOGITS", 5 * MODEL.vocab_size)
    for cut in CUTS:
        assert scores_of(read_in_chunks(prompt, cut, company, prompt_logprobs=2), 2) == expected


def test_a_token_of_the_answer_is_not_scored() -> None:
    rank = Rank()
    first = rank.step({1: 5}, seat(1, random_prompt(5), prompt_logprobs=0))
    second = rank.step({1: 1})
    assert [len(row.logprobs) for row in first.scored] == [4]
    assert second.scored == ()
    assert len(unpack_ids(second.ids)) == 1


def test_generated_tokens_of_a_former_residence_are_not_scored() -> None:
    result = Rank().step({1: 8}, seat(1, random_prompt(5), (3, 1, 4), prompt_logprobs=0))
    assert [len(row.logprobs) for row in result.scored] == [4]


def test_one_token_has_nothing_to_be_scored() -> None:
    assert Rank().step({1: 1}, seat(1, [5], prompt_logprobs=0)).scored == ()


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("company", [False, True])
def test_a_vector_is_pooled_from_the_states_and_the_same_bits_however_the_prompt_is_cut(
    pooling: Pooling, company: bool
) -> None:
    prompt = random_prompt(23)
    whole = read_in_chunks(prompt, [23], company=False, pooling=pooling)[0]
    for cut in CUTS:
        results = read_in_chunks(prompt, cut, company, pooling=pooling)
        assert all(result.pooled == () for result in results[:-1])
        (row,) = results[-1].pooled
        assert (row.slot, row.epoch) == (2, 7)
        assert row.vector == whole.pooled[0].vector
    states = states_of(prompt)
    expected = states.mean(0) if pooling == "mean" else states[-1]
    np.testing.assert_allclose(np.frombuffer(whole.pooled[0].vector, "<f4"), expected, atol=1e-6)


def states_of(prompt: list[int]) -> np.ndarray[Any, Any]:
    """float64 [positions, hidden], each as the last of a prompt of its own."""
    rows = []
    for end in range(1, len(prompt) + 1):
        result = Rank().step({0: end}, seat(0, prompt[:end], pooling="last"))
        rows.append(np.frombuffer(result.pooled[0].vector, "<f4").astype(np.float64))
    return np.stack(rows)


def test_a_pooled_row_is_among_the_sampled_ones_and_draws_nothing() -> None:
    rank = Rank()
    result = rank.step({3: 6, 1: 4}, seat(3, random_prompt(6), pooling="mean"), seat(1, random_prompt(4)))
    assert sorted(unpack_ids(result.slots)) == [1, 3]
    assert unpack_ids(result.epochs) == [7, 7]
    assert dict(zip(unpack_ids(result.slots), unpack_ids(result.ids), strict=True))[3] == 0


def test_a_prompt_as_long_as_a_session_can_be_pooled() -> None:
    result = Rank().step({0: SESSION}, seat(0, random_prompt(SESSION), pooling="last", prompt_logprobs=0))
    assert len(result.pooled) == 1
    assert len(result.scored[0].logprobs) == SESSION - 1


def test_a_vector_that_is_not_finite_fails_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Decoder.compute

    def broken(decoder: Decoder, inputs: Any) -> None:
        whole(decoder, inputs)
        decoder.hidden[2] = np.nan

    monkeypatch.setattr(Decoder, "compute", broken)
    result = Rank().step({0: 3, 1: 3}, seat(0, [1, 2, 3], pooling="mean"), seat(1, [1, 2, 3], pooling="mean"))
    assert dict(zip(unpack_ids(result.slots), unpack_ids(result.ids), strict=True)) == {0: -1, 1: 0}


def test_a_mean_over_a_cached_prefix_is_refused() -> None:
    rank = Rank()
    rank.step({0: 4}, seat(0, random_prompt(9), pooling="mean"))
    rank._computed[0] = 5
    with pytest.raises(PlanInvalid, match="mean"):
        rank.step({0: 4})


def test_who_sits_down_next_inherits_nothing() -> None:
    rank = Rank()
    rank.step({0: 5}, seat(0, random_prompt(5), pooling="mean", prompt_logprobs=0))
    result = rank.step({0: 4}, seat(0, random_prompt(4)), leave=(0,))
    assert (result.scored, result.pooled) == ((), ())
