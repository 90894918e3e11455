"""Log-probabilities from logits on a device: ``logprobs``' numbers, but for the last bits of a row's sum, without the
logits coming to the host. Called by the sampler for drawn tokens and by the decoder for a prompt's.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.cuda_ext import cuda_step_ops as ops
from shoal.cuda_ext.cuda_device import CudaDevice
from shoal.cuda_ext.cuda_staging import Staged
from shoal.cuda_ext.program import Count
from shoal.messages import TokenLogprob

MOST_TOP: Final = 20
"""Of the best that are told; no request may ask for more."""


class CudaLogprobs:
    """logits: float32 [most, vocabulary]; ids: int64 [most], the token of each of their rows; both on the device."""

    def __init__(self, device: CudaDevice, logits: Tensor, ids: Tensor) -> None:
        most = len(logits)
        self._count = Count(most)
        self._wanted = Staged(device, {"rows": ((most,), torch.int64), "tops": ((most,), torch.int32)})
        self._results = Staged(
            device,
            {
                "totals": ((most,), torch.float64),
                "values": ((most,), torch.float32),
                "top_ids": ((most, MOST_TOP), torch.int32),
                "top_values": ((most, MOST_TOP), torch.float32),
            },
        )
        there, rows = self._results.device, self._wanted.device["rows"]
        self._scoring, self._picking = device.program(), device.program()
        ops.score_logits(
            self._scoring,
            there["totals"],
            (there["top_ids"], there["top_values"]),
            logits,
            rows,
            self._wanted.device["tops"],
            self._count,
        )
        ops.pick_logits(self._picking, there["values"], logits, rows, ids, self._count)

    def start(self, rows: Sequence[int], tops: Sequence[int]) -> None:
        """Puts on the stream what the logits alone tell, of these rows; tops: how many of the best of each. What was
        started before must have been read."""
        self._count.set(len(rows))
        wanted = self._wanted.fill()
        wanted["rows"][: len(rows)] = rows
        wanted["tops"][: len(rows)] = tops
        self._wanted.send()
        self._scoring.run()

    def bring(self) -> "RowLogprobs":
        """The same of what the ids tell, and a copy of it all to the host."""
        self._picking.run()
        return RowLogprobs(self._results.bring())


class RowLogprobs:
    """Of the rows that were started, in that order, once they are there."""

    def __init__(self, results: dict[str, NDArray[Any]]) -> None:
        self._results = results

    def read(self, place: int, count: int) -> TokenLogprob:
        """Of the row's token and of the ``count`` best ids, best first, the lower id first among equals."""
        told = self._results
        total = float(told["totals"][place])
        best = zip(
            told["top_ids"][place, :count].tolist(), told["top_values"][place, :count].tolist(), strict=True
        )
        return TokenLogprob(
            logprob=float(told["values"][place]) - total,
            top=tuple((token_id, value - total) for token_id, value in best if token_id >= 0),
        )
