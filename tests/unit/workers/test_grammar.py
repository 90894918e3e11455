"""Grammars on the rank: masks, replay after a preemption, thinking first, failures, and where the masks are made."""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from tiny_grammars import (
    ENDS,
    EOS,
    TEXTS,
    THOUGHT,
    VOCABULARY,
    allowed,
    answer,
    decode,
    draw,
    encode,
    json_grammar,
    regex_grammar,
    row,
    tiny_threads,
    tiny_tokens,
)

from shoal.errors import ModelError
from shoal.messages import Grammar, Sampling, ThinkingBudget
from shoal.workers.grammar import GrammarThreads, Mask
from shoal.workers.sampler import GRAMMAR_FAILED, NOTHING_ALLOWED, Sampler, SamplerRow

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "old": {"type": "boolean"},
        "n": {"enum": [12, None]},
    },
    "required": ["name", "old", "n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def threads() -> Iterator[GrammarThreads]:
    with tiny_threads() as each:
        yield each


def test_an_answer_is_what_the_grammar_says(threads: GrammarThreads) -> None:
    import json

    noise = np.random.default_rng(3)
    for seed in range(20):
        ids = answer(row(threads, seed=seed, grammar=json_grammar(PERSON)), 200, noise)
        person = json.loads(decode(ids))
        assert ids[-1] in ENDS
        assert set(person) == {"name", "old", "n"}
        assert len(person["name"]) <= 6
        assert person["n"] in (12, None)


def test_the_end_comes_where_the_grammar_ends_and_nowhere_else(threads: GrammarThreads) -> None:
    state = row(threads, grammar=regex_grammar("a{1,2}"))
    seen = []
    for token_id in (ord("a"), ord("a"), EOS):
        seen.append(allowed(state))
        state.observe(token_id)
    assert seen == [[ord("a")], sorted([ord("a"), *ENDS]), list(ENDS)]
    assert allowed(state) == list(ENDS), "a step that was planned before the end was known"


def test_replay_is_like_never_having_left(threads: GrammarThreads) -> None:
    grammar = json_grammar(PERSON)
    noise = np.random.default_rng(5)
    whole = answer(row(threads, grammar=grammar), 200, noise)
    grown = row(threads, grammar=grammar)
    for place, token_id in enumerate(whole):
        assert allowed(row(threads, whole[:place], grammar=grammar)) == allowed(grown)
        grown.observe(token_id)


def test_a_resumed_answer_goes_on_with_the_same_tokens(threads: GrammarThreads) -> None:
    grammar = regex_grammar("[a-z ]{40,60}")
    whole = answer(row(threads, seed=7, grammar=grammar), 99)
    for place in (0, 1, 17, len(whole) - 1):
        resumed = row(threads, whole[:place], seed=7, grammar=grammar)
        assert answer(resumed, len(whole) - place) == whole[place:]


def test_the_grammar_holds_after_the_thinking(threads: GrammarThreads) -> None:
    state = row(threads, grammar=regex_grammar("ab", after=(THOUGHT,)))
    for token_id in encode("no grammar here: {"):
        assert set(allowed(state)) == set(range(VOCABULARY)) - set(ENDS), "thinking is free, but must end"
        state.observe(token_id)
    state.observe(THOUGHT)
    assert decode(answer(state, 9)) == b"ab"


def test_thinking_that_was_over_before_a_preemption_stays_over(threads: GrammarThreads) -> None:
    grammar = regex_grammar("[ab]c", after=(ord("x"), ord("y")))
    thought = encode("abx xy")
    assert allowed(row(threads, thought, grammar=grammar)) == [ord("a"), ord("b")]
    assert allowed(row(threads, [*thought, ord("b")], grammar=grammar)) == [ord("c")]
    assert len(allowed(row(threads, thought[:-1], grammar=grammar))) == VOCABULARY - len(ENDS)


def test_a_thinking_budget_leads_to_the_answer(threads: GrammarThreads) -> None:
    thinking = ThinkingBudget(most_tokens=3, end=(THOUGHT,))
    state = row(threads, thinking=thinking, grammar=regex_grammar("ab", after=(THOUGHT,)))
    drawn = answer(state, 9)
    assert drawn[3] == THOUGHT
    assert THOUGHT not in drawn[:3]
    assert decode(drawn[4:]) == b"ab"


def test_grammar_and_other_constraints_hold_together(threads: GrammarThreads) -> None:
    grammar = regex_grammar("[ab]{3}")
    state = row(
        threads, grammar=grammar, bad_words=((ord("a"),), (TEXTS.index(b"ab"),), (TEXTS.index(b"abc"),))
    )
    assert decode(answer(state, 9)) == b"bbb"
    stuck = row(threads, [ord("b")] * 3, grammar=grammar, min_tokens=9, held_back=ENDS)
    assert draw(stuck).id == NOTHING_ALLOWED


def test_what_is_not_finite_is_no_fault_of_the_grammar(threads: GrammarThreads) -> None:
    logits = np.zeros(VOCABULARY, np.float32)
    logits[3] = np.nan
    state = row(threads, grammar=regex_grammar("ab"))
    assert draw(state, logits).id == -1
    state.observe(-1)
    assert draw(state).id >= 0


def test_a_grammar_that_fails_harms_its_own_row_only(
    threads: GrammarThreads, caplog: pytest.LogCaptureFixture
) -> None:
    states = [
        row(threads, grammar=Grammar("start: (")),
        row(threads, grammar=regex_grammar("ab")),
        row(threads, [ord("z")], grammar=regex_grammar("ab")),
        row(threads, temperature=0.0),
    ]
    drawn = [token.id for token in Sampler().sample(np.zeros((4, VOCABULARY), np.float32), states)]
    assert drawn == [GRAMMAR_FAILED, TEXTS.index(b"ab"), GRAMMAR_FAILED, 0]
    for state, token_id in zip(states, drawn, strict=True):
        state.observe(token_id)
    assert draw(states[0]).id >= 0, "what comes after the end is for nobody, and harms nobody"
    assert caplog.text.count("grammar_failed") == 2


def test_a_vocabulary_that_cannot_be_read_fails_grammars_only() -> None:
    def load() -> Any:
        raise ModelError("the tokenizer is broken")

    threads = GrammarThreads(load)
    assert draw(row(threads, grammar=regex_grammar("a"))).id == GRAMMAR_FAILED
    assert draw(row(threads, grammar=regex_grammar("a", after=(THOUGHT,)))).id == GRAMMAR_FAILED
    assert draw(row(threads)).id >= 0
    threads.close()


def test_a_grammar_needs_threads() -> None:
    with pytest.raises(ValueError, match="grammar"):
        SamplerRow(Sampling(seed=1, grammar=regex_grammar("a")), [1], [], VOCABULARY)


def test_logprobs_are_told_from_before_the_mask(threads: GrammarThreads) -> None:
    drawn = draw(row(threads, logprobs=2, grammar=regex_grammar("z")), np.zeros(VOCABULARY, np.float32))
    assert drawn.id == ord("z")
    assert drawn.logprob is not None
    assert drawn.logprob.logprob == pytest.approx(-np.log(VOCABULARY), abs=1e-5)
    assert [token_id for token_id, _ in drawn.logprob.top] == [0, 1]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 1.0])
def test_a_mask_keeps_what_it_allows_and_nothing_else(share: float) -> None:
    noise = np.random.default_rng(1)
    may, logits = noise.random(1000) < share, noise.normal(size=1000).astype(np.float32)
    expected = np.where(may, logits, -np.inf)
    Mask(may).apply(logits)
    np.testing.assert_array_equal(logits, expected)


class WatchedThreads(GrammarThreads):
    """Tells which threads computed masks, and how many masks at a time; each waits for ``go``."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int]] = []
        self.go = threading.Event()
        self.go.set()
        self.begun = threading.Event()
        super().__init__(tiny_tokens)

    def _make_masks(self, matchers: Sequence[Any]) -> list[Mask]:
        self.batches.append((threading.get_ident(), len(matchers)))
        self.begun.set()
        assert self.go.wait(20)
        return super()._make_masks(list(matchers))


def test_masks_are_made_in_other_threads_as_soon_as_a_token_is_known() -> None:
    threads = WatchedThreads()
    states = [row(threads, grammar=regex_grammar("[ab]{9}")) for _ in range(5)]
    drawn = [draw(state).id for state in states]
    assert len(threads.batches) == 5
    threads.begun.clear()
    threads.go.clear()
    states[0].observe(drawn[0])
    assert threads.begun.wait(20), "without a draw that asks for it"
    for state, token_id in zip(states[1:], drawn[1:], strict=True):
        state.observe(token_id)
    threads.go.set()
    for state in states:
        assert draw(state).id >= 0
    assert [count for _, count in threads.batches[5:]] == [1, 4], "what is waiting is computed together"
    assert threading.get_ident() not in {thread for thread, _ in threads.batches}
    threads.close()


def test_a_grammar_that_takes_long_to_compile_keeps_no_mask_waiting() -> None:
    threads = WatchedThreads()
    running = row(threads, grammar=regex_grammar("[ab]{9}"))
    running.observe(draw(running).id)
    assert draw(running).id >= 0
    compile_now, slow = threading.Event(), threads._compile

    def compile_slowly(*args: Any) -> Any:
        assert compile_now.wait(20)
        return slow(*args)

    threads._compile = compile_slowly  # type: ignore[method-assign, assignment]
    coming = row(threads, grammar=regex_grammar("c"))
    for _ in range(3):
        running.observe(draw(running).id)
    assert allowed(running)
    compile_now.set()
    assert draw(coming).id == ord("c")
    threads.close()


def test_closing_twice_is_closing_once() -> None:
    threads = GrammarThreads(tiny_tokens)
    threads.close()
    threads.close()
