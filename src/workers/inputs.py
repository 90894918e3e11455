"""The arrays of one step, as the decoder reads them. They are numpy's: a step runs nothing of torch, whose code the
kernels drive out of the processor's caches each time."""

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.cuda_ext.program import Count

_FEWEST_TOKENS: Final = 64
_FEWEST_SEQUENCES: Final = 8
_FEWEST_BLOCKS: Final = 16


@dataclass(frozen=True, slots=True)
class StepInputs:
    """T tokens of R sequences, in row order. N of them are looked at behind the last layer, S of those are sampled
    after."""

    token_ids: NDArray[np.int64]
    """[T]."""
    positions: NDArray[np.int32]
    """[T]: index of each token in its sequence."""
    cache_slots: NDArray[np.int64]
    """[T]: where each token's keys and values go: block · block_size + offset in the block."""
    query_starts: NDArray[np.int32]
    """[R + 1]: row r owns tokens query_starts[r] to query_starts[r + 1]."""
    context_lens: NDArray[np.int32]
    """[R]: tokens of the sequence after this step; the row's last token sees this many."""
    block_tables: NDArray[np.int32]
    """[R, most blocks of a row]; entries past a row's own blocks are never read."""
    state_starts: NDArray[np.int32]
    """[R + 1]: the states wanted of row r, those of its last tokens, are numbers state_starts[r] to
    state_starts[r + 1]."""
    state_tokens: NDArray[np.int64]
    """[N]: which of the T tokens each state is of."""
    sample_indices: NDArray[np.int64]
    """[S]: which of the N states logits are wanted for."""


class StepBuffers:
    """The same arrays with room for more, where a recorded program reads them. ``tokens``, ``sequences`` and ``states``
    are the T, R and N of the step that was loaded last."""

    def __init__(self, most_tokens: int, most_sequences: int, most_blocks: int) -> None:
        self.tokens = Count(most_tokens)
        self.sequences = Count(most_sequences)
        self.states = Count(most_tokens)
        self._held = StepInputs(
            token_ids=np.zeros(most_tokens, np.int64),
            positions=np.zeros(most_tokens, np.int32),
            cache_slots=np.zeros(most_tokens, np.int64),
            query_starts=np.zeros(most_sequences + 1, np.int32),
            context_lens=np.zeros(most_sequences, np.int32),
            block_tables=np.zeros((most_sequences, most_blocks), np.int32),
            state_starts=np.zeros(most_sequences + 1, np.int32),
            state_tokens=np.zeros(most_tokens, np.int64),
            sample_indices=np.zeros(0, np.int64),
        )
        self.token_ids = torch.from_numpy(self._held.token_ids)
        self.positions = torch.from_numpy(self._held.positions)
        self.cache_slots = torch.from_numpy(self._held.cache_slots)
        self.query_starts = torch.from_numpy(self._held.query_starts)
        self.context_lens = torch.from_numpy(self._held.context_lens)
        self.block_tables = torch.from_numpy(self._held.block_tables)
        self.state_starts = torch.from_numpy(self._held.state_starts)
        self.state_tokens = torch.from_numpy(self._held.state_tokens)

    @classmethod
    def for_step(cls, inputs: StepInputs, before: "StepBuffers | None") -> "StepBuffers":
        """Large enough for the step and for what those before it held, and for twice as much where it must grow."""

        def most(wanted: int, held: int) -> int:
            return held if wanted <= held else max(wanted, 2 * held)

        held = (_FEWEST_TOKENS, _FEWEST_SEQUENCES, _FEWEST_BLOCKS)
        if before is not None:
            held = (before.tokens.most, before.sequences.most, before.block_tables.shape[1])
        sequences, blocks = inputs.block_tables.shape
        return cls(most(len(inputs.token_ids), held[0]), most(sequences, held[1]), most(blocks, held[2]))

    def holds(self, inputs: StepInputs) -> bool:
        """Whether there is room."""
        (sequences, blocks), held = inputs.block_tables.shape, self._held.block_tables.shape
        return len(inputs.token_ids) <= self.tokens.most and sequences <= held[0] and blocks <= held[1]

    def load(self, inputs: StepInputs) -> None:
        """Copies a step's arrays."""
        tokens, states, held = len(inputs.token_ids), len(inputs.state_tokens), self._held
        sequences, blocks = inputs.block_tables.shape
        self.tokens.set(tokens)
        self.sequences.set(sequences)
        self.states.set(states)
        held.token_ids[:tokens] = inputs.token_ids
        held.positions[:tokens] = inputs.positions
        held.cache_slots[:tokens] = inputs.cache_slots
        held.query_starts[: sequences + 1] = inputs.query_starts
        held.context_lens[:sequences] = inputs.context_lens
        held.block_tables[:sequences, :blocks] = inputs.block_tables
        held.state_starts[: sequences + 1] = inputs.state_starts
        held.state_tokens[:states] = inputs.state_tokens
