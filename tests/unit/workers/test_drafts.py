"""Guesses: where they come from, how many there are, and that they never change what a runner draws."""

import random

import numpy as np
import pytest
import torch
from decoding import SMALL_LLAMA, load_whole, random_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from plans import plan

from shoal.messages import Sampling, Seat, StepResult, TokenLogprob
from shoal.wire import pack_ids, unpack_ids
from shoal.workers.decoder import Decoder
from shoal.workers.drafts import MOST_POSITIONS, NO_GUESS, Drafter, Guess, Int32s, free_rows, longest_match
from shoal.workers.kv_cache import KVCache
from shoal.workers.parallel import SoloGroup, split
from shoal.workers.runner import Runner
from shoal.workers.slots import SlotTable

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def array(tokens: list[int]) -> Int32s:
    return np.array(tokens, np.int32)


def plain_match(tokens: list[int]) -> tuple[int, int]:
    """The same by trying every place."""
    found = (0, 0)
    for period in range(len(tokens) - 1, 0, -1):
        length = 0
        while (
            length < 16
            and length + period < len(tokens)
            and tokens[-1 - length] == tokens[-1 - length - period]
        ):
            length += 1
        if length and length >= found[0]:
            found = (length, period)
    return found


@given(TOKENS)
def test_the_longest_match_is_found_and_the_last_of_several(tokens: list[int]) -> None:
    assert longest_match(array(tokens)) == plain_match(tokens)


def test_a_match_begins_with_a_token() -> None:
    """Not between two of them, where the bytes may be the same."""
    assert longest_match(array([0, 1 << 16, 5, 1])) == (0, 0)
    assert longest_match(array([1, 9, 1 << 24, 1 << 16, 5, 1])) == (1, 5)


@given(TOKENS, st.integers(1, 20))
def test_a_guess_repeats_what_followed_the_match(tokens: list[int], most: int) -> None:
    guess = Drafter(1e9).guess(array(tokens), most, 1e-9)
    match, period = plain_match(tokens)
    assert guess.match == match
    assert len(guess.ids) == (most if match else 0)
    grown = list(tokens)
    for token_id in guess.ids.tolist():
        assert token_id == grown[-period]
        grown.append(token_id)


def test_more_is_guessed_after_longer_matches_and_less_where_it_costs_more() -> None:
    drafter = Drafter(20.0)
    worth = drafter.worth(1, 1)
    counts = [
        len(drafter.guess(array([*range(20), 77, *range(20)][: 21 + n]), 99, worth).ids) for n in range(1, 17)
    ]
    assert counts == sorted(counts)
    assert 0 < counts[0] < counts[-1]
    crowded = drafter.worth(32, 32)
    assert crowded > worth
    assert len(drafter.guess(array([1, 2, 3, 9, 1, 2, 3]), 99, crowded).ids) < counts[2]


def test_wrong_guesses_become_fewer_and_right_ones_more() -> None:
    drafter, tokens = Drafter(20.0), array([1, 2, 3, 9, 1, 2, 3])
    worth = drafter.worth(1, 1)
    first = drafter.guess(tokens, 99, worth)
    for _ in range(40):
        drafter.learn(first, 0)
    assert drafter.guess(tokens, 99, worth) is NO_GUESS
    assert len(drafter.guess(array([1, 2, 9, 1, 2]), 99, worth).ids) > 0, (
        "another length of match is another matter"
    )
    for _ in range(400):
        drafter.learn(first, len(first.ids))
    assert len(drafter.guess(tokens, 99, worth).ids) > len(first.ids)


def test_whoever_was_never_wrong_may_be() -> None:
    drafter, tokens = Drafter(20.0), array([7] * 60)
    worth = drafter.worth(1, 1)
    for _ in range(10_000):
        drafter.learn(drafter.guess(tokens, 15, worth), 15)
    assert len(drafter.guess(tokens, 15, worth).ids) == 15


def test_a_crowd_guesses_nothing() -> None:
    drafter = Drafter(free_rows("avx512_vnni"))
    assert drafter.may_gain(16)
    assert not drafter.may_gain(32)
    assert Drafter(free_rows("avx512_amx")).may_gain(32)


def test_a_level_whose_rows_all_cost_the_same_guesses_nothing() -> None:
    assert free_rows("reference") == free_rows("scalar") == 0
    assert free_rows("avx512_amx") > free_rows("avx512_vnni") > free_rows("avx2") > 0
    drafter = Drafter(0.0)
    assert drafter.guess(array([1] * 40), 15, drafter.worth(1, 1)) is NO_GUESS


BLOCK, SESSION, SLOTS = 4, 48, 5
MODEL = replace(SMALL_LLAMA, vocab_size=31)
SAMPLINGS = [
    Sampling(seed=1, temperature=0.0, logprobs=2),
    Sampling(seed=2, temperature=1.3, top_k=9),
    Sampling(
        seed=3, temperature=0.8, repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.3, logprobs=0
    ),
    Sampling(seed=4, temperature=0.0, logit_bias=((5, 1.5),)),
    Sampling(seed=5, temperature=1.0, top_p=0.9, min_p=0.01),
]


class Clairvoyant(Drafter):
    """Knows the answers, and spoils some guesses at a place drawn at random."""

    def __init__(self, texts: list[list[int]], seed: int) -> None:
        super().__init__(1e9)
        self._texts = texts
        self._random = random.Random(seed)
        self.right = self.wrong = 0

    def guess(self, tokens: Int32s, most: int, worth: float) -> Guess:
        known = tokens.tolist()
        text = next(text for text in self._texts if text[: len(known)] == known)
        ids = text[len(known) : len(known) + self._random.randint(0, most)]
        if ids and self._random.random() < 0.5:
            place = self._random.randrange(len(ids))
            ids[place] = (ids[place] + 1) % MODEL.vocab_size
        return Guess(array(ids), 1)

    def learn(self, guess: Guess, right: int) -> None:
        self.right += right
        self.wrong += len(guess.ids) - right


class Rank:
    """A runner whose sequences have all their blocks from the start."""

    def __init__(self, seed: int, drafter: Drafter | None, drafts: int) -> None:
        parameters = load_whole(random_checkpoint(MODEL, seed), MODEL)
        shard, group, blocks = split(MODEL, 1, 0), SoloGroup(), SESSION // BLOCK
        cache = KVCache(MODEL, shard, parameters.dtype, SLOTS * blocks, BLOCK)
        decoder = Decoder(MODEL, shard, parameters, cache, group, SESSION)
        slots = SlotTable(
            SLOTS, SESSION, SLOTS * blocks, BLOCK, MODEL.vocab_size, sampling=True, drafter=drafter
        )
        self._runner = Runner(decoder, group, slots, 1)
        self._blocks = blocks
        self._drafts = drafts
        self.steps = 0

    def answers(self, prompts: list[list[int]], length: int) -> list[list[tuple[int, TokenLogprob | None]]]:
        """At least ``length`` tokens of each, with their log-probabilities."""
        seats = tuple(
            Seat(slot, 1, pack_ids(prompt), b"", sampling)
            for slot, (prompt, sampling) in enumerate(zip(prompts, SAMPLINGS, strict=True))
        )
        drawn: list[list[tuple[int, TokenLogprob | None]]] = [[] for _ in prompts]
        starts, counts = [0] * len(prompts), [len(prompt) for prompt in prompts]
        result = self._step(list(range(SLOTS)), starts, counts, 0, self._blocks, seats)
        self._take(result, drawn)
        while short := [slot for slot, tokens in enumerate(drawn) if len(tokens) < length]:
            ones = [1] * len(short)
            self._take(self._step(short, [-1] * len(short), ones, self._drafts), drawn)
        return [tokens[:length] for tokens in drawn]

    def _take(self, result: StepResult, drawn: list[list[tuple[int, TokenLogprob | None]]]) -> None:
        self.steps += 1
        ids = unpack_ids(result.ids)
        for slot, token_id, logprob in zip(
            unpack_ids(result.slots), ids, result.logprobs or [None] * len(ids), strict=True
        ):
            drawn[slot].append((token_id, logprob))

    def _step(
        self,
        slots: list[int],
        starts: list[int],
        counts: list[int],
        drafts: int,
        blocks: int = 0,
        admit: tuple[Seat, ...] = (),
    ) -> StepResult:
        taken = list(range(blocks * len(slots)))
        rows = [
            (slot, start, count, True, taken[at * blocks : (at + 1) * blocks])
            for at, (slot, start, count) in enumerate(zip(slots, starts, counts, strict=True))
        ]
        return self._runner.execute(plan(rows, admit=admit, drafts=pack_ids([drafts] * len(slots))))


@pytest.mark.parametrize("drafts", [1, 4, 7])
def test_guesses_change_how_many_tokens_a_step_brings_and_never_which(drafts: int) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)  # noqa: T201
    torch.manual_seed(seed)
    rng = random.Random(seed)
    prompts = [
        [slot, *(rng.randrange(MODEL.vocab_size) for _ in range(rng.randrange(1, 9)))] for slot in range(SLOTS)
    ]
    plain = Rank(seed, None, drafts)
    expected = plain.answers(prompts, 24)
    assert plain.steps == 24
    texts = [
        prompt + [token_id for token_id, _ in answer] for prompt, answer in zip(prompts, expected, strict=True)
    ]
    drafter = Clairvoyant(texts, seed)
    guessing = Rank(seed, drafter, drafts)
    assert guessing.answers(prompts, 24) == expected
    assert drafter.right > 10
    assert drafter.wrong > 0
    assert guessing.steps < plain.steps


def test_no_step_has_more_positions_than_tiles_take_at_once() -> None:
    drafter = Clairvoyant([[slot] * 40 for slot in range(SLOTS)], 1)
    slots = SlotTable(SLOTS, 200, 200, BLOCK, MODEL.vocab_size, sampling=False, drafter=drafter)
    seats = tuple(Seat(slot, 1, pack_ids([slot] * 5), b"", Sampling(seed=1)) for slot in range(SLOTS))
    planned = [(slot, 4, 1, True, list(range(40 * slot, 40 * slot + 40))) for slot in range(SLOTS)]
    rows = slots.apply(plan(planned, admit=seats, drafts=pack_ids([100] * SLOTS)))
    assert SLOTS < rows.counts.sum() <= MOST_POSITIONS
