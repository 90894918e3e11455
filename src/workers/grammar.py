"""Masks of grammars, computed beside the model. Called by the sampler on rank 0.

As soon as a token is known, a thread takes it up and computes what may follow, while the rank runs the next step; the
draw finds the mask ready, or waits for the rest of it. Grammars are compiled in a thread of their own, so that a slow
one keeps nobody's masks waiting.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Final

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, consume_token_par, fill_next_token_bitmask_par
from numpy.typing import NDArray

from shoal import logs
from shoal.checkpoint import describe, locate_model
from shoal.errors import StartError
from shoal.grammar_tokens import compiler_threads, grammar_tokens, open_matcher
from shoal.messages import Grammar
from shoal.tokenizer import load_tokenizer
from shoal.workers.constraints import Run

_LOG = logging.getLogger(__name__)

_FEW: Final = 16
"""Less than one id in so many are named one by one: that is quicker than to look at all."""


class Mask:
    """Which ids may be drawn next. Most grammars leave a handful, or, inside a string, forbid one."""

    def __init__(self, allowed: NDArray[np.bool_]) -> None:
        count = int(np.count_nonzero(allowed))
        few_allowed, few_forbidden = count * _FEW < allowed.size, (allowed.size - count) * _FEW < allowed.size
        self._allowed = np.flatnonzero(allowed) if few_allowed else None
        self._forbidden = np.flatnonzero(~allowed) if few_forbidden else ~allowed

    def apply(self, logits: NDArray[np.float32]) -> None:
        """Sets the others to -inf."""
        if self._allowed is None:
            logits[self._forbidden] = -np.inf
            return
        kept = logits[self._allowed]
        logits.fill(-np.inf)
        logits[self._allowed] = kept


class GrammarFailed(Exception):
    """A grammar that cannot be followed any further: it passed a limit of llguidance."""


def load_grammar_tokens(model: str | None) -> LLTokenizer:
    """The vocabulary of a model, as frontends see it too. Raises StartError."""
    location = locate_model(model)
    description = describe(location)
    tokenizer = load_tokenizer(str(location.path))
    return grammar_tokens(tokenizer, description.vocab_size, [*tokenizer.eos_ids, *description.eos_ids])


class GrammarThreads:
    """Compiles grammars and computes masks; one object a rank, for the life of the process.

    ``load`` is called at once, in a thread: a grammar that comes before it is done waits. ``mask_threads`` share the
    masks of one step.
    """

    def __init__(self, load: Callable[[], LLTokenizer], mask_threads: int = 1) -> None:
        self._compilers = compiler_threads("grammars")
        self._tokens = self._compilers.submit(load)
        self._executor = LLExecutor(mask_threads)
        self._followed: SimpleQueue[_Step | None] = SimpleQueue()
        self._masks = threading.Thread(target=self._compute_masks, name="masks", daemon=True)
        self._masks.start()

    def close(self) -> None:
        """Ends both threads; idempotent."""
        self._compilers.shutdown(cancel_futures=True)
        self._followed.put(None)
        self._masks.join()

    def open(self, grammar: Grammar, generated: Sequence[int]) -> "FollowedGrammar":
        """Starts to follow a grammar whose sequence has these generated tokens already."""
        return FollowedGrammar(self, grammar, generated)

    def eos_ids(self) -> list[int]:
        """The ids that end an answer. Raises GrammarFailed."""
        try:
            return self._tokens.result().eos_tokens
        except StartError as error:
            raise GrammarFailed(str(error)) from error

    def compile(self, source: str, accepted: Sequence[int]) -> "Future[tuple[LLMatcher, Mask]]":
        """A matcher after the ``accepted`` ids, and what may follow. The future may raise GrammarFailed."""
        return self._compilers.submit(self._compile, source, list(accepted))

    def follow(self, matcher: LLMatcher, token_id: int) -> "Future[Mask]":
        """Takes one token, and computes what may follow. The future may raise GrammarFailed. A matcher must not
        be given here again before its last future is done."""
        step = _Step(matcher, token_id)
        self._followed.put(step)
        return step.mask

    def _compile(self, source: str, accepted: list[int]) -> tuple[LLMatcher, Mask]:
        try:
            matcher = open_matcher(self._tokens.result(), source)
        except (StartError, ValueError) as error:
            raise GrammarFailed(str(error)) from error
        if accepted:
            matcher.consume_tokens(accepted)
        masks = self._make_masks([matcher])
        if matcher.is_error():
            raise GrammarFailed(matcher.get_error())
        return matcher, masks[0]

    def _compute_masks(self) -> None:
        while (steps := self._take_all()) is not None:
            matchers = [step.matcher for step in steps]
            try:
                consume_token_par(self._executor, [(step.matcher, step.token_id) for step in steps])
                masks = self._make_masks(matchers)
            except BaseException as error:
                # A thread has nobody above it: the rank, which waits for these masks, is told.
                for step in steps:
                    step.mask.set_exception(error)
                raise
            for step, mask in zip(steps, masks, strict=True):
                if step.matcher.is_error():
                    step.mask.set_exception(GrammarFailed(step.matcher.get_error()))
                else:
                    step.mask.set_result(mask)

    def _take_all(self) -> "list[_Step] | None":
        """What there is, at least one; None at the end."""
        steps = []
        step = self._followed.get()
        while step is not None:
            steps.append(step)
            try:
                step = self._followed.get_nowait()
            except Empty:
                return steps
        return None

    def _make_masks(self, matchers: list[LLMatcher]) -> list[Mask]:
        vocab_size = self._tokens.result().vocab_size
        bits = allocate_token_bitmask(len(matchers), vocab_size)
        fill_next_token_bitmask_par(
            self._executor, list(zip(matchers, range(len(matchers)), strict=True)), bits
        )
        spread = (np.unpackbits(row.view(np.uint8), count=vocab_size, bitorder="little") for row in bits)
        return [Mask(allowed.view(np.bool_)) for allowed in spread]


class _Step:
    """A token that a matcher is to take, and the mask that comes of it."""

    def __init__(self, matcher: LLMatcher, token_id: int) -> None:
        self.matcher = matcher
        self.token_id = token_id
        self.mask: Future[Mask] = Future()


class FollowedGrammar:
    """One sequence's grammar: knows at each token what may follow."""

    def __init__(self, threads: GrammarThreads, grammar: Grammar, generated: Sequence[int]) -> None:
        self._threads = threads
        self._thinking_end = Run(grammar.after) if grammar.after else None
        self._failed = False
        begins = self._answer_begins(generated)
        self._opened = threads.compile(grammar.source, generated[begins:])
        self._next: Future[Mask] | None = None

    def observe(self, token_id: int) -> None:
        """The sequence goes on with this token."""
        if self._failed:
            return
        if self._thinking_end is not None:
            if self._thinking_end.feed(token_id):
                self._thinking_end = None
            return
        matcher, _ = self._opened.result()
        self._next = self._threads.follow(matcher, token_id)

    def apply(self, logits: NDArray[np.float32]) -> bool:
        """Sets what may not be drawn to -inf: before the answer begins, the ids that would end it. False, and the
        logits are as before, where the grammar has failed."""
        if self._failed:
            return False
        try:
            if self._thinking_end is not None:
                logits[self._threads.eos_ids()] = -np.inf
            else:
                self._mask().apply(logits)
        except GrammarFailed as error:
            self._failed = True
            logs.event(_LOG, "grammar_failed", logging.WARNING, detail=str(error)[:500])
            return False
        return True

    def _answer_begins(self, generated: Sequence[int]) -> int:
        """The place in ``generated`` from which on the grammar holds."""
        if self._thinking_end is None:
            return 0
        for place, token_id in enumerate(generated):
            if self._thinking_end.feed(token_id):
                self._thinking_end = None
                return place + 1
        return len(generated)

    def _mask(self) -> Mask:
        return self._next.result() if self._next is not None else self._opened.result()[1]
