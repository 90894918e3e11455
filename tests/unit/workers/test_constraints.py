"""min_tokens, allowed ids, bad words and the thinking budget: which ids may be drawn, position by position."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.messages import Sampling, ThinkingBudget
from shoal.workers.constraints import Run
from shoal.workers.sampler import NOTHING_ALLOWED, Drawn, Sampler, SamplerRow

VOCABULARY = 12
EVERY = set(range(VOCABULARY))

tokens = st.lists(st.integers(0, 2), max_size=14)
runs = st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple)


def row(prompt: Sequence[int] = (1,), generated: Sequence[int] = (), **sampling: Any) -> SamplerRow:
    return SamplerRow(Sampling(**({"seed": 1} | sampling)), list(prompt), list(generated), VOCABULARY)


def allowed(state: SamplerRow) -> set[int]:
    logits = np.zeros(VOCABULARY, np.float32)
    state.constrain(logits)
    return set(np.flatnonzero(np.isfinite(logits)).tolist())


def draw(state: SamplerRow, logits: torch.Tensor | None = None) -> Drawn:
    given = torch.zeros(VOCABULARY) if logits is None else logits.clone()
    return Sampler().sample(given.unsqueeze(0).numpy(), [state])[0]


def test_a_row_without_constraints_has_none() -> None:
    assert not row().constrained
    assert not row(min_tokens=3).constrained
    assert row(allowed_ids=(1,)).constrained


def test_the_end_is_held_back_until_enough_was_generated() -> None:
    state = row(min_tokens=2, held_back=(3, 7))
    seen = []
    for token_id in (0, 0, 0):
        seen.append(allowed(state))
        state.observe(token_id)
    assert seen == [EVERY - {3, 7}, EVERY - {3, 7}, EVERY]
    assert allowed(row(generated=[0, 0], min_tokens=2, held_back=(3,))) == EVERY


def test_only_allowed_ids_are_drawn() -> None:
    state = row(allowed_ids=(2, 5), temperature=5.0)
    drawn = set()
    for _ in range(40):
        drawn.add(draw(state).id)
        state.observe(2)
    assert drawn == {2, 5}


def test_bad_words_are_never_completed() -> None:
    words = ((4,), (1, 2), (0, 1, 3), (5, 5))
    state = row(prompt=[9, 0], bad_words=words)
    assert allowed(state) == EVERY - {4}
    state.observe(1)
    assert allowed(state) == EVERY - {4, 2, 3}, "the prompt's last token counts"
    state.observe(5)
    assert allowed(state) == EVERY - {4, 5}
    state.observe(6)
    assert allowed(state) == EVERY - {4}


@given(tokens, tokens, st.lists(runs, min_size=1, max_size=5))
def test_bad_words_forbid_what_would_complete_them(
    prompt: list[int], generated: list[int], words: list[tuple[int, ...]]
) -> None:
    text = (*prompt, *generated)
    forbidden = {word[-1] for word in words if len(word) == 1 or text[1 - len(word) :] == word[:-1]}
    grown = row(prompt, bad_words=tuple(words))
    for token_id in generated:
        grown.observe(token_id)
    for state in (grown, row(prompt, generated, bad_words=tuple(words))):
        assert allowed(state) == EVERY - forbidden


@given(tokens, runs)
def test_a_run_is_found_wherever_it_ends(text: list[int], wanted: tuple[int, ...]) -> None:
    search = Run(wanted)
    found = [search.feed(token_id) for token_id in text]
    ends = [tuple(text[: n + 1][-len(wanted) :]) == wanted for n in range(len(text))]
    assert found == ends


def think(most_tokens: int, *end: int) -> ThinkingBudget:
    return ThinkingBudget(most_tokens=most_tokens, end=end)


def test_thinking_past_its_budget_is_ended() -> None:
    state = row(thinking=think(2, 8, 9), temperature=0.0)
    drawn = []
    for _ in range(6):
        drawn.append(draw(state, torch.arange(VOCABULARY, 0, -1.0)).id)
        state.observe(drawn[-1])
    assert drawn == [0, 0, 8, 9, 0, 0]


def test_thinking_that_ended_by_itself_is_left_alone() -> None:
    state = row(generated=[8, 9, 0, 0, 0, 0], thinking=think(2, 8, 9))
    assert allowed(state) == EVERY


def test_what_the_model_began_of_the_end_is_completed() -> None:
    assert allowed(row(generated=[0, 8, 8], thinking=think(3, 8, 8, 9))) == {9}
    assert allowed(row(generated=[0, 8, 8], thinking=think(4, 8, 8, 9))) == EVERY
    assert allowed(row(generated=[0, 9, 8], thinking=think(3, 8, 8, 9))) == {8}


def test_no_thinking_at_all_is_a_budget() -> None:
    assert allowed(row(thinking=think(0, 8))) == {8}


@given(st.lists(st.integers(0, 2), max_size=8), runs, st.integers(0, 8))
def test_the_budget_ends_thinking_in_time(text: list[int], end: tuple[int, ...], most_tokens: int) -> None:
    """Whatever the model writes, the end stands in the answer once budget and end are through."""
    state, written = row(thinking=think(most_tokens, *end)), []
    for position in range(most_tokens + len(end)):
        may = allowed(state)
        wanted = text[position] if position < len(text) else 11
        written.append(wanted if wanted in may else min(may))
        state.observe(written[-1])
    assert any(tuple(written[n : n + len(end)]) == end for n in range(len(written)))
    assert allowed(state) == EVERY


def test_a_forced_end_comes_before_other_constraints() -> None:
    state = row(thinking=think(0, 8), allowed_ids=(1,), bad_words=((8,),), min_tokens=5, held_back=(8,))
    assert allowed(state) == {8}
    state.observe(8)
    assert allowed(state) == {1}


def test_a_row_that_may_draw_nothing_fails_alone() -> None:
    stuck = row(allowed_ids=(3,), bad_words=((3,),))
    free = row(seed=5)
    logits = torch.randn(3, VOCABULARY)
    expected = draw(free, logits[1])
    drawn = Sampler().sample(logits.clone().numpy(), [stuck, free, row(allowed_ids=(4,))])
    assert drawn == [Drawn(NOTHING_ALLOWED, None), expected, Drawn(4, None)]
    stuck.observe(NOTHING_ALLOWED)
    assert draw(stuck).id >= 0, "what comes after the end is for nobody, and harms nobody"


def test_logits_that_are_not_finite_are_told_from_constraints() -> None:
    logits = torch.zeros(VOCABULARY)
    logits[7] = float("nan")
    assert draw(row(allowed_ids=(3,)), logits).id == -1
    assert draw(row(allowed_ids=(3,), bad_words=((3,),)), logits).id == -1


def test_logprobs_are_told_from_before_the_constraints() -> None:
    logits = torch.randn(VOCABULARY)
    expected = logits.double().log_softmax(0)
    drawn = draw(row(allowed_ids=(2, 5), logprobs=3, temperature=0.0), logits)
    assert drawn.id == (2 if logits[2] > logits[5] else 5)
    assert drawn.logprob is not None
    assert drawn.logprob.logprob == pytest.approx(expected[drawn.id].item(), abs=1e-5)
    assert [token_id for token_id, _ in drawn.logprob.top] == expected.topk(3).indices.tolist()


def test_filters_work_on_what_is_allowed() -> None:
    """top_k 1 of two allowed tokens is the better of them, however bad both are."""
    logits = torch.arange(VOCABULARY, 0, -1.0)
    assert {draw(row(allowed_ids=(8, 9), top_k=1, seed=seed), logits).id for seed in range(20)} == {8}


@pytest.mark.parametrize("token_id", [-1, VOCABULARY])
@pytest.mark.parametrize(
    "field",
    [
        lambda n: {"allowed_ids": (n,)},
        lambda n: {"bad_words": ((1, n),)},
        lambda n: {"min_tokens": 1, "held_back": (n,)},
        lambda n: {"thinking": think(1, n)},
    ],
)
def test_ids_outside_of_the_vocabulary_are_refused(token_id: int, field: Any) -> None:
    with pytest.raises(ValueError, match="outside of the vocabulary"):
        row(**field(token_id))


@pytest.mark.parametrize("field", [{"bad_words": ((),)}, {"thinking": think(1)}])
def test_empty_runs_are_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="empty"):
        row(**field)
