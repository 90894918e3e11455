"""A vocabulary of every byte, some words and a few special tokens, and what sampling under a grammar needs of it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from shoal.grammar_tokens import llguidance_tokenizer
from shoal.messages import Grammar, Sampling
from shoal.workers.grammar import GrammarThreads
from shoal.workers.sampler import Drawn, Sampler, SamplerRow

WORDS = (b'{"', b'":', b'","', b'"}', b"true", b"false", b"null", b"name", b"ab", b"abc", b" a", b"12", b"\n\n")
TEXTS = (*(bytes([byte]) for byte in range(256)), *WORDS, b"<eos>", b"<turn>", b"<think>", b"</think>")
EOS, TURN, THINK, THOUGHT = range(len(TEXTS) - 4, len(TEXTS))
ENDS = (EOS, TURN)
VOCABULARY = len(TEXTS) + 3
"""Three rows of the embedding stand for nothing, as in models whose embedding is padded."""

COMPACT = {"whitespace_flexible": False}


def encode(text: str) -> list[int]:
    """Longest words first; the texts of special tokens become them, as in a model's own tokenizer."""
    content, ids = text.encode(), []
    while content:
        token_id = max(
            (n for n, word in enumerate(TEXTS) if content.startswith(word)), key=lambda n: len(TEXTS[n])
        )
        ids.append(token_id)
        content = content[len(TEXTS[token_id]) :]
    return ids


def decode(ids: Sequence[int]) -> bytes:
    """The bytes of an answer, up to its end-of-sequence token."""
    return b"".join(TEXTS[token_id] for token_id in ids if token_id not in ENDS)


def tiny_tokens() -> LLTokenizer:
    """llguidance's view of the vocabulary."""
    return llguidance_tokenizer(
        token_bytes=TEXTS,
        special_ids=range(EOS, len(TEXTS)),
        eos_ids=ENDS,
        vocab_size=VOCABULARY,
        encode=encode,
    )


@contextmanager
def tiny_threads() -> Iterator[GrammarThreads]:
    """Threads that follow grammars over the vocabulary."""
    threads = GrammarThreads(tiny_tokens)
    try:
        yield threads
    finally:
        threads.close()


def json_grammar(schema: Any, after: tuple[int, ...] = ()) -> Grammar:
    """A JSON schema's grammar, without white space between tokens."""
    return Grammar(LLMatcher.grammar_from_json_schema(schema, overrides=COMPACT), after)


def regex_grammar(regex: str, after: tuple[int, ...] = ()) -> Grammar:
    """A regular expression's grammar."""
    return Grammar(LLMatcher.grammar_from_regex(regex), after)


def row(threads: GrammarThreads, generated: Sequence[int] = (), **sampling: Any) -> SamplerRow:
    """A sequence after ``generated``."""
    return SamplerRow(Sampling(**({"seed": 1} | sampling)), [1], list(generated), VOCABULARY, threads)


def draw(state: SamplerRow, logits: NDArray[np.float32] | None = None) -> Drawn:
    """One draw from all tokens alike, or from the logits given."""
    uniform = np.zeros(VOCABULARY, np.float32) if logits is None else logits.copy()
    return Sampler().sample(uniform[None], [state])[0]


def answer(state: SamplerRow, most_tokens: int, noise: np.random.Generator | None = None) -> list[int]:
    """Draws until an end-of-sequence token or so many tokens, from equal logits or from noise."""
    ids: list[int] = []
    while len(ids) < most_tokens and not (ids and ids[-1] in ENDS):
        logits = None if noise is None else noise.normal(0, 3, VOCABULARY).astype(np.float32)
        drawn = draw(state, logits)
        assert drawn.id >= 0, (drawn.id, decode(ids))
        ids.append(drawn.id)
        state.observe(drawn.id)
    return ids


def allowed(state: SamplerRow) -> list[int]:
    """The ids that may be drawn now; empty where none may."""
    logits = np.zeros(VOCABULARY, np.float32)
    state.constrain(logits)
    ids: list[int] = np.flatnonzero(np.isfinite(logits)).tolist()
    return ids
