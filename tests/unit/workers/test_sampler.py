"""The sampler: penalties by hand-computed cases, log-probabilities, seeds and positions, rows apart."""

import math
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from shoal.messages import Sampling
from shoal.workers.sampler import NOT_KEPT, Drawn, Sampler, SamplerRow

VOCABULARY = 97


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def row(prompt: list[int] | None = None, generated: list[int] | None = None, **sampling: Any) -> SamplerRow:
    wanted = Sampling(**({"seed": 1, "temperature": 0.0} | sampling))
    return SamplerRow(wanted, prompt if prompt is not None else [1], generated or [], VOCABULARY)


def adjusted(logits: list[float], state: SamplerRow) -> list[float]:
    padded = np.zeros(VOCABULARY, dtype=np.float32)
    padded[: len(logits)] = logits
    state.adjust(padded)
    assert not padded[len(logits) :].any()
    values: list[float] = padded[: len(logits)].tolist()
    return values


def sample_one(logits: torch.Tensor, state: SamplerRow) -> Drawn:
    return Sampler().sample(logits.clone().unsqueeze(0).numpy(), [state])[0]


def test_repetition_penalty_counts_prompt_and_answer_once_each() -> None:
    state = row([0, 0, 1], [2, 2], repetition_penalty=2.0)
    assert adjusted([4.0, -4.0, 6.0, 8.0], state) == [2.0, -8.0, 3.0, 8.0]


def test_presence_and_frequency_penalty_see_the_answer_only() -> None:
    state = row([0, 1, 1], [1, 2, 2, 2], presence_penalty=0.5, frequency_penalty=0.25)
    assert adjusted([1.0, 1.0, 1.0, 1.0], state) == [1.0, 0.25, -0.25, 1.0]


def test_bias_comes_before_the_penalties_and_adds_up() -> None:
    state = row([0], [0], logit_bias=((0, 3.0), (2, -100.0), (2, -1.0)), repetition_penalty=2.0)
    assert adjusted([1.0, 1.0, 1.0], state) == [2.0, 1.0, -100.0]


def test_all_penalties_together() -> None:
    wanted = {"repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": -0.5}
    assert adjusted([3.0, 3.0, -3.0], row([0], [1, 2, 2], **wanted)) == [2.0, 1.5, -4.5]


def test_observed_tokens_are_penalised_like_given_ones() -> None:
    wanted = {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.2}
    tokens = torch.randint(0, VOCABULARY, (200,)).tolist()
    grown, given = row([5, 6], tokens[:3], **wanted), row([5, 6], tokens, **wanted)
    for token_id in tokens[3:]:
        grown.observe(token_id)
    assert grown.position == given.position == 200
    logits = torch.randn(VOCABULARY).tolist()
    assert adjusted(logits, grown) == adjusted(logits, given)
    counts = Counter(tokens)
    most = counts.most_common(1)[0][0]
    base = logits[most] / 1.3 if logits[most] > 0 else logits[most] * 1.3
    assert adjusted(logits, grown)[most] == pytest.approx(base - 0.7 - 0.2 * counts[most], rel=1e-5)


def test_no_penalty_leaves_the_logits_alone() -> None:
    logits = torch.randn(VOCABULARY)
    assert adjusted(logits.tolist(), row([3, 4], [5])) == logits.tolist()


def test_bias_decides_a_greedy_draw() -> None:
    logits = torch.randn(VOCABULARY)
    assert sample_one(logits, row(logit_bias=((42, 50.0),))).id == 42
    best = int(logits.argmax())
    assert sample_one(logits, row(logit_bias=((best, -100.0),))).id == int(logits.topk(2).indices[1])


@pytest.mark.parametrize("token_id", [-1, VOCABULARY])
def test_ids_outside_of_the_vocabulary_are_refused(token_id: int) -> None:
    with pytest.raises(ValueError, match="logit_bias"):
        row(logit_bias=((token_id, 1.0),))
    with pytest.raises(ValueError, match="outside"):
        row([token_id], repetition_penalty=1.1)


def test_logprobs_are_the_models_own_view() -> None:
    """After penalties and bias, before the temperature and the filters; the k best, best first."""
    logits = torch.randn(VOCABULARY) * 3
    state = row([4], [9], temperature=0.5, top_k=1, logprobs=5, frequency_penalty=1.0, logit_bias=((8, 2.0),))
    expected = logits.double().clone()
    expected[9] -= 1.0
    expected[8] += 2.0
    expected = expected.log_softmax(0)
    drawn = sample_one(logits, state)
    assert drawn.logprob is not None
    assert drawn.logprob.logprob == pytest.approx(expected[drawn.id].item(), abs=1e-5)
    values, ids = expected.topk(5)
    assert [token_id for token_id, _ in drawn.logprob.top] == ids.tolist()
    assert [value for _, value in drawn.logprob.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert drawn.logprob.top[0] == (drawn.id, drawn.logprob.logprob)


def test_all_logprobs_sum_to_one_and_leave_out_the_impossible() -> None:
    logits = torch.randn(VOCABULARY) * 4
    logits[[3, 50]] = -float("inf")
    drawn = sample_one(logits, row(logprobs=VOCABULARY))
    assert drawn.logprob is not None
    assert len(drawn.logprob.top) == VOCABULARY - 2
    assert sum(math.exp(value) for _, value in drawn.logprob.top) == pytest.approx(1, abs=1e-6)


def test_equal_logprobs_come_in_order_of_their_ids() -> None:
    logits = torch.zeros(VOCABULARY)
    logits[60] = 1
    drawn = sample_one(logits, row(logprobs=4))
    assert drawn.logprob is not None
    assert [token_id for token_id, _ in drawn.logprob.top] == [60, 0, 1, 2]


def test_logprobs_zero_gives_the_sampled_token_alone() -> None:
    drawn = sample_one(torch.randn(VOCABULARY), row(logprobs=0))
    assert drawn.logprob is not None
    assert drawn.logprob.top == ()
    assert sample_one(torch.randn(VOCABULARY), row()).logprob is None


def test_seed_and_position_decide_and_nothing_else() -> None:
    logits = torch.randn(VOCABULARY) * 0.1

    def text(seed: int) -> list[int]:
        state, tokens = row(seed=seed, temperature=1.0), []
        for _ in range(30):
            tokens.append(sample_one(logits, state).id)
            state.observe(tokens[-1])
        return tokens

    first = text(2**64 - 1)
    assert first == text(2**64 - 1)
    assert first != text(2**63)
    assert len(set(first)) > 10
    resumed = row([1], first[:17], seed=2**64 - 1, temperature=1.0)
    assert sample_one(logits, resumed).id == first[17]


def mixed_rows(count: int) -> list[SamplerRow]:
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9, "logprobs": 2},
        {"temperature": 1.2, "top_k": 10, "repetition_penalty": 1.2},
        {"temperature": 0.7, "min_p": 0.05, "presence_penalty": 1.0, "logit_bias": ((3, 4.0),)},
        {"frequency_penalty": 0.4, "logprobs": 0},
    ]
    tokens = torch.randint(0, VOCABULARY, (count, 9)).tolist()
    return [
        row(tokens[i][:4], tokens[i][4 : 4 + i % 6], **({"seed": i * 10**17} | kinds[i % len(kinds)]))
        for i in range(count)
    ]


def test_a_row_does_not_depend_on_the_others() -> None:
    rows = mixed_rows(26)
    logits = torch.randn(26, VOCABULARY) * 2
    together = Sampler().sample(logits.clone().numpy(), rows)
    assert [sample_one(logits[i], rows[i]) for i in range(26)] == together
    order = torch.randperm(26).tolist()
    assert Sampler().sample(logits[order].numpy(), [rows[i] for i in order]) == [together[i] for i in order]


def test_guessed_positions_draw_what_one_after_the_other_draws() -> None:
    """With what was drawn before as the guesses, the last of them spoilt for every second row."""
    plain = mixed_rows(26)
    guessing = deepcopy(plain)
    logits = torch.randn(26, 4, VOCABULARY) * 2
    logits[5, 2, 8] = float("nan")
    expected = [[sample_and_observe(logits[i, at], plain[i]) for at in range(4)] for i in range(26)]
    guesses = [[max(0, drawn.id) for drawn in answer[:3]] for answer in expected]
    for guess in guesses[::2]:
        guess[2] = (guess[2] + 1) % VOCABULARY
    found = Sampler().sample(logits.clone().flatten(0, 1).numpy(), guessing, guesses)
    for i, answer in enumerate(expected):
        right = 4 if i % 2 else 3
        if i == 5:
            right = 3
            assert answer[2] == Drawn(-1, None)
        kept = found[4 * i : 4 * i + 4]
        assert kept == answer[:right] + [Drawn(NOT_KEPT, None)] * (4 - right), i


def test_rows_with_and_without_guesses_go_together() -> None:
    logits = torch.full((4, VOCABULARY), -1.0)
    for place, best in enumerate((5, 6, 7, 8)):
        logits[place, best] = 3.0
    drawn = Sampler().sample(logits.numpy(), [row(), row(), row()], [[], [9], []])
    assert [token.id for token in drawn] == [5, 6, NOT_KEPT, 8]


def test_nothing_can_be_guessed_for_a_constrained_row() -> None:
    with pytest.raises(ValueError, match="constraints"):
        Sampler().sample(np.zeros((2, VOCABULARY), np.float32), [row(allowed_ids=(4, 5))], [[4]])


def sample_and_observe(logits: torch.Tensor, state: SamplerRow) -> Drawn:
    drawn = sample_one(logits, state)
    state.observe(drawn.id)
    return drawn


def test_broken_logits_harm_their_own_row_only() -> None:
    rows = mixed_rows(18)
    logits = torch.randn(18, VOCABULARY) * 2
    healthy = Sampler().sample(logits.clone().numpy(), rows)
    broken = {2: float("nan"), 3: float("inf"), 10: float("nan"), 11: -float("inf")}
    for i, value in broken.items():
        logits[i, 7] = value
    logits[11] = -float("inf")
    drawn = Sampler().sample(logits.numpy(), rows)
    for i in range(18):
        assert drawn[i] == (Drawn(-1, None) if i in broken else healthy[i])


def test_frequencies_follow_the_softmax() -> None:
    """Chi-square over positions of a few fixed seeds."""
    logits = torch.linspace(-2, 1, 12)
    draws, shares = 3000, torch.softmax(logits.double(), 0)
    for seed in (0, 12345, 2**64 - 1):
        wanted = Sampling(seed=seed)
        states = []
        for position in range(draws):
            state = SamplerRow(wanted, [0], [], 12)
            state.position = position
            states.append(state)
        drawn = [token.id for token in Sampler().sample(logits.expand(draws, -1).clone().numpy(), states)]
        expected = shares * draws
        chi_square = ((torch.bincount(torch.tensor(drawn), minlength=12) - expected) ** 2 / expected).sum()
        assert chi_square < 11 + 5 * math.sqrt(2 * 11)


def test_logprobs_survive_the_wire() -> None:
    drawn = sample_one(torch.randn(VOCABULARY), row(logprobs=3))
    assert drawn.logprob is not None
    packed = msgspec.msgpack.encode(drawn.logprob)
    assert msgspec.msgpack.decode(packed, type=type(drawn.logprob)) == drawn.logprob
