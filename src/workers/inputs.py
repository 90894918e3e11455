"""The arrays of one step, as the decoder reads them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepInputs:
    """T tokens of R sequences, in row order; S of the positions are sampled after."""

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
    sample_indices: Tensor
    """int64 [S]: which of the T positions logits are wanted for."""
