"""Growing answers: the joined pieces are the whole decoding up to the first stop string, and no piece lies."""

import random
import time
from itertools import pairwise

import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from shoal.frontend.detokenize import Delta, Detokenizer
from shoal.tokenizer import Tokenizer
from shoal.tokenizer.parts import TokenizerParts

WORDS = ["a", "b", "ab", "\u0120", "\u0120a", "ba", "aab", "\n", "\u00e9"]


def byte_level() -> Tokenizer:
    """Every byte, some words, and a special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: n for n, piece in enumerate(dict.fromkeys(alphabet + WORDS))}
    return made(vocab, decoders.ByteLevel(), sentencepiece=False)


def sentencepiece_like() -> Tokenizer:
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + [word.replace("\u0120", "\u2581") for word in WORDS]
    decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made({piece: n for n, piece in enumerate(dict.fromkeys(pieces))}, decoder, sentencepiece=True)


def made(vocab: dict[str, int], decoder: decoders.Decoder, *, sentencepiece: bool) -> Tokenizer:
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.decoder = decoder
    core.add_special_tokens([AddedToken("<end>", normalized=False)])
    parts = TokenizerParts(
        core=core,
        spelling="sentencepiece" if sentencepiece else "byte_level",
        strips_first_space=sentencepiece,
        special_tokens={},
        chat_templates={},
    )
    return Tokenizer(parts)


BYTE_LEVEL, SENTENCEPIECE = byte_level(), sentencepiece_like()
TOKENIZERS = st.sampled_from([BYTE_LEVEL, SENTENCEPIECE])
CHARACTERS = "aab\u00e9 \n\U0001f469\u200d\ufffd"


@st.composite
def answers(draw: st.DrawFn) -> tuple[Tokenizer, list[list[int]]]:
    """A tokenizer and ids in random splits: bytes of real characters, words, and noise."""
    tokenizer = draw(TOKENIZERS)
    text = draw(st.text(CHARACTERS, max_size=12))
    by_byte = {
        tokenizer.token_bytes(n): n
        for n in range(tokenizer.vocab_size - 1)
        if len(tokenizer.token_bytes(n)) == 1
    }
    ids = [by_byte[bytes([byte])] for byte in text.encode()]
    noise = draw(st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=8))
    for token_id in noise:
        ids.insert(draw(st.integers(0, len(ids))), token_id)
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    return tokenizer, [ids[start:end] for start, end in pairwise([0, *cuts, len(ids)])]


STOPS = st.lists(st.text(CHARACTERS + "<end>", min_size=1, max_size=4), max_size=4)


def first_stop(text: str, stops: list[str]) -> str | None:
    """The stop string that is complete first; of those that end together, the longest."""
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    return min(ends)[2] if ends else None


@settings(max_examples=400, deadline=None)
@given(answers(), STOPS, st.booleans(), st.booleans())
def test_the_pieces_are_the_whole_up_to_the_first_stop_string(
    answer: tuple[Tokenizer, list[list[int]]], stops: list[str], skip_special: bool, include_stop: bool
) -> None:
    tokenizer, pushes = answer
    ids = [token_id for push in pushes for token_id in push]
    whole = tokenizer.decode(ids, skip_special)
    stop = first_stop(whole, stops)
    expected = whole
    if stop is not None:
        end = whole.find(stop) + len(stop)
        expected = whole[: end if include_stop else end - len(stop)]

    detokenizer = Detokenizer(tokenizer, stops, skip_special, include_stop)
    taken: list[int] = []
    emitted = known = ""
    stream = tokenizer.stream(skip_special)
    for push in pushes:
        delta = detokenizer.push(push)
        known += "".join(map(stream.feed, push))
        taken += push[: delta.consumed]
        emitted += delta.text
        assert expected.startswith(emitted)
        assert delta.stopped is not None or delta.consumed == len(push)
        if delta.stopped is not None:
            assert tokenizer.decode(taken, skip_special).count(stop or "") >= 1
            assert stop is not None
            assert stop not in tokenizer.decode(taken[:-1], skip_special).rstrip("\ufffd")
            break
        risky = max((n for s in stops for n in range(1, len(s)) if known.endswith(s[:n])), default=0)
        assert emitted == known[: len(known) - risky]
    emitted += detokenizer.finish()
    assert emitted == expected
    assert detokenizer.stopped == stop
    assert detokenizer.push(ids) == Delta("", stop, 0) or stop is None
    assert detokenizer.finish() == "" or stop is None


def test_a_character_is_shown_when_its_last_byte_is_there() -> None:
    for tokenizer in (BYTE_LEVEL, SENTENCEPIECE):
        by_byte = {tokenizer.token_bytes(n): n for n in range(256)}
        detokenizer = Detokenizer(tokenizer)
        texts = [detokenizer.push([by_byte[bytes([byte])]]).text for byte in "é\U0001f469".encode()]
        assert texts == ["", "é", "", "", "", "\U0001f469"]
        assert detokenizer.push([by_byte[b"\xf0"], by_byte[b"\x9f"]]).text == ""
        assert detokenizer.finish() == ("\ufffd" if tokenizer is BYTE_LEVEL else "\ufffd\ufffd")


def test_only_the_answer_s_first_space_is_taken_off() -> None:
    space_a = SENTENCEPIECE.encode("\u2581a", add_special=False)[0]
    word = next(n for n in range(SENTENCEPIECE.vocab_size) if SENTENCEPIECE.token_bytes(n) == b" a")
    detokenizer = Detokenizer(SENTENCEPIECE)
    assert [detokenizer.push([word]).text for _ in range(3)] == ["a", " a", " a"]
    assert SENTENCEPIECE.token_bytes(space_a) in (b" ", b" a", b"\xe2")
    going_on = Detokenizer(SENTENCEPIECE, goes_on=True)
    assert going_on.push([word, word]).text == " a a"


def test_consumed_counts_the_id_that_completed_the_stop_string() -> None:
    ids = BYTE_LEVEL.encode("xyab--", add_special=False)
    assert len(ids) == 6
    assert Detokenizer(BYTE_LEVEL, ["ab"]).push(ids) == Delta("xy", "ab", 4)
    assert Detokenizer(BYTE_LEVEL, ["ab"], include_stop=True).push(ids) == Delta("xyab", "ab", 4)


def test_special_tokens_can_be_shown_and_can_stop() -> None:
    end = BYTE_LEVEL.vocab_size - 1
    ids = [*BYTE_LEVEL.encode("x", add_special=False), end]
    assert Detokenizer(BYTE_LEVEL).push(ids).text == "x"
    assert Detokenizer(BYTE_LEVEL, skip_special=False).push(ids).text == "x<end>"
    assert Detokenizer(BYTE_LEVEL, ["<end>"], skip_special=False).push(ids) == Delta("x", "<end>", 2)


def test_long_answers_and_many_stop_strings_stay_linear() -> None:
    rng = random.Random()
    ids = [rng.randrange(BYTE_LEVEL.vocab_size - 1) for _ in range(10_000)]
    stops = ["a" * 200 + "!", *("".join(rng.choices("ab", k=30)) + "?" for _ in range(300))]
    detokenizer = Detokenizer(BYTE_LEVEL, stops)
    started = time.process_time()
    text = "".join(detokenizer.push([token_id]).text for token_id in ids) + detokenizer.finish()
    assert text == BYTE_LEVEL.decode(ids)
    assert time.process_time() - started < 2
