"""The arrays of one step on a device: what ``inputs`` is for the CPU's decoder."""

from dataclasses import dataclass

import numpy as np
import torch

from shoal.cuda_ext.cuda_device import CudaDevice
from shoal.cuda_ext.cuda_staging import Staged
from shoal.cuda_ext.program import Count
from shoal.workers.inputs import StepInputs
from shoal.workers.slots import Int32s


@dataclass(frozen=True, slots=True)
class StepLimits:
    """No step has more: what is allocated at the start is all that steps ever take."""

    tokens: int
    sequences: int
    """Also of the states whose logits are wanted."""
    context: int
    """Tokens of a sequence."""
    block_size: int

    @property
    def blocks(self) -> int:
        """Of a sequence."""
        return -(-self.context // self.block_size)


class CudaInputs:
    """``tokens`` … ``most_context`` are those of the step that was loaded last."""

    def __init__(self, device: CudaDevice, limits: StepLimits) -> None:
        tokens, sequences = limits.tokens, limits.sequences
        self._device = device
        self._limits = limits
        self._arrays = Staged(
            device,
            {
                "token_ids": ((tokens,), torch.int64),
                "cache_slots": ((tokens,), torch.int64),
                "state_rows": ((sequences,), torch.int64),
                "positions": ((tokens,), torch.int32),
                "sources": ((tokens,), torch.int32),
                "query_starts": ((sequences + 1,), torch.int32),
                "context_lens": ((sequences,), torch.int32),
            },
        )
        self.device = self._arrays.device
        table = (sequences, limits.blocks)
        self.block_tables = device.zeros(*table, dtype=torch.int32)
        self._tables = [device.pinned(*table, dtype=torch.int32) for _ in range(2)]
        self.tokens, self.sequences, self.states = Count(tokens), Count(sequences), Count(sequences)
        self.most_tokens, self.most_context = Count(tokens), Count(limits.context)

    def load(self, inputs: StepInputs, sources: Int32s, rows: int, spare_block: int) -> None:
        """Sends a step's arrays. sources: for each token the row of the step before that drew it, or -1.

        Where ``rows`` is more than there are, single tokens that belong to nobody fill the step up; they read and
        write the spare block. The step before the last one must have been read."""
        tokens, own, states = len(inputs.token_ids), len(inputs.context_lens), len(inputs.sample_indices)
        more = rows - own
        size, spare = self._limits.block_size, np.arange(more)
        filled = self._arrays.fill()
        _write(filled["token_ids"], inputs.token_ids, np.zeros(more))
        _write(filled["cache_slots"], inputs.cache_slots, spare_block * size + spare % size)
        _write(filled["positions"], inputs.positions, np.zeros(more))
        _write(filled["sources"], sources, np.full(more, -1))
        _write(filled["query_starts"], inputs.query_starts, tokens + 1 + spare)
        _write(filled["context_lens"], inputs.context_lens, np.ones(more))
        filled["state_rows"][:states] = inputs.state_tokens[inputs.sample_indices]
        filled["state_rows"][states : states + more] = tokens + spare
        self._arrays.send()
        self._send_tables(inputs, rows, spare_block)
        self.tokens.set(tokens + more)
        self.sequences.set(rows)
        self.states.set(states + more)
        self.most_tokens.set(int(np.diff(inputs.query_starts).max()))
        self.most_context.set(int(inputs.context_lens.max()))

    def _send_tables(self, inputs: StepInputs, rows: int, spare_block: int) -> None:
        own, widest = inputs.block_tables.shape
        self._tables.reverse()
        self._tables[0][:own, :widest] = torch.from_numpy(inputs.block_tables)
        self._tables[0][own:rows, 0] = spare_block
        self._device.copy_corner(self.block_tables, self._tables[0], rows, widest)


def _write(to: np.ndarray, own: np.ndarray, more: np.ndarray) -> None:
    to[: len(own)] = own
    to[len(own) : len(own) + len(more)] = more
