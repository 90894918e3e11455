"""Guesses what a sequence goes on with, so that one step can compute several of its tokens: prompt lookup decoding
(Saxena 2023). Its last tokens are looked up in what came before; what followed them there is the guess.

A guess changes how many tokens a step brings and never which: the sampler draws at every guessed position as it would
have without, and keeps what was drawn up to the first guess that it did not draw. Every rank guesses by itself, from
tokens and results that all ranks have alike. Called by slots.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Int32s = npt.NDArray[np.int32]

MOST_POSITIONS: Final = 96
"""Of a step with guesses: rows that tiles take in one pass."""
_LONGEST_MATCH: Final = 16
_LEAST_CHANCE: Final = 0.2
"""Of the first id after a match: a step's second row costs more than those after it."""
_MOST_CHANCE: Final = 0.995
"""However long guesses have all been right."""
_PRIOR_TRIALS: Final = 4.0
_MOST_TRIALS: Final = 64.0
"""Older ones count less: texts change."""

_CROWD: Final = 3.0
"""Times the free rows: where more sequences go on in a step, they share what a step costs anyway, and guesses gain too
little to pay for the wrong ones."""

_FREE_ROWS: Final = {"avx512_amx": 20.0, "avx512_bf16": 7.0, "avx512_vnni": 7.0, "avx512": 4.0, "avx2": 2.0}
"""Level of the CPU library → rows that take as long to compute as what a step costs whatever it has of them
(docs/performance.md: a step of one row, and what each further one adds)."""


def free_rows(level: str) -> float:
    """0 where a row costs as much as any other, and guessing gains nothing."""
    return _FREE_ROWS.get(level, 0.0)


@dataclass(frozen=True, slots=True)
class Guess:
    """What a sequence may go on with."""

    ids: Int32s
    match: int
    """How many of its last tokens were found before; 0 where there is no guess."""


NO_GUESS: Final = Guess(np.zeros(0, np.int32), 0)


class Drafter:
    """Guesses, and learns how often it is right."""

    def __init__(self, free_rows: float) -> None:
        self._free_rows = free_rows
        self._trials = np.full(_LONGEST_MATCH + 1, _PRIOR_TRIALS)
        lengths = np.arange(_LONGEST_MATCH + 1)
        self._hits = _PRIOR_TRIALS * lengths / (lengths + 1)

    def may_gain(self, sampled: int) -> bool:
        """Whether a step that brings so many tokens without guesses should have some."""
        return sampled <= _CROWD * self._free_rows

    def worth(self, sampled: int, positions: int) -> float:
        """The probability from which on one more position gains more than it costs, in a step of so many positions
        that brings ``sampled`` tokens without guesses: a step takes ``free_rows`` + positions, and what that is a token
        is what a right guess saves."""
        return sampled / (self._free_rows + positions)

    def guess(self, tokens: Int32s, most: int, worth: float) -> Guess:
        """tokens: int32 [n], the sequence; at most ``most`` ids, each with a probability of at least ``worth``."""
        match, period = longest_match(tokens)
        count = min(most, self._count(match, worth))
        if count < 1:
            return NO_GUESS
        # What follows the match may be the sequence's own end: then it is taken to repeat.
        places = len(tokens) - period + np.arange(count) % period
        return Guess(tokens[places], match)

    def learn(self, guess: Guess, right: int) -> None:
        """So many ids of the guess, from its first on, were drawn."""
        self._trials[guess.match] += min(right + 1, len(guess.ids))
        self._hits[guess.match] += right
        if self._trials[guess.match] > _MOST_TRIALS:
            self._trials[guess.match] /= 2
            self._hits[guess.match] /= 2

    def _count(self, match: int, worth: float) -> int:
        """How many ids after a match of that length are likely enough: the n-th is right if all before it are."""
        chance = min(self._hits[match] / self._trials[match], _MOST_CHANCE)
        if chance < max(worth, _LEAST_CHANCE):
            return 0
        return int(np.log(worth) / np.log(chance))


def longest_match(tokens: Int32s) -> tuple[int, int]:
    """Of the places before the end where a sequence's last tokens stand already, the one that most of them match (at
    most 16), the last of several: how many match, and how far before the end that is. (0, 0) for none."""
    raw = tokens.tobytes()
    match, longest, period = 0, min(_LONGEST_MATCH, len(tokens) - 1), 0
    while match < longest:
        length = (match + longest + 1) // 2
        place = _last_place(raw, len(raw) - length * tokens.itemsize, tokens.itemsize)
        if place < 0:
            longest = length - 1
        else:
            match, period = length, len(tokens) - length - place
    return match, period


def _last_place(raw: bytes, end: int, size: int) -> int:
    """Where in ``raw``, words of ``size`` bytes, all that follows ``end`` stands before, in words; -1: nowhere."""
    wanted, limit = raw[end:], len(raw) - size
    while (at := raw.rfind(wanted, 0, limit)) % size and at >= 0:
        limit = at + len(wanted) - 1
    return at // size
