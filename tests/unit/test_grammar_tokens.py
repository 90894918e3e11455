"""The vocabulary as grammars see it: special tokens, ends, padding, duplicate spellings, forced text."""

import threading

import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer
from tiny_grammars import ENDS, EOS, TEXTS, THOUGHT, VOCABULARY, encode, tiny_tokens

from shoal.errors import ModelError
from shoal.grammar_tokens import compiler_threads, grammar_tokens, llguidance_tokenizer, open_matcher
from shoal.tokenizer import Tokenizer, TokenizerParts
from shoal.tokenizer.gguf import rebuild


def allowed(matcher: LLMatcher) -> list[int]:
    mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    ids: list[int] = np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist()
    return ids


def after(tokens: LLTokenizer, regex: str, text: str = "") -> list[int]:
    matcher = open_matcher(tokens, LLMatcher.grammar_from_regex(regex))
    assert matcher.consume_tokens(encode(text)) or not text
    return allowed(matcher)


def test_every_end_of_sequence_token_stands_where_the_grammar_may_end() -> None:
    tokens = tiny_tokens()
    assert after(tokens, "a+b?") == sorted(n for n, text in enumerate(TEXTS) if text in (b"a", b"ab"))
    assert set(ENDS) < set(after(tokens, "a+b?", "a"))
    assert after(tokens, "[ab]c", "ac") == list(ENDS)
    matcher = open_matcher(tokens, LLMatcher.grammar_from_regex("a"))
    assert matcher.consume_tokens([ord("a"), ENDS[1]])
    assert not matcher.is_error()
    assert allowed(matcher) == list(ENDS)


def test_special_tokens_are_not_drawn_for_their_texts() -> None:
    tokens = tiny_tokens()
    for text in (b"<eos>", b"</think>"):
        spelled, matcher = [], open_matcher(tokens, LLMatcher.grammar_from_regex(text.decode()))
        while not matcher.is_stopped():
            spelled.append(allowed(matcher)[0])
            assert matcher.consume_token(spelled[-1])
        assert b"".join(TEXTS[token_id] for token_id in spelled) == text
        assert all(token_id < EOS for token_id in spelled)
    assert not {*ENDS, THOUGHT} & set(after(tokens, "(?s:.*)x"))


def test_a_lark_grammar_may_name_a_special_token() -> None:
    matcher = open_matcher(tiny_tokens(), 'start: "a" </think> "b"'.replace("</think>", f"<[{THOUGHT}]>"))
    drawn = []
    while not matcher.is_stopped():
        drawn.append(allowed(matcher)[0])
        assert matcher.consume_token(drawn[-1])
    assert drawn == [ord("a"), THOUGHT, ord("b")]


def test_rows_beyond_the_vocabulary_are_never_drawn() -> None:
    tokens = tiny_tokens()
    assert tokens.vocab_size == VOCABULARY
    assert max(after(tokens, "(?s:.*)")) < len(TEXTS)


def test_ids_beyond_the_model_are_left_out() -> None:
    """Some tokenizers have more entries than the model has rows."""
    tokens = llguidance_tokenizer(
        token_bytes=TEXTS, special_ids=[EOS], eos_ids=[10, EOS, 10**9], vocab_size=200, encode=encode
    )
    assert tokens.vocab_size == 200
    assert tokens.eos_tokens == [10]


def test_a_model_without_an_end_can_follow_no_grammar() -> None:
    with pytest.raises(ModelError, match="end-of-sequence"):
        llguidance_tokenizer(
            token_bytes=TEXTS, special_ids=[], eos_ids=[-1, 999], vocab_size=300, encode=encode
        )


def test_equal_spellings_may_all_be_drawn() -> None:
    texts = [b"a", b"b", b"a", b""]
    tokens = llguidance_tokenizer(
        token_bytes=texts,
        special_ids=[],
        eos_ids=[3],
        vocab_size=4,
        encode=lambda text: [ord(c) - 97 for c in text],
    )
    assert after(tokens, "a|bb") == [0, 1, 2]


def forced(tokens: LLTokenizer, text: str) -> list[int]:
    """What is drawn where the grammar leaves no choice."""
    matcher, drawn = open_matcher(tokens, LLMatcher.grammar_from_regex(text)), []
    while not matcher.is_stopped():
        mask = allowed(matcher)
        assert len(mask) == 1
        drawn += mask
        assert matcher.consume_token(mask[0]), matcher.get_error()
    return drawn


def test_forced_text_is_tokenised_as_the_model_would() -> None:
    odd = llguidance_tokenizer(
        token_bytes=TEXTS,
        special_ids=[],
        eos_ids=ENDS,
        vocab_size=VOCABULARY,
        encode=lambda text: [ord("a"), *encode(text[1:])] if text.startswith("ab") else encode(text),
    )
    assert forced(tiny_tokens(), "abc12") == [TEXTS.index(b"abc"), TEXTS.index(b"12")]
    assert forced(odd, "abc12")[:2] == [ord("a"), ord("b")]


def test_an_encoder_that_changes_the_text_is_not_followed() -> None:
    """Unicode normalisation and the like: the answer must be what the grammar says, byte by byte."""
    tokens = llguidance_tokenizer(
        token_bytes=TEXTS,
        special_ids=[],
        eos_ids=ENDS,
        vocab_size=VOCABULARY,
        encode=lambda text: encode(text.upper()),
    )
    assert forced(tokens, "abc") == [TEXTS.index(b"abc")]


def test_the_space_before_the_first_word_is_no_part_of_forced_text() -> None:
    tokenizer = sentencepiece_tokenizer()
    assert tokenizer.decode(tokenizer.encode("ab", add_special=False)) == "ab"
    tokens = grammar_tokens(tokenizer, tokenizer.vocab_size, tokenizer.eos_ids)
    assert [tokenizer.token_bytes(token_id) for token_id in forced(tokens, "ab ab")] == [b"ab", b" ab"]


def sentencepiece_tokenizer() -> Tokenizer:
    """As Llama 2's: a space is put before every text."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<unk>", "<s>", "</s>", *bytes_, "a", "b", "\u2581", "ab", "\u2581ab"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * 5]
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -1.0, -2.0]
    parts: TokenizerParts = rebuild(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": pieces,
            "tokenizer.ggml.token_type": np.array(kinds, np.int32),
            "tokenizer.ggml.scores": np.array(scores, np.float32),
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        },
        "a file",
    )
    return Tokenizer(parts)


@pytest.mark.parametrize("source", ["", "{", "start: (", '{"grammars": [{"json_schema": {"type": "moon"}}]}'])
def test_what_is_no_grammar_is_refused_with_a_reason(source: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        open_matcher(tiny_tokens(), source)


def test_a_grammar_that_nothing_matches_is_refused() -> None:
    with pytest.raises(ValueError, match="no answer can match"):
        open_matcher(tiny_tokens(), LLMatcher.grammar_from_regex(r"[^\s\S]"))


def chain(length: int) -> str:
    """A grammar as deep as it is long."""
    return "start: x0\n" + "".join(f'x{n}: "a" x{n + 1} | "b"\n' for n in range(length)) + f'x{length}: "c"'


def test_deep_grammars_do_not_overflow_the_stack() -> None:
    tokens, threads = tiny_tokens(), compiler_threads("test")
    before = threading.stack_size()
    matcher = threads.submit(open_matcher, tokens, chain(4_000)).result()
    assert matcher.consume_tokens([ord("a"), ord("b")])
    assert allowed(matcher) == list(ENDS)
    threads.shutdown()
    assert threading.stack_size() == before, "other threads have the usual stack"


def test_a_grammar_with_too_many_ways_to_go_on_fails() -> None:
    ways = range(1_001)
    source = "start: " + " | ".join(f"x{n}" for n in ways) + "\n" + "\n".join(f'x{n}: "a" /b{n}/' for n in ways)
    matcher = open_matcher(tiny_tokens(), source)
    assert not matcher.consume_token(ord("a"))
    assert "items" in matcher.get_error()
