"""Executes plans on a device, one step ahead of what has been read: what ``runner`` is for the CPU.

A step is on the device's stream before the one before it is read. What it wants of that one's tokens, it finds on the
device; what the host has to add, penalties, masks and random numbers, is put behind the step's own forward pass, and by
then the tokens are known.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.cuda_ext.cuda_device import CudaDevice
from shoal.messages import PooledRow, ScoredRow, StepPlan, StepResult, TokenLogprob
from shoal.workers.cuda_decoder import CudaDecoder
from shoal.workers.cuda_group import DeviceGroup
from shoal.workers.cuda_sampler import CudaSampler, Draws
from shoal.workers.inputs import StepInputs
from shoal.workers.readings import score
from shoal.workers.runner import pool
from shoal.workers.slots import Int32s, PlannedRows, SlotTable


@dataclass(frozen=True, slots=True)
class _Started:
    """A step on the stream."""

    plan: StepPlan
    began_ns: int
    slots: Int32s
    epochs: Int32s
    draws: Draws | None
    """On rank 0."""
    results: dict[str, NDArray[Any]]
    scored: tuple[ScoredRow, ...]
    pooled: Sequence[tuple[PooledRow, int]]


class CudaRunner:
    """One crew epoch's decoder and slots."""

    def __init__(
        self,
        decoder: CudaDecoder,
        sampler: CudaSampler | None,
        slots: SlotTable,
        device: CudaDevice,
        group: DeviceGroup,
        crew_epoch: int,
    ) -> None:
        """sampler: rank 0's; the others are told."""
        self._group = group
        self._decoder = decoder
        self._sampler = sampler
        self._slots = slots
        self._device = device
        self._mark = device.mark()
        self._crew_epoch = crew_epoch
        self._started: _Started | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether a step was started and not finished."""
        return self._started is not None

    def is_done(self) -> bool:
        """Whether ``finish`` would not have to wait."""
        return self._mark.is_reached()

    def execute(self, plan: StepPlan) -> StepResult:
        """One step alone."""
        self.start(plan)
        result = self.finish()
        assert result is not None
        return result

    def start(self, plan: StepPlan) -> StepResult | None:
        """Puts a step on the stream; the result of the one before it, if that was not read yet."""
        began_ns = time.perf_counter_ns()
        rows = self._slots.apply(plan)
        inputs = self._slots.inputs(rows)
        self._decoder.start(inputs, self._slots.sources(rows))
        before = self.finish()
        slots = rows.slots[rows.draws]
        epochs = self._slots.epochs(slots)
        pooled = self._pool(rows, inputs)
        draws = self._sampler.start(self._slots.samplers(slots)) if self._sampler is not None else None
        results = self._decoder.bring_results()
        scored = self._score(rows, inputs)
        self._mark.set()
        self._slots.reserve(slots)
        self._started = _Started(plan, began_ns, slots, epochs, draws, results, scored, pooled)
        return before

    def finish(self) -> StepResult | None:
        """Waits for the step that was started, if one was, and reads it."""
        step, self._started = self._started, None
        if step is None:
            return None
        self._mark.wait()
        self._decoder.check(step.results)
        ids = step.results["ids"][: len(step.slots)].astype(np.int32)
        logprobs: tuple[TokenLogprob | None, ...] = ()
        if step.draws is not None:
            drawn = step.draws.read(ids.tolist())
            ids = np.array([token.id for token in drawn], np.int32)
            if any(token.logprob is not None for token in drawn):
                logprobs = tuple(token.logprob for token in drawn)
        self._slots.settle(step.slots, step.epochs, ids)
        rows = [row for row, _ in step.pooled]
        slots = np.concatenate([step.slots, np.array([row.slot for row in rows], np.int32)])
        epochs = np.concatenate([step.epochs, np.array([row.epoch for row in rows], np.int32)])
        return StepResult(
            crew_epoch=self._crew_epoch,
            step_id=step.plan.step_id,
            slots=slots.tobytes(),
            epochs=epochs.tobytes(),
            ids=np.concatenate([ids, np.array([token for _, token in step.pooled], np.int32)]).tobytes(),
            logprobs=logprobs + (None,) * len(rows) if logprobs else (),
            compute_us=(time.perf_counter_ns() - step.began_ns) // 1000,
            scored=step.scored,
            pooled=tuple(rows),
        )

    def use_idle_time(self) -> bool:
        """Graphs for the steps to come. Ranks that wait for each other in a step have no time of their own."""
        return self._group.is_alone and self._started is None and self._decoder.prepare_graph()

    def close(self) -> None:
        """Leaves the group. What is on the stream is lost."""
        self._started = None
        self._group.close()
        self._device.drain()

    def _pool(self, rows: PlannedRows, inputs: StepInputs) -> list[tuple[PooledRow, int]]:
        """Waits for the step where there is something to pool."""
        if not any(reading.pooling for reading in rows.readings.values()):
            return []
        hidden = self._decoder.hidden(int(rows.counts.sum())).numpy()[inputs.state_tokens]
        return pool(rows, hidden, self._slots.epochs)

    def _score(self, rows: PlannedRows, inputs: StepInputs) -> tuple[ScoredRow, ...]:
        def read(states: NDArray[np.int64], ids: Sequence[int], tops: Sequence[int]) -> list[TokenLogprob]:
            return self._decoder.read_logprobs(inputs.state_tokens[states], ids, tops)

        return score(read, self._slots.spans(rows))
