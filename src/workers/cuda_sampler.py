"""From logits on a device to tokens there: what ``sampler`` does on the host, with the same numbers.

What only the host knows, biases, penalties, masks of grammars and the parameters of the draw, goes to the device in a
few copies; the ids stay there, for the next step, and are copied back with the log-probabilities.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.cuda_ext import cuda_step_ops as ops
from shoal.cuda_ext.cuda_device import CudaDevice
from shoal.cuda_ext.cuda_staging import Staged
from shoal.cuda_ext.program import Count
from shoal.workers.cuda_logprobs import CudaLogprobs, RowLogprobs
from shoal.workers.philox import uniform
from shoal.workers.sampler import Drawn, SamplerRow

_FEWEST: Final = 1024


class CudaSampler:
    """logits: float32 [most rows, vocabulary]; ids: int64 [most rows]; both on the device."""

    def __init__(self, device: CudaDevice, logits: Tensor, ids: Tensor) -> None:
        most, vocab_size = logits.shape
        self._device = device
        self._logits = logits
        self._rows = Count(most)
        floats, wide = ((most,), torch.float32), ((most,), torch.float64)
        self._parameters = Staged(
            device,
            {
                "temperature": floats,
                "top_p": floats,
                "min_p": floats,
                "top_k": ((most,), torch.int64),
                "uniform": wide,
            },
        )
        self._drawing = device.program()
        ops.draw(self._drawing, ids, logits, **self._parameters.device, rows=self._rows)
        self._adjusting = _Adjusting(device, logits, self._rows, _FEWEST)
        masks = {"mask_of": ((most,), torch.int32), "masks": ((most, -(-vocab_size // 8)), torch.uint8)}
        self._masks = Staged(device, masks)
        self._masking = device.program()
        ops.mask_logits(
            self._masking, logits, self._masks.device["mask_of"], self._masks.device["masks"], self._rows
        )
        self._logprobs = CudaLogprobs(device, logits, ids)

    def start(self, rows: Sequence[SamplerRow]) -> "Draws":
        """Puts the draw for the first rows of the logits on the stream; they hold the adjusted and constrained logits
        afterwards. The draw before the last one must have been read."""
        self._rows.set(len(rows))
        if any(row.adjusts for row in rows):
            self._adjust(rows)
        told = [place for place, row in enumerate(rows) if row.sampling.logprobs >= 0]
        if told:
            # Before the constraints: what they forbid is told of too.
            self._logprobs.start(told, [rows[place].sampling.logprobs for place in told])
        failures = self._constrain(rows) if any(row.constrained for row in rows) else {}
        columns = self._parameters.fill()
        for place, row in enumerate(rows):
            wanted = row.sampling
            columns["temperature"][place] = wanted.temperature
            columns["top_k"][place], columns["top_p"][place] = wanted.top_k, wanted.top_p
            columns["min_p"][place] = wanted.min_p
            columns["uniform"][place] = uniform(wanted.seed, row.position) if wanted.temperature else 0.0
        self._parameters.send()
        self._drawing.run()
        return Draws(rows, failures, told, self._logprobs.bring() if told else None)

    def _adjust(self, rows: Sequence[SamplerRow]) -> None:
        needed = max(sum(len(row.bias[0]) for row in rows), sum(len(row.seen[0]) for row in rows))
        if needed > self._adjusting.most:
            self._device.wait()
            self._adjusting = _Adjusting(self._device, self._logits, self._rows, 2 * needed)
        self._adjusting.start(rows)

    def _constrain(self, rows: Sequence[SamplerRow]) -> dict[int, int]:
        """Masks the rows that want it. Returns the ids to report in place of a draw, by row."""
        filled = self._masks.fill()
        filled["mask_of"][: len(rows)] = -1
        failures, used = {}, 0
        row_of_zeros = np.empty(self._logits.shape[1], np.float32)
        for place, row in enumerate(rows):
            if not row.constrained:
                continue
            row_of_zeros.fill(0)
            if failure := row.constrain(row_of_zeros):
                failures[place] = failure
            filled["masks"][used] = np.packbits(np.isneginf(row_of_zeros), bitorder="little")
            filled["mask_of"][place] = used
            used += 1
        self._masks.send()
        self._masking.run()
        return failures


class Draws:
    """A draw that was started."""

    def __init__(
        self,
        rows: Sequence[SamplerRow],
        failures: dict[int, int],
        told: Sequence[int],
        logprobs: RowLogprobs | None,
    ) -> None:
        """told: the rows that have log-probabilities, in their order."""
        self.rows = rows
        self._failures = failures
        self._told = {row: place for place, row in enumerate(told)}
        self._logprobs = logprobs

    def read(self, ids: Sequence[int]) -> list[Drawn]:
        """Of the ids that were drawn, once they are there."""
        drawn = []
        for number, (row, token_id) in enumerate(zip(self.rows, ids, strict=True)):
            token_id = self._failures.get(number, token_id)
            logprob = None
            if self._logprobs is not None and number in self._told and token_id >= 0:
                logprob = self._logprobs.read(self._told[number], row.sampling.logprobs)
            drawn.append(Drawn(token_id, logprob))
        return drawn


class _Adjusting:
    """The recorded way of biases and penalties into the logits, ``most`` of either."""

    def __init__(self, device: CudaDevice, logits: Tensor, rows: Count, most: int) -> None:
        self.most = most
        starts, penalty = ((len(logits) + 1,), torch.int32), ((len(logits),), torch.float32)
        entries = {"ids": ((most,), torch.int32), "values": ((most,), torch.float32)}
        self._biases, self._seen = (Staged(device, {"starts": starts, **entries}) for _ in range(2))
        names = ("repetition", "presence", "frequency")
        self._penalties = Staged(device, dict.fromkeys(names, penalty))
        self._program = device.program()
        biases, seen, penalties = (part.device for part in (self._biases, self._seen, self._penalties))
        ops.adjust_logits(
            self._program,
            logits,
            (biases["starts"], biases["ids"], biases["values"]),
            (seen["starts"], seen["ids"], seen["values"]),
            (penalties["repetition"], penalties["presence"], penalties["frequency"]),
            rows,
        )

    def start(self, rows: Sequence[SamplerRow]) -> None:
        _fill_entries(self._biases, [row.bias for row in rows])
        _fill_entries(self._seen, [row.seen for row in rows])
        penalties = self._penalties.fill()
        for place, row in enumerate(rows):
            penalties["repetition"][place] = row.sampling.repetition_penalty
            penalties["presence"][place] = row.sampling.presence_penalty
            penalties["frequency"][place] = row.sampling.frequency_penalty
        self._penalties.send()
        self._program.run()


def _fill_entries(staged: Staged, entries: Sequence[tuple[NDArray[np.int64], NDArray[np.float32]]]) -> None:
    filled, end = staged.fill(), 0
    filled["starts"][0] = 0
    for place, (ids, values) in enumerate(entries):
        filled["ids"][end : end + len(ids)] = ids
        filled["values"][end : end + len(ids)] = values
        end += len(ids)
        filled["starts"][place + 1] = end
    staged.send()
