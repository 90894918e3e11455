"""What some requests want of their prompt besides the next token: the log-probability of each of its tokens, or its
hidden states pooled to one vector. One ``PromptReading`` a slot residence; called by slots and by the runner.

Nothing here depends on how a prompt was cut into chunks or on what else was in the batch: each position's logits are
its own, and states are added up one token after the other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shoal.messages import ScoredRow, Seat, TokenLogprob
from shoal.workers.logprobs import token_logprob

_SLICE_LOGITS: Final = 16 << 20
"""Logits that exist at a time: a whole chunk's would take gigabytes with a large vocabulary."""

Scorer = Callable[[NDArray[np.int64], Sequence[int], Sequence[int]], list[TokenLogprob]]
"""Which of a step's N states, the token after each and how many of the best are told, to their log-probabilities; none
on other ranks than the first, which take their part in computing the logits."""
Head = Callable[[NDArray[np.int64]], NDArray[np.float32] | None]
"""States to logits [S, vocabulary]; None on other ranks than the first."""


class PromptReading:
    """What one residence wants, and how much of it is there."""

    def __init__(self, seat: Seat, prompt_len: int) -> None:
        self.top = seat.prompt_logprobs
        """-1: no log-probabilities; else how many of the best are told."""
        self.pooling = seat.pooling
        self._prompt_len = prompt_len
        self._pooled = 0
        self._total: NDArray[np.float64] | None = None
        self._last: NDArray[np.float32] | None = None

    @staticmethod
    def wanted(seat: Seat) -> bool:
        """Whether the seat asks for more than tokens."""
        return seat.prompt_logprobs >= 0 or bool(seat.pooling)

    def scored(self, start: int, count: int) -> range:
        """The prompt's tokens whose predecessors a row computes: [start + 1, start + count], within the prompt."""
        if self.top < 0:
            return range(0)
        return range(start + 1, min(start + count + 1, self._prompt_len))

    def follows(self, start: int) -> bool:
        """Whether a row may begin at ``start``: a mean wants every token's state."""
        return self.pooling != "mean" or start == self._pooled

    def pool(self, states: NDArray[np.float32]) -> None:
        """Takes the states of a row's tokens, [count, hidden]."""
        self._pooled += len(states)
        self._last = states[-1].copy()
        if self.pooling == "mean":
            if self._total is None:
                self._total = np.zeros(states.shape[1])
            for state in states:
                self._total += state

    def vector(self) -> NDArray[np.float32]:
        """float32 [hidden]; after the prompt's last row."""
        if self._total is not None:
            return (self._total / self._pooled).astype(np.float32)
        assert self._last is not None
        return self._last


@dataclass(frozen=True, slots=True)
class ScoredSpan:
    """Prompt tokens to be scored in one row of a step."""

    slot: int
    epoch: int
    position: int
    """Index in the prompt of the first of them."""
    ids: NDArray[np.int32]
    first_state: int
    """Where, among the step's N states, the one that predicts the first of them is."""
    top: int


def score(scorer: Scorer, spans: Sequence[ScoredSpan]) -> tuple[ScoredRow, ...]:
    """The log-probabilities of every span, on rank 0."""
    if not spans:
        return ()
    states = np.concatenate([span.first_state + np.arange(len(span.ids)) for span in spans])
    ids = [token_id for span in spans for token_id in span.ids.tolist()]
    tops = [span.top for span in spans for _ in span.ids]
    logprobs = scorer(states, ids, tops)
    return _by_span(spans, logprobs) if logprobs else ()


def score_on_host(
    head: Head, vocab_size: int, states: NDArray[np.int64], ids: Sequence[int], tops: Sequence[int]
) -> list[TokenLogprob]:
    """A ``Scorer`` but for the first two arguments; a slice of the states at a time. Empty on other ranks than the
    first."""
    logprobs: list[TokenLogprob] = []
    step = max(1, _SLICE_LOGITS // vocab_size)
    for begin in range(0, len(ids), step):
        part = slice(begin, begin + step)
        logits = head(states[part])
        if logits is not None:
            logprobs += _row_logprobs(logits, ids[part], tops[part])
    return logprobs


def _row_logprobs(logits: NDArray[np.float32], ids: Sequence[int], tops: Sequence[int]) -> list[TokenLogprob]:
    # A row that is not finite may warn here; the draw after the prompt finds it.
    with np.errstate(invalid="ignore", over="ignore"):
        return [token_logprob(*row) for row in zip(logits, ids, tops, strict=True)]


def _by_span(spans: Sequence[ScoredSpan], logprobs: list[TokenLogprob]) -> tuple[ScoredRow, ...]:
    left = iter(logprobs)
    return tuple(
        ScoredRow(span.slot, span.epoch, span.position, tuple(islice(left, len(span.ids)))) for span in spans
    )
