"""The vocabulary as llguidance sees it: what a grammar may spell, and how text that a grammar forces is tokenised.

Frontends check a request's grammar against it, rank 0 computes masks with it; both make it here, so that they agree.
"""

import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from shoal.errors import ModelError
from shoal.tokenizer import Tokenizer

LIMITS: Final = LLParserLimits(max_items_in_row=1_000, step_max_items=5_000, verbose_errors=False)
"""On what one grammar may cost: under llguidance's own an ambiguous one takes half a second for a token, under these
50 ms, and 1,000 alternatives of an object still pass. Errors do not repeat the grammar."""

_STACK_BYTES: Final = 256 << 20
"""Deep grammars recurse: a chain of 1,000 references overflows a usual thread's 8 MiB, the longest that llguidance
takes (65,535 symbols) needs 64 MiB. Address space, not memory, until it is used."""

_ISOLATOR: Final = "\x02"
"""Stands before a text to take up the space that some vocabularies put before the first word; merges with nothing."""


def grammar_tokens(tokenizer: Tokenizer, vocab_size: int, eos_ids: Collection[int]) -> LLTokenizer:
    """``llguidance_tokenizer`` of a loaded tokenizer. Takes 0.2 s for 49k tokens, 1.4 s for 262k; nearly all of it
    holds the GIL."""
    return llguidance_tokenizer(
        token_bytes=[tokenizer.token_bytes(token_id) for token_id in range(vocab_size)],
        special_ids=tokenizer.special_ids,
        eos_ids=eos_ids,
        vocab_size=vocab_size,
        encode=lambda text: tokenizer.encode(text, add_special=False),
    )


def llguidance_tokenizer(
    *,
    token_bytes: Sequence[bytes],
    special_ids: Collection[int],
    eos_ids: Collection[int],
    vocab_size: int,
    encode: Callable[[str], list[int]],
) -> LLTokenizer:
    """llguidance's view of a vocabulary, whose masks have ``vocab_size`` bits (the rows of the model's embedding).

    ``token_bytes``: by id; a missing or empty one is never drawn. No grammar matches the text of a token in
    ``special_ids``. ``eos_ids``: what a model ends its answer with, all drawn wherever a grammar may end. ``encode``
    tells which of several spellings of a forced text is the model's own. Raises ModelError where the vocabulary has
    no end-of-sequence token: an answer under a grammar could never end.
    """
    ends = sorted(token_id for token_id in set(eos_ids) if 0 <= token_id < vocab_size)
    if not ends:
        raise ModelError("the model has no end-of-sequence token, so no answer can be held to a grammar")
    padding = [b""] * (vocab_size - len(token_bytes))
    spelled = [*token_bytes[:vocab_size], *padding]
    special = {token_id for token_id in special_ids if 0 <= token_id < vocab_size} | set(ends)
    return LLTokenizer(TokenizerWrapper(_Vocabulary(spelled, special, ends[0], encode)), eos_token=ends)


def open_matcher(tokens: LLTokenizer, source: str) -> LLMatcher:
    """A matcher at the grammar's start. Raises ValueError, with llguidance's words, for what is no grammar or passes
    the limits. To be called in ``compiler_threads``, or a deep grammar ends the process. Takes 1 ms for an everyday
    schema, a second at the limits, and lets go of the GIL meanwhile."""
    matcher = LLMatcher(tokens, source, log_level=0, limits=LIMITS)
    if not matcher.is_error():
        # Some limits show only where the first token is to be drawn.
        matcher.compute_bitmask()
    if matcher.is_error():
        error = matcher.get_error().strip().removesuffix("<non-verbose/>").strip()
        raise ValueError("no answer can match this grammar" if error == "NoExtensionBias" else error)
    return matcher


def compiler_threads(name: str) -> ThreadPoolExecutor:
    """One thread whose stack is large enough for every grammar that passes the limits."""
    pool = ThreadPoolExecutor(1, name)
    usual = threading.stack_size(_STACK_BYTES)
    try:
        pool.submit(int).result()
    finally:
        threading.stack_size(usual)
    return pool


class _Vocabulary:
    """What ``TokenizerWrapper`` asks of a tokenizer."""

    bos_token_id = None

    def __init__(
        self, tokens: list[bytes], special_ids: set[int], eos_id: int, encode: Callable[[str], list[int]]
    ) -> None:
        self.tokens = tokens
        self.special_token_ids = sorted(special_ids)
        self.eos_token_id = eos_id
        self._special = special_ids
        self._encode = encode
        self._longest_first: dict[bytes, int] = {}
        self._longest = 0

    def __call__(self, text: str) -> list[int]:
        """Ids that spell exactly ``text``, none of them special: the model's own if they do, else the longest tokens.

        llguidance forces them one by one, so ids that spell anything else would end the answer.
        """
        wanted = text.encode()
        for ids in self._candidates(text):
            if self._spells(ids, wanted):
                return ids
        return self._greedy(wanted)

    def _candidates(self, text: str) -> list[list[int]]:
        plain = self._encode(text)
        if self._spells(plain, text.encode()):
            return [plain]
        isolated = self._encode(_ISOLATOR + text)
        return [isolated[cut:] for cut in range(1, min(4, len(isolated)))]

    def _spells(self, ids: list[int], wanted: bytes) -> bool:
        known = len(self.tokens)
        if any(token_id >= known or token_id in self._special for token_id in ids):
            return False
        return b"".join([self.tokens[token_id] for token_id in ids]) == wanted

    def _greedy(self, wanted: bytes) -> list[int]:
        if not self._longest_first:
            ordinary = ((n, token) for n, token in enumerate(self.tokens) if n not in self._special and token)
            for token_id, token in ordinary:
                self._longest_first.setdefault(token, token_id)
            self._longest = max(map(len, self._longest_first), default=1)
        ids, at = [], 0
        while at < len(wanted):
            lengths = range(min(self._longest, len(wanted) - at), 0, -1)
            length = next((n for n in lengths if wanted[at : at + n] in self._longest_first), 0)
            if not length:
                break
            ids.append(self._longest_first[wanted[at : at + length]])
            at += length
        return ids
