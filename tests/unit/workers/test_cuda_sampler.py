"""The sampler on the device against the host's: the same ids and log-probabilities for the same logits."""

import random

import numpy as np
import pytest
import torch
from on_chip import open_device

from shoal.cuda_ext.cuda_device import CudaDevice
from shoal.cuda_ext.cuda_staging import Staged
from shoal.messages import Sampling, ThinkingBudget
from shoal.workers.cuda_sampler import CudaSampler
from shoal.workers.sampler import NOTHING_ALLOWED, Drawn, Sampler, SamplerRow

VOCABULARY = 293


@pytest.fixture(scope="module")
def device() -> CudaDevice:
    return open_device()


def assert_same(found: list[Drawn], expected: list[Drawn]) -> None:
    """Ids, and log-probabilities but for the last bits of a row's sum."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.id == theirs.id
        assert (ours.logprob is None) == (theirs.logprob is None)
        if ours.logprob is not None and theirs.logprob is not None:
            assert ours.logprob.logprob == pytest.approx(theirs.logprob.logprob, abs=3e-7)
            assert [token_id for token_id, _ in ours.logprob.top] == [
                token_id for token_id, _ in theirs.logprob.top
            ]
            told = [value for _, value in ours.logprob.top]
            assert told == pytest.approx([value for _, value in theirs.logprob.top], abs=3e-7)


class OnDevice:
    """Logits there, and what is drawn from them."""

    def __init__(self, device: CudaDevice, most: int) -> None:
        self._device = device
        self._results = Staged(device, {"ids": ((most,), torch.int64)})
        self._logits = device.zeros(most, VOCABULARY, dtype=torch.float32)
        self._sampler = CudaSampler(device, self._logits, self._results.device["ids"])

    def sample(self, logits: torch.Tensor, rows: list[SamplerRow]) -> list[Drawn]:
        self._device.send_whole(self._logits[: len(rows)], logits)
        draws = self._sampler.start(rows)
        results = self._results.bring()
        self._device.wait()
        return draws.read(results["ids"][: len(rows)].tolist())


def random_sampling(rng: random.Random) -> Sampling:
    def maybe(value: object, otherwise: object) -> object:
        return value if rng.random() < 0.4 else otherwise

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.sample(range(VOCABULARY), count))

    return Sampling(
        seed=rng.getrandbits(64),
        temperature=maybe(0.0, rng.uniform(0.2, 2.0)),
        top_k=maybe(rng.randrange(1, 50), 0),
        top_p=maybe(rng.uniform(0.3, 0.99), 1.0),
        min_p=maybe(rng.uniform(0.0, 0.2), 0.0),
        repetition_penalty=maybe(rng.uniform(0.8, 1.6), 1.0),
        presence_penalty=maybe(rng.uniform(-1, 1), 0.0),
        frequency_penalty=maybe(rng.uniform(-1, 1), 0.0),
        logit_bias=maybe(tuple((token, rng.uniform(-5, 5)) for token in ids(40)), ()),
        logprobs=maybe(rng.randrange(5), -1),
        allowed_ids=maybe(ids(60), ()),
        bad_words=maybe(tuple((token,) for token in ids(100)), ()),
        min_tokens=maybe(100, 0),
        held_back=ids(2),
        thinking=maybe(ThinkingBudget(most_tokens=2, end=ids(2)), None),
    )  # type: ignore[arg-type]


def test_the_same_tokens_as_on_the_host(device: CudaDevice) -> None:
    """Over some steps, each row going on with what it drew."""
    rng = random.Random()
    seed = rng.getrandbits(32)
    print("seed", seed)  # noqa: T201
    rng.seed(seed)
    generator, there = torch.Generator().manual_seed(seed), OnDevice(device, 40)
    states = []
    for _ in range(40):
        sampling, prompt = random_sampling(rng), rng.choices(range(VOCABULARY), k=rng.randrange(1, 90))
        states.append([SamplerRow(sampling, prompt, [], VOCABULARY) for _ in range(2)])
    constrained = 0
    for count in (40, 33, 1, 40):
        logits = torch.randn(count, VOCABULARY, generator=generator) * 3
        if count == 33:
            logits[3, 7], logits[4] = torch.nan, -torch.inf
        rows = states[:count]
        expected = Sampler().sample(logits.clone().numpy(), [row[0] for row in rows])
        assert_same(there.sample(logits, [row[1] for row in rows]), expected)
        for pair, drawn in zip(rows, expected, strict=True):
            constrained += pair[0].constrained
            for state in pair:
                state.observe(drawn.id)
    assert constrained > 20


def test_nothing_allowed_is_told(device: CudaDevice) -> None:
    sampling = Sampling(seed=1, allowed_ids=(5,), bad_words=((5,),))
    rows = [SamplerRow(sampling, [1], [], VOCABULARY), SamplerRow(Sampling(seed=1), [1], [], VOCABULARY)]
    drawn = OnDevice(device, 2).sample(torch.randn(2, VOCABULARY), rows)
    assert drawn[0].id == NOTHING_ALLOWED
    assert drawn[1].id >= 0


def test_long_sequences_get_more_room(device: CudaDevice) -> None:
    there, generator = OnDevice(device, 6), torch.Generator().manual_seed(3)
    tokens = np.arange(VOCABULARY).tolist()
    for count in (1, 6):
        logits = torch.randn(count, VOCABULARY, generator=generator)
        sampling = Sampling(seed=9, temperature=0.0, repetition_penalty=3.0, logprobs=2)
        rows = [[SamplerRow(sampling, tokens, [], VOCABULARY) for _ in range(count)] for _ in range(2)]
        assert_same(there.sample(logits, rows[0]), Sampler().sample(logits.clone().numpy(), rows[1]))
