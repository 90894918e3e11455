"""Executes plans: slots → inputs → decoder → sampler → result. No socket in here."""

import time
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.messages import PooledRow, Sampling, Seat, StepPlan, StepResult, TokenLogprob
from shoal.wire import pack_ids
from shoal.workers.decoder import Decoder
from shoal.workers.drafts import NO_GUESS
from shoal.workers.parallel import Group
from shoal.workers.readings import score, score_on_host
from shoal.workers.sampler import NOT_KEPT, Sampler
from shoal.workers.slots import Int32s, PlannedRows, SlotTable

WARM_UP_PROMPT_TOKENS: Final = 6
"""With the two that are decoded after them no more than the smallest block."""


class PlanRunner(Protocol):
    """Runs the plans of one crew epoch."""

    @property
    def is_waiting(self) -> bool:
        """Whether a step was started and not finished."""

    def is_done(self) -> bool:
        """Whether ``finish`` would not have to wait."""

    def start(self, plan: StepPlan) -> StepResult | None:
        """Begins a step; the next result, if one is known."""

    def finish(self) -> StepResult | None:
        """The result of the step that was begun, if it has not been told."""

    def execute(self, plan: StepPlan) -> StepResult:
        """One step alone."""

    def use_idle_time(self) -> bool:
        """Some milliseconds of work that later steps would have to do; whether there is more of it."""

    def close(self) -> None:
        """Leaves the group: peers that still wait for this rank get ``PeerLost``."""


class Runner:
    """On the CPU: one crew epoch's decoder, group and slots. A step is done when it has been started."""

    is_waiting = False

    def __init__(self, decoder: Decoder, group: Group, slots: SlotTable, crew_epoch: int) -> None:
        self._decoder = decoder
        self._group = group
        self._slots = slots
        self._crew_epoch = crew_epoch
        self._sampler = Sampler()

    def close(self) -> None:
        self._group.close()

    def is_done(self) -> bool:
        return True

    def start(self, plan: StepPlan) -> StepResult:
        return self.execute(plan)

    def finish(self) -> None:
        """There is never a step left."""

    def use_idle_time(self) -> bool:
        """Memory for the blocks that come next."""
        return self._decoder.prepare_blocks(self._slots.last_block)

    def execute(self, plan: StepPlan) -> StepResult:
        """One step, on every rank alike; only rank 0's result is sent."""
        began_ns = time.perf_counter_ns()
        rows = self._slots.apply(plan)
        inputs = self._slots.inputs(rows)
        self._decoder.compute(inputs)
        # Drawn before anything else asks for logits: they lie in one buffer.
        ids, logprobs = self._draw(self._decoder.logits(inputs.sample_indices), rows)
        spans = self._slots.spans(rows)
        scored = score(partial(score_on_host, self._decoder.logits, self._decoder.vocab_size), spans)
        pooled = pool(rows, self._decoder.hidden, self._slots.epochs)
        slots, ids = self._slots.append(rows, ids)
        if pooled:
            slots = np.concatenate([slots, np.array([row.slot for row, _ in pooled], np.int32)])
            ids = np.concatenate([ids, np.array([token for _, token in pooled], np.int32)])
        return StepResult(
            crew_epoch=self._crew_epoch,
            step_id=plan.step_id,
            slots=slots.tobytes(),
            epochs=self._slots.epochs(slots).tobytes(),
            ids=ids.tobytes(),
            logprobs=logprobs + (None,) * len(pooled) if logprobs else (),
            compute_us=(time.perf_counter_ns() - began_ns) // 1000,
            drafted=int(rows.guessed.sum()),
            scored=scored,
            pooled=tuple(row for row, _ in pooled),
        )

    def _draw(
        self, logits: NDArray[np.float32] | None, rows: PlannedRows
    ) -> tuple[Int32s, tuple[TokenLogprob | None, ...]]:
        """Rank 0 draws; the others are told. Log-probabilities are of the ids that are kept."""
        drawing = np.flatnonzero(rows.draws)
        if len(drawing) == 0:
            return np.zeros(0, np.int32), ()
        ids = np.zeros(len(drawing) + int(rows.guessed.sum()), np.int64)
        logprobs: tuple[TokenLogprob | None, ...] = ()
        if logits is not None:
            guesses = []
            if rows.guesses:
                guesses = [rows.guesses.get(row, NO_GUESS).ids.tolist() for row in drawing.tolist()]
            drawn = self._sampler.sample(logits, self._slots.samplers(rows.slots[drawing]), guesses)
            ids[:] = [token.id for token in drawn]
            if any(token.logprob is not None for token in drawn):
                logprobs = tuple(token.logprob for token in drawn if token.id != NOT_KEPT)
        self._group.broadcast(ids)
        return ids.astype(np.int32), logprobs


def pool(
    rows: PlannedRows, hidden: NDArray[np.float32], epochs_of: Callable[[Int32s], Int32s]
) -> list[tuple[PooledRow, int]]:
    """The vectors of the prompts that a step completes, each with 0, or -1 where it is not finite. hidden: [N, hidden];
    epochs_of: those of slots."""
    if not rows.readings:
        return []
    ends, epochs = np.cumsum(rows.states), epochs_of(rows.slots)
    pooled = []
    for row, reading in rows.readings.items():
        if reading.pooling:
            reading.pool(hidden[ends[row] - rows.counts[row] : ends[row]])
            if rows.samples[row]:
                vector = reading.vector()
                told = PooledRow(int(rows.slots[row]), int(epochs[row]), vector.tobytes())
                pooled.append((told, 0 if np.isfinite(vector).all() else -1))
    return pooled


def warm_up(runner: PlanRunner, num_rows: int) -> None:
    """Runs a prefill and a decode step of ``num_rows`` sequences, then a decode step of one, through the normal path.

    The runner is one to throw away afterwards: its slots stay taken. The sequences write blocks 0 to
    ``num_rows`` − 1, which nobody owns yet.
    """
    slots, prompt_len = list(range(num_rows)), WARM_UP_PROMPT_TOKENS
    seats = tuple(Seat(slot, 0, pack_ids([0] * prompt_len), b"", Sampling(seed=0)) for slot in slots)
    ones = [1] * num_rows
    runner.execute(_warm_up_plan(slots, [0] * num_rows, [prompt_len] * num_rows, ones, admit=seats))
    runner.execute(_warm_up_plan(slots, [prompt_len] * num_rows, ones, [0] * num_rows))
    runner.execute(_warm_up_plan([0], [prompt_len + 1], [1], [0]))


def _warm_up_plan(
    slots: list[int],
    starts: list[int],
    counts: list[int],
    block_counts: list[int],
    *,
    admit: tuple[Seat, ...] = (),
) -> StepPlan:
    return StepPlan(
        crew_epoch=0,
        step_id=0,
        leave=b"",
        admit=admit,
        slots=pack_ids(slots),
        starts=pack_ids(starts),
        counts=pack_ids(counts),
        samples=bytes([1]) * len(slots),
        block_counts=pack_ids(block_counts),
        new_blocks=pack_ids(slots[: sum(block_counts)]),
    )
