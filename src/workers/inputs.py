"""The arrays of one step, as the decoder reads them."""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from shoal.cuda_ext.program import Count

_FEWEST_TOKENS: Final = 64
_FEWEST_SEQUENCES: Final = 8
_FEWEST_BLOCKS: Final = 16


@dataclass(frozen=True, slots=True)
class StepInputs:
    """T tokens of R sequences, in row order. N of them are looked at behind the last layer, S of those are sampled
    after."""

    token_ids: Tensor
    """int64 [T]."""
    positions: Tensor
    """int32 [T]: index of each token in its sequence."""
    cache_slots: Tensor
    """int64 [T]: where each token's keys and values go: block · block_size + offset in the block."""
    query_starts: Tensor
    """int32 [R + 1]: row r owns tokens query_starts[r] to query_starts[r + 1]."""
    context_lens: Tensor
    """int32 [R]: tokens of the sequence after this step; the row's last token sees this many."""
    block_tables: Tensor
    """int32 [R, most blocks of a row]; entries past a row's own blocks are never read."""
    state_starts: Tensor
    """int32 [R + 1]: the states wanted of row r, those of its last tokens, are numbers state_starts[r] to
    state_starts[r + 1]."""
    state_tokens: Tensor
    """int64 [N]: which of the T tokens each state is of."""
    sample_indices: Tensor
    """int64 [S]: which of the N states logits are wanted for."""


class StepBuffers:
    """The same arrays with room for more, where a recorded program reads them. ``tokens``, ``sequences`` and ``states``
    are the T, R and N of the step that was loaded last."""

    def __init__(self, most_tokens: int, most_sequences: int, most_blocks: int) -> None:
        self.tokens = Count(most_tokens)
        self.sequences = Count(most_sequences)
        self.states = Count(most_tokens)
        self.token_ids = torch.zeros(most_tokens, dtype=torch.int64)
        self.positions = torch.zeros(most_tokens, dtype=torch.int32)
        self.cache_slots = torch.zeros(most_tokens, dtype=torch.int64)
        self.query_starts = torch.zeros(most_sequences + 1, dtype=torch.int32)
        self.context_lens = torch.zeros(most_sequences, dtype=torch.int32)
        self.block_tables = torch.zeros(most_sequences, most_blocks, dtype=torch.int32)
        self.state_starts = torch.zeros(most_sequences + 1, dtype=torch.int32)
        self.state_tokens = torch.zeros(most_tokens, dtype=torch.int64)

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
        sequences, blocks = inputs.block_tables.shape
        return (
            len(inputs.token_ids) <= self.tokens.most
            and sequences <= self.sequences.most
            and blocks <= self.block_tables.shape[1]
        )

    def load(self, inputs: StepInputs) -> None:
        """Copies a step's arrays."""
        tokens, states = len(inputs.token_ids), len(inputs.state_tokens)
        sequences, blocks = inputs.block_tables.shape
        self.tokens.set(tokens)
        self.states.set(states)
        self.sequences.set(sequences)
        self.token_ids[:tokens] = inputs.token_ids
        self.positions[:tokens] = inputs.positions
        self.cache_slots[:tokens] = inputs.cache_slots
        self.query_starts[: sequences + 1] = inputs.query_starts
        self.context_lens[:sequences] = inputs.context_lens
        self.block_tables[:sequences, :blocks] = inputs.block_tables
        self.state_starts[: sequences + 1] = inputs.state_starts
        self.state_tokens[:states] = inputs.state_tokens
