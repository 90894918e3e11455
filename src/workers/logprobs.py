"""Log-probabilities of one row of logits. Called by the sampler for drawn tokens and by ``readings`` for a prompt's."""

import numpy as np
from numpy.typing import NDArray

from shoal.messages import TokenLogprob


def token_logprob(logits: NDArray[np.float32], token_id: int, count: int) -> TokenLogprob:
    """Of ``token_id`` and of the ``count`` best ids; the sum is in an order that depends on this row alone."""
    peak = logits.max()
    total = float(np.log(np.exp(logits - peak).sum(dtype=np.float64))) + float(peak)
    return TokenLogprob(
        logprob=float(logits[token_id]) - total,
        top=tuple((best_id, float(logits[best_id]) - total) for best_id in _best(logits, count)),
    )


def _best(logits: NDArray[np.float32], count: int) -> list[int]:
    """The ids of the best finite logits, best first, the lower id first among equals."""
    if count == 0:
        return []
    count = min(count, logits.size)
    least = np.partition(logits, logits.size - count)[logits.size - count]
    candidates = np.flatnonzero((logits >= least) & (logits > -np.inf))
    order = np.argsort(-logits[candidates], kind="stable")[:count]
    best: list[int] = candidates[order].tolist()
    return best
