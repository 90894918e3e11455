"""What a request forbids besides its grammar: ids that would end it too soon, ids that it does not list, runs of ids
that must not be completed, thinking past a budget. Called by the sampler; one object a slot residence."""

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shoal.messages import Sampling, ThinkingBudget

Logits = NDArray[np.float32]


class Run:
    """Looks for one run of ids in a sequence that grows (Knuth, Morris and Pratt 1977)."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = tuple(ids)
        self._borders = _borders(self._ids)
        self._reached = 0

    def feed(self, token_id: int) -> bool:
        """Whether this id completes the run."""
        while self._reached and (self._reached == len(self._ids) or self._ids[self._reached] != token_id):
            self._reached = self._borders[self._reached - 1]
        self._reached += self._ids[self._reached] == token_id
        return self._reached == len(self._ids)

    @property
    def next_id(self) -> int:
        """What would continue the longest beginning of the run that the sequence ends in."""
        return self._ids[self._reached]


def _borders(ids: tuple[int, ...]) -> list[int]:
    """For each beginning of ``ids``, the length of the longest shorter beginning that it ends in."""
    borders = [0] * len(ids)
    reached = 0
    for place in range(1, len(ids)):
        while reached and ids[reached] != ids[place]:
            reached = borders[reached - 1]
        reached += ids[reached] == ids[place]
        borders[place] = reached
    return borders


class ThinkingLimit:
    """Ends the thinking by force. What the model has begun of the end is completed, not repeated."""

    def __init__(self, budget: ThinkingBudget, generated: Sequence[int]) -> None:
        self._most_tokens = budget.most_tokens
        self._end = Run(budget.end)
        self._over = False
        for token_id in generated:
            self.observe(token_id)

    def observe(self, token_id: int) -> None:
        """The sequence goes on with this token."""
        self._over = self._over or self._end.feed(token_id)

    def forced_id(self, position: int) -> int | None:
        """The one id that may be drawn after ``position`` generated tokens, if thinking must end now."""
        return None if self._over or position < self._most_tokens else self._end.next_id


class _BadWords:
    """The runs of two ids and more; found by the id before the last, so that long lists cost nothing a token."""

    def __init__(
        self, words: Sequence[tuple[int, ...]], prompt: Sequence[int], generated: Sequence[int]
    ) -> None:
        self._by_previous: dict[int, list[tuple[int, ...]]] = {}
        for word in words:
            self._by_previous.setdefault(word[-2], []).append(word)
        reach = max(map(len, words)) - 1
        self._tail = deque([*prompt[-reach:], *generated[-reach:]], maxlen=reach)

    def observe(self, token_id: int) -> None:
        self._tail.append(token_id)

    def completing(self) -> list[int]:
        """The ids that would complete a run now."""
        if not self._tail:
            return []
        tail = tuple(self._tail)
        candidates = self._by_previous.get(tail[-1], ())
        return [word[-1] for word in candidates if tail[1 - len(word) :] == word[:-1]]


class Constraints:
    """The state of one residence. Raises ValueError where an id is outside of the vocabulary."""

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], generated: Sequence[int], vocab_size: int
    ) -> None:
        _check_ids(sampling, vocab_size)
        self._min_tokens = sampling.min_tokens
        self._held_back = np.array(sampling.held_back, dtype=np.int64)
        self._always = _always_forbidden(sampling, vocab_size)
        long_words = [word for word in sampling.bad_words if len(word) > 1]
        self._bad_words = _BadWords(long_words, prompt, generated) if long_words else None
        self._thinking = ThinkingLimit(sampling.thinking, generated) if sampling.thinking else None

    @staticmethod
    def wanted(sampling: Sampling) -> bool:
        """Whether there is anything to constrain."""
        held_back = sampling.min_tokens and sampling.held_back
        return bool(held_back or sampling.allowed_ids or sampling.bad_words or sampling.thinking)

    def observe(self, token_id: int) -> None:
        """The sequence goes on with this token."""
        if self._bad_words is not None:
            self._bad_words.observe(token_id)
        if self._thinking is not None:
            self._thinking.observe(token_id)

    def apply(self, logits: Logits, position: int) -> None:
        """Sets what may not be drawn after ``position`` generated tokens to -inf. A forced end of the thinking comes
        before all else."""
        forced = self._thinking.forced_id(position) if self._thinking is not None else None
        if forced is not None:
            kept = logits[forced]
            logits.fill(-np.inf)
            logits[forced] = kept
            return
        if self._always is not None:
            np.copyto(logits, -np.inf, where=self._always)
        if position < self._min_tokens:
            logits[self._held_back] = -np.inf
        if self._bad_words is not None:
            logits[self._bad_words.completing()] = -np.inf


def _check_ids(sampling: Sampling, vocab_size: int) -> None:
    named = {
        "min_tokens": sampling.held_back,
        "allowed_ids": sampling.allowed_ids,
        "bad_words": [token_id for word in sampling.bad_words for token_id in word],
        "thinking": sampling.thinking.end if sampling.thinking else (),
    }
    for name, ids in named.items():
        if any(not 0 <= token_id < vocab_size for token_id in ids):
            raise ValueError(f"{name}: a token id is outside of the vocabulary of {vocab_size}")
    if not all(sampling.bad_words) or (sampling.thinking and not sampling.thinking.end):
        raise ValueError("bad_words, thinking: a run of ids is empty")


def _always_forbidden(sampling: Sampling, vocab_size: int) -> NDArray[np.bool_] | None:
    """Ids that are never drawn: bad words of one id, and what is not among ``allowed_ids``."""
    single = [word[0] for word in sampling.bad_words if len(word) == 1]
    if not single and not sampling.allowed_ids:
        return None
    forbidden = np.full(vocab_size, bool(sampling.allowed_ids))
    forbidden[list(sampling.allowed_ids)] = False
    forbidden[single] = True
    return forbidden
