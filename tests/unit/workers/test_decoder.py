"""What the decoder promises whatever the model: chunks, shared prefixes, batches and ranks change nothing.

That it computes the right thing is tests/e2e/test_families.py.
"""

import random
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from decoding import Driver, Sequence, biased, load_whole, random_checkpoint, rich
from msgspec.structs import replace
from numpy.typing import NDArray
from torch import Tensor
from torch.testing import assert_close

from shoal.checkpoint.description import ModelDescription, Rope
from shoal.config import Quantization
from shoal.cuda_ext import ops
from shoal.cuda_ext.binding import library
from shoal.cuda_ext.program import Count, Program

SEED = random.randrange(1 << 30)
LENGTH = 41
PLAIN = ModelDescription(
    family="qwen3",
    vocab_size=149,
    hidden_size=44,
    num_layers=3,
    num_heads=9,
    num_kv_heads=3,
    head_dim=6,
    ffn_size=77,
    max_position=64,
    norm_eps=1e-5,
    qk_norm=True,
    rope=Rope(dim=6),
    layer_windows=(0, 0, 0),
    attention_scale=0.4,
)
RICH = replace(rich(PLAIN), num_heads=4)
BIASED = biased(PLAIN)
DESCRIPTIONS = pytest.mark.parametrize("description", [PLAIN, RICH, BIASED], ids=["plain", "rich", "biased"])


def drive(description: ModelDescription) -> Driver:
    return Driver(description, load_whole(random_checkpoint(description, SEED), description), LENGTH)


def prompt(length: int = LENGTH) -> list[int]:
    return [random.randrange(PLAIN.vocab_size) for _ in range(length)]


def close(found: Tensor, expected: Tensor) -> None:
    assert_close(found, expected, atol=1e-4, rtol=0)


@DESCRIPTIONS
def test_chunks_decodes_and_mixed_steps_equal_the_plain_run(description: ModelDescription) -> None:
    driver = drive(description)
    prompts = [prompt(length) for length in (41, 23, 9, 30)]
    plain = [drive(description).logits([(Sequence(ids), len(ids))]) for ids in prompts]
    assert plain[0].std() > 0.5
    sequences = [Sequence(ids) for ids in prompts]
    while any(sequence.computed < len(sequence.ids) for sequence in sequences):
        rows = [
            (sequence, min(random.choice([1, 1, 2, 5, 13]), len(sequence.ids) - sequence.computed))
            for sequence in random.sample(sequences, random.randint(1, 4))
            if sequence.computed < len(sequence.ids)
        ]
        if not rows:
            continue
        starts = [sequence.computed for sequence, _ in rows]
        parts = driver.logits(rows).split([count for _, count in rows])
        for (sequence, count), start, part in zip(rows, starts, parts, strict=True):
            close(part, plain[sequences.index(sequence)][start : start + count])


@DESCRIPTIONS
def test_a_shared_prefix_equals_computing_it_again(description: ModelDescription) -> None:
    driver = drive(description)
    first = Sequence(prompt())
    driver.logits([(first, LENGTH)])
    another = (first.ids[27] + 1) % PLAIN.vocab_size
    second = driver.share(first, [*first.ids[:27], another, *prompt(13)])
    assert second.computed == 24
    found = driver.logits([(second, LENGTH - 24)])
    close(found, drive(description).logits([(Sequence(second.ids), LENGTH)])[24:])


@DESCRIPTIONS
def test_states_that_nobody_wants_change_no_other(description: ModelDescription) -> None:
    """Of each row the last ones alone, also none of some or of all: to the bit those of a step that gives all, and so
    are those of the next step, which reads keys and values of every token."""
    prompts = [prompt(length) for length in (17, 1, 9, 23)]
    lengths = [len(ids) - 1 for ids in prompts]

    def two_steps(wanted: list[int] | None) -> tuple[Tensor, Tensor]:
        driver, sequences = drive(description), [Sequence(ids) for ids in prompts]
        first = driver.states(list(zip(sequences, lengths, strict=True)), wanted).clone()
        return first, driver.states([(sequence, 1) for sequence in sequences]).clone()

    everything, following = two_steps(None)
    for wanted in ([1, 0, 1, 1], [0, 0, 8, 3], [0, 0, 0, 2], [0, 0, 0, 0]):
        found, after = two_steps(wanted)
        parts = zip(everything.split(lengths), wanted, strict=True)
        assert torch.equal(found, torch.cat([states[len(states) - count :] for states, count in parts]))
        assert torch.equal(after, following)


def test_a_step_that_samples_nothing_gives_no_rows() -> None:
    driver = drive(PLAIN)
    assert driver.logits([(Sequence(prompt()), LENGTH)]).shape == (LENGTH, PLAIN.vocab_size)
    assert driver.logits([]).shape == (0, PLAIN.vocab_size)


@DESCRIPTIONS
def test_bfloat16_is_close_to_float32(description: ModelDescription) -> None:
    ids = prompt()
    expected = drive(description).logits([(Sequence(ids), LENGTH)])
    parameters = load_whole(random_checkpoint(description, SEED), description, dtype=torch.bfloat16)
    driver, sequence = Driver(description, parameters, LENGTH), Sequence(ids)
    found = torch.cat([driver.logits([(sequence, count)]) for count in (LENGTH - 1, 1)])
    assert found.dtype == torch.float32
    assert (found - expected).square().mean().sqrt() < 0.05 * expected.std()


@DESCRIPTIONS
@pytest.mark.parametrize("quantization", ["w8", "w4"])
def test_gates_in_the_product_are_those_of_two_operators(
    description: ModelDescription, quantization: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One operator for gates, ups and their product, or two: but for a rounding of activations."""
    compiled = library()
    if compiled is None or not compiled.has_tiles:
        pytest.skip("there are no tiles")
    whole = replace(description, ffn_size=96)
    parameters = load_whole(random_checkpoint(whole, SEED), whole, quantization=quantization)
    assert all(layer.ffn.gates_in_product for layer in parameters.layers)
    ids = prompt()

    def run() -> Tensor:
        driver, sequence = Driver(whole, parameters, LENGTH), Sequence(ids)
        return torch.cat([driver.logits([(sequence, count)]) for count in (20, 1, 1, LENGTH - 22)])

    found = run()
    assert torch.equal(Driver(whole, parameters, LENGTH).logits([(Sequence(ids), LENGTH)]), found)
    monkeypatch.setattr(ops, "gates_in_product", lambda *_: False)
    assert (run() - found).square().mean().sqrt() < 0.005 * found.std()


def test_windowed_layers_forget_and_local_rope_is_theirs_alone() -> None:
    windows = replace(RICH, layer_windows=(7, 7, 7), attention_soft_cap=0.0)
    ids = prompt()
    changed = [(ids[0] + 1) % RICH.vocab_size, *ids[1:]]
    before, after = (drive(windows).logits([(Sequence(i), LENGTH)]) for i in (ids, changed))
    assert_close(before[19:], after[19:], atol=1e-5, rtol=0)
    assert (before[:18] - after[:18]).abs().amax(dim=1).min() > 1e-4
    other = replace(windows, rope=Rope(dim=6, theta=77.0))
    close(drive(other).logits([(Sequence(ids), LENGTH)]), before)


class ThreadGroup:
    """Ranks that are threads of this process. One computes at a time: the operators are called from one thread."""

    def __init__(
        self, shared: list[Tensor], barrier: threading.Barrier, turn: threading.Lock, rank: int
    ) -> None:
        self._shared = shared
        self._barrier = barrier
        self._turn = turn
        self._rank = rank

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self._shared[self._rank] = x.clone()
        self._turn.release()
        self._barrier.wait(20)
        everyone = list(self._shared)
        self._barrier.wait(20)
        self._turn.acquire()
        return everyone

    def add_up(self, program: Program, x: Tensor, rows: Count) -> None:
        def run() -> None:
            part = x[: rows.value]
            part.copy_(torch.stack(self._exchange(part)).sum(0))

        program.add_function(run)

    def gather_columns(
        self, program: Program, x: Tensor, widths: tuple[int, ...], rows: Count
    ) -> Tensor | None:
        out = torch.zeros(len(x), sum(widths))

        def run() -> None:
            parts = self._exchange(x[: rows.value])
            assert tuple(part.shape[1] for part in parts) == widths
            out[: rows.value] = torch.cat(parts, dim=1)

        program.add_function(run)
        return out if self._rank == 0 else None

    def broadcast(self, ids: NDArray[np.int64]) -> None:
        ids[:] = self._exchange(torch.from_numpy(ids))[0].numpy()

    def close(self) -> None:
        self._barrier.abort()


def on_ranks(tp: int, run: Callable[[int, ThreadGroup], None]) -> None:
    shared, barrier, turn = [torch.empty(0)] * tp, threading.Barrier(tp), threading.Lock()

    def take_turns(rank: int) -> None:
        with turn:
            run(rank, ThreadGroup(shared, barrier, turn, rank))

    threads = [threading.Thread(target=take_turns, args=(rank,)) for rank in range(tp)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)


@DESCRIPTIONS
@pytest.mark.parametrize("tp", [2, 3])
def test_ranks_together_equal_one(description: ModelDescription, tp: int) -> None:
    ids = prompt()
    expected = drive(description).logits([(Sequence(ids), LENGTH)])
    found: list[Tensor | None] = [expected] * tp

    def run(rank: int, group: ThreadGroup) -> None:
        parameters = load_whole(random_checkpoint(description, SEED), description, tp, rank)
        driver = Driver(description, parameters, LENGTH, group, tp, rank)
        sequence = Sequence(ids)
        first, rest = driver.step([(sequence, 17)]), driver.step([(sequence, LENGTH - 17)])
        found[rank] = None if first is None or rest is None else torch.cat((first, rest))

    on_ranks(tp, run)
    assert found[1:] == [None] * (tp - 1)
    assert found[0] is not None
    close(found[0], expected)
