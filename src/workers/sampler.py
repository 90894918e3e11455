"""Draws the next token of each sequence from its logits. Owns what one slot's sampling needs to remember
(``SamplerRow``); called by the runner, which tells each row the tokens it keeps.

A token depends on its own row only: the logits, the sequence's ``Sampling`` and tokens, and a random number
keyed by (seed, position), so that the same seed draws the same text whatever else runs, and again after a
preemption. Order: logit bias, repetition, presence and frequency penalty; log-probabilities; temperature,
top-k, top-p, min-p; the draw. What the request does not allow is set to -inf after the log-probabilities,
which so stay the model's own view.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from msgspec import Struct
from numpy.typing import NDArray

from shoal.cuda_ext import ops
from shoal.cuda_ext.program import Count, Program
from shoal.messages import Sampling, TokenLogprob
from shoal.workers.constraints import Constraints
from shoal.workers.grammar import FollowedGrammar, GrammarThreads
from shoal.workers.logprobs import token_logprob
from shoal.workers.philox import uniform

NOTHING_ALLOWED: Final = -2
GRAMMAR_FAILED: Final = -3
NOT_KEPT: Final = -4
"""Stands for what was drawn behind a guess that was wrong."""
_NO_IDS: Final = np.zeros(0, np.int64)
_NO_VALUES: Final = np.zeros(0, np.float32)


class Drawn(Struct, frozen=True):
    """``id`` is -1 where the row's logits held NaN or +inf, or only -inf; ``NOTHING_ALLOWED`` where the request's
    constraints together leave no token; ``GRAMMAR_FAILED`` where its grammar passed a limit."""

    id: int
    logprob: TokenLogprob | None


class _SeenTokens:
    """The distinct tokens of a sequence, and how often each was generated."""

    def __init__(self, prompt: Sequence[int], generated: Sequence[int]) -> None:
        distinct = list(dict.fromkeys((*prompt, *generated)))
        self._place = {token_id: place for place, token_id in enumerate(distinct)}
        self._ids = np.array(distinct, dtype=np.int64)
        self._counts = np.zeros(len(distinct), dtype=np.float32)
        self._size = len(distinct)
        for token_id in generated:
            self._counts[self._place[token_id]] += 1

    def add(self, token_id: int) -> None:
        place = self._place.setdefault(token_id, self._size)
        if place == self._size:
            if self._size == len(self._ids):
                self._ids = np.resize(self._ids, 2 * self._size + 16)
                self._counts = np.resize(self._counts, 2 * self._size + 16)
            self._ids[place], self._counts[place] = token_id, 0
            self._size += 1
        self._counts[place] += 1

    def after(self, ahead: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """``ids`` and ``generated_counts`` where ``ahead`` were generated too. Ids of those stand a second time, at the
        end, with the counts that hold."""
        if not ahead:
            return self.ids, self.generated_counts
        more = dict.fromkeys(ahead, 0)
        counts = [self._count(token_id) + ahead.count(token_id) for token_id in more]
        ids = np.concatenate([self.ids, np.array(list(more), np.int64)])
        return ids, np.concatenate([self.generated_counts, np.array(counts, np.float32)])

    def _count(self, token_id: int) -> float:
        place = self._place.get(token_id)
        return 0.0 if place is None else float(self._counts[place])

    @property
    def ids(self) -> NDArray[np.int64]:
        return self._ids[: self._size]

    @property
    def generated_counts(self) -> NDArray[np.float32]:
        """Of ``ids``; 0 for a token that only the prompt has."""
        return self._counts[: self._size]


class SamplerRow:
    """The state of one slot residence. Raises ValueError where a token id is outside of the vocabulary, or a grammar
    is to be followed and there are no threads for it."""

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        generated: Sequence[int],
        vocab_size: int,
        grammars: GrammarThreads | None = None,
    ) -> None:
        self.sampling = sampling
        self.position = len(generated)
        """How many tokens were generated so far."""
        self.bias = _biases(sampling)
        """Distinct ids, and what is added to their logits."""
        if ((self.bias[0] < 0) | (self.bias[0] >= vocab_size)).any():
            raise ValueError(f"logit_bias: a token id is outside of the vocabulary of {vocab_size}")
        penalised = sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty
        self._seen = _SeenTokens(prompt, generated) if penalised else None
        if self._seen is not None and ((self._seen.ids < 0) | (self._seen.ids >= vocab_size)).any():
            raise ValueError(f"a token id of the sequence is outside of the vocabulary of {vocab_size}")
        wanted = Constraints.wanted(sampling)
        self._constraints = Constraints(sampling, prompt, generated, vocab_size) if wanted else None
        self._grammar = _open_grammar(sampling, generated, grammars)

    @property
    def adjusts(self) -> bool:
        """Whether ``adjust`` has something to do."""
        return self._seen is not None or self.bias[0].size > 0

    @property
    def seen(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The distinct ids to penalise, and how often each was generated."""
        return (_NO_IDS, _NO_VALUES) if self._seen is None else (self._seen.ids, self._seen.generated_counts)

    @property
    def constrained(self) -> bool:
        """Whether there may be tokens that are not to be drawn."""
        return self._constraints is not None or self._grammar is not None

    def observe(self, token_id: int) -> None:
        """The sequence goes on with this token; below 0, it does not, and what is drawn from now on is for nobody."""
        self.position += 1
        if token_id < 0:
            self._seen = self._constraints = self._grammar = None
        if self._seen is not None:
            self._seen.add(token_id)
        if self._constraints is not None:
            self._constraints.observe(token_id)
        if self._grammar is not None:
            self._grammar.observe(token_id)

    def adjust(self, logits: NDArray[np.float32], ahead: Sequence[int] = ()) -> None:
        """Applies bias and penalties in place, for what follows the tokens observed and those ``ahead``."""
        ids, values = self.bias
        logits[ids] += values
        if self._seen is not None:
            ids, counts = self._seen.after(ahead)
            logits[ids] = self._penalised(logits[ids], counts)

    def constrain(self, logits: NDArray[np.float32]) -> int:
        """Sets what may not be drawn to -inf, in place. Returns 0, or the id to report where nothing can be drawn;
        logits that are not finite are left to the draw."""
        if not np.isfinite(logits.max()):
            return 0
        if self._constraints is not None:
            self._constraints.apply(logits, self.position)
        if self._grammar is not None and not self._grammar.apply(logits):
            return GRAMMAR_FAILED
        return 0 if logits.max() > -np.inf else NOTHING_ALLOWED

    def _penalised(self, values: NDArray[np.float32], counts: NDArray[np.float32]) -> NDArray[np.float32]:
        wanted = self.sampling
        factor = np.float32(wanted.repetition_penalty)
        values = np.where(values > 0, values / factor, values * factor)
        values -= np.float32(wanted.frequency_penalty) * counts
        values -= np.float32(wanted.presence_penalty) * (counts > 0)
        return values


def _biases(sampling: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """What an id is given twice is added up."""
    total: dict[int, np.float32] = {}
    for token_id, value in sampling.logit_bias:
        total[token_id] = total.get(token_id, np.float32(0)) + np.float32(value)
    return np.array(list(total), dtype=np.int64), np.array(list(total.values()), dtype=np.float32)


def _open_grammar(
    sampling: Sampling, generated: Sequence[int], grammars: GrammarThreads | None
) -> FollowedGrammar | None:
    if sampling.grammar is None:
        return None
    if grammars is None:
        raise ValueError("grammar: this sampler follows none")
    return grammars.open(sampling.grammar, generated)


class Sampler:
    """Draws for any number of rows at a time; what it hands to the library is recorded once."""

    def __init__(self) -> None:
        self._draws: _Draws | None = None

    def sample(
        self, logits: NDArray[np.float32], rows: Sequence[SamplerRow], guesses: Sequence[Sequence[int]] = ()
    ) -> list[Drawn]:
        """logits: [positions, vocabulary]; holds the adjusted and constrained logits afterwards. The rows do
        not learn what was drawn: whoever keeps a token calls ``observe``.

        guesses: for each row the tokens that are taken to follow it, none by default. Such a row has as many positions
        more, behind its own, and what was drawn behind a guess that was not drawn is ``NOT_KEPT``. Raises ValueError
        where a row with guesses is constrained.
        """
        places = _places(rows, guesses)
        told: dict[int, NDArray[np.float32]] = {}
        """By number, the logits that log-probabilities are told of where they are not those that are drawn from."""
        failures: dict[int, int] = {}
        if any(row.adjusts or row.constrained for row in rows):
            # A row that is not finite may warn here; the draw finds it.
            with np.errstate(invalid="ignore", over="ignore"):
                for place, view in zip(places, logits, strict=True):
                    place.row.adjust(view, place.ahead)
                failures, told = _constrain(places, logits)
        drawn: list[Drawn] = []
        on_the_way = True
        for number, (place, token_id) in enumerate(zip(places, self._draw(logits, places), strict=True)):
            on_the_way = not place.ahead or (on_the_way and drawn[-1].id == place.ahead[-1])
            token_id = failures.get(number, token_id) if on_the_way else NOT_KEPT
            most, logprob = place.row.sampling.logprobs, None
            if most >= 0 and token_id >= 0:
                logprob = token_logprob(told.get(number, logits[number]), token_id, most)
            drawn.append(Drawn(token_id, logprob))
        return drawn

    def _draw(self, logits: NDArray[np.float32], places: "Sequence[_Place]") -> list[int]:
        if self._draws is None or not self._draws.holds(logits):
            self._draws = _Draws(logits)
        return self._draws.draw(places)


class _Place(Struct, frozen=True):
    """Whose logits a row holds."""

    row: SamplerRow
    ahead: Sequence[int] = ()
    """Guessed tokens that come before it and that the row has not observed."""


def _places(rows: Sequence[SamplerRow], guesses: Sequence[Sequence[int]]) -> list[_Place]:
    if not guesses:
        return [_Place(row) for row in rows]
    return [
        _Place(row, guess[:count])
        for row, guess in zip(rows, guesses, strict=True)
        for count in range(len(guess) + 1)
    ]


class _Draws:
    """The recorded draw from one buffer of logits."""

    def __init__(self, logits: NDArray[np.float32]) -> None:
        most = len(logits)
        self._logits = logits
        self._rows = Count(most)
        self._ids = np.zeros(most, np.int64)
        self._temperature, self._top_p, self._min_p = (np.zeros(most, np.float32) for _ in range(3))
        self._top_k = np.zeros(most, np.int64)
        self._uniform = np.zeros(most, np.float64)
        self._program = Program()
        ops.draw(
            self._program,
            torch.from_numpy(self._ids),
            torch.from_numpy(logits),
            temperature=torch.from_numpy(self._temperature),
            top_k=torch.from_numpy(self._top_k),
            top_p=torch.from_numpy(self._top_p),
            min_p=torch.from_numpy(self._min_p),
            uniform=torch.from_numpy(self._uniform),
            rows=self._rows,
        )

    def holds(self, logits: NDArray[np.float32]) -> bool:
        """Whether these are rows of the buffer, from its first on."""
        own = self._logits
        return (
            logits.ctypes.data == own.ctypes.data
            and len(logits) <= len(own)
            and logits.shape[1] == own.shape[1]
            and logits.strides == own.strides
        )

    def draw(self, places: Sequence[_Place]) -> list[int]:
        """The ids for the first rows of the buffer."""
        count, wanted = len(places), [place.row.sampling for place in places]
        self._temperature[:count] = [each.temperature for each in wanted]
        self._top_k[:count] = [each.top_k for each in wanted]
        self._top_p[:count] = [each.top_p for each in wanted]
        self._min_p[:count] = [each.min_p for each in wanted]
        self._uniform[:count] = [_uniform(place) for place in places]
        self._rows.set(count)
        self._program.run()
        ids: list[int] = self._ids[:count].tolist()
        return ids


def _uniform(place: _Place) -> float:
    sampling = place.row.sampling
    return uniform(sampling.seed, place.row.position + len(place.ahead)) if sampling.temperature else 0.0


def _constrain(
    places: Sequence[_Place], logits: NDArray[np.float32]
) -> tuple[dict[int, int], dict[int, NDArray[np.float32]]]:
    """Constrains the rows that want it. Returns the ids to report in place of a draw, and the logits as they were where
    log-probabilities are to be told of, both by number."""
    failures, before = {}, {}
    for number, (place, view) in enumerate(zip(places, logits, strict=True)):
        if place.row.constrained:
            if place.ahead:
                raise ValueError("constraints go from token to token: nothing can be guessed for this row")
            if place.row.sampling.logprobs >= 0:
                before[number] = view.copy()
            if failure := place.row.constrain(view):
                failures[number] = failure
    return failures, before
