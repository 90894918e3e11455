"""The decoder over the CUDA library: the CPU decoder's logits and tokens, integer weights, chunks, batches and
graphs that change nothing."""

import random

import numpy as np
import pytest
import torch
from cuda_driver import LENGTH, PLAIN, CudaDriver
from decoding import Driver, MemorySource, Sequence, biased, random_checkpoint, rich
from msgspec.structs import replace
from on_chip import need_emulation, open_device
from torch import Tensor

from shoal.checkpoint.description import ModelDescription
from shoal.config import Quantization
from shoal.cuda_ext.cuda_device import CudaDevice
from shoal.cuda_ext.cuda_weight import CudaWeight
from shoal.workers.cuda_decoder import graph_rows
from shoal.workers.layers import Parameters
from shoal.workers.load import load_parameters
from shoal.workers.logprobs import token_logprob
from shoal.workers.parallel import split
from shoal.workers.weights.places import DevicePlace, HostPlace

SEED = random.randrange(1 << 30)
RICH = rich(PLAIN)
BIASED = biased(PLAIN)
DESCRIPTIONS = pytest.mark.parametrize("description", [PLAIN, RICH, BIASED], ids=["plain", "rich", "biased"])


@pytest.fixture(scope="module")
def device() -> CudaDevice:
    """Where rows of batches of any size are compared to the bit."""
    return open_device(is_deterministic=True)


def checkpoint(description: ModelDescription) -> MemorySource:
    """Numbers that bfloat16 holds: both decoders have the same weights."""
    source = random_checkpoint(description, SEED)
    return MemorySource({name: tensor.bfloat16().float() for name, tensor in source.tensors.items()})


def load(
    device: CudaDevice,
    description: ModelDescription,
    quantization: Quantization = "auto",
    dtype: torch.dtype = torch.bfloat16,
) -> Parameters[CudaWeight]:
    source, shard = checkpoint(description), split(description, 1, 0)
    return load_parameters(
        source, description, shard, DevicePlace(device, dtype), lambda *_: None, quantization
    )


def prompt(length: int) -> list[int]:
    return torch.randint(0, 149, (length,), generator=torch.Generator().manual_seed(SEED)).tolist()


def assert_alike(logits: Tensor, truth: Tensor, times: float = 1.0) -> None:
    """Within ``times`` what bfloat16 activations cost, which may turn a near-tie round."""
    error = (logits - truth).abs() / truth.std()
    assert error.mean() < 0.02 * times
    assert error.max() < 0.15 * times
    assert (logits.argmax(1) == truth.argmax(1)).float().mean() > 0.8


def true_logits(description: ModelDescription, quantization: Quantization = "auto") -> Tensor:
    """The CPU's of the prompt."""
    source, shard = checkpoint(description), split(description, 1, 0)
    dtype = torch.float32 if quantization == "auto" else torch.bfloat16
    parameters = load_parameters(source, description, shard, HostPlace(dtype), lambda *_: None, quantization)
    return Driver(description, parameters, LENGTH).logits([(Sequence(prompt(LENGTH)), LENGTH)])


@DESCRIPTIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_it_computes_what_the_cpu_computes(
    device: CudaDevice, description: ModelDescription, dtype: torch.dtype
) -> None:
    driver = CudaDriver(device, description, load(device, description, dtype=dtype))
    assert_alike(driver.step([(Sequence(prompt(LENGTH)), LENGTH)]), true_logits(description))


@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float8_e4m3fn),
        (torch.float16, torch.float8_e4m3fn),
    ],
)
def test_the_caches_type_may_be_another(
    device: CudaDevice, dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    driver = CudaDriver(device, PLAIN, load(device, PLAIN, dtype=dtype), cache_dtype)
    logits, truth = driver.step([(Sequence(prompt(LENGTH)), LENGTH)]), true_logits(PLAIN)
    if cache_dtype == torch.float8_e4m3fn:
        assert ((logits - truth).abs() / truth.std()).mean() < 0.1
    else:
        assert_alike(logits, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("quantization", ["w4", "w8"])
def test_integer_weights(device: CudaDevice, quantization: Quantization, dtype: torch.dtype) -> None:
    description = replace(PLAIN, hidden_size=96, ffn_size=160)
    driver = CudaDriver(device, description, load(device, description, quantization, dtype))
    logits = driver.step([(Sequence(prompt(LENGTH)), LENGTH)])
    # The CPU's activations have 8 bits for most of them.
    assert_alike(logits, true_logits(description, quantization), times=2.5)


@DESCRIPTIONS
def test_chunks_and_batches_change_nothing(device: CudaDevice, description: ModelDescription) -> None:
    """To the bit: a prompt at once, in pieces, token by token, among others; with graphs, and filled up to them."""
    parameters, ids = load(device, description), prompt(LENGTH)
    expected = CudaDriver(device, description, parameters).step([(Sequence(ids), LENGTH)])
    for steps in ([20, 1, 13, 1, 1, 5], [1] * LENGTH):
        driver, sequence, found = CudaDriver(device, description, parameters), Sequence(ids), []
        others = [Sequence(ids[::-1]), Sequence(ids[5:] + ids[:5])]
        for count in steps:
            rows = [(others[0], 1), (sequence, count), (others[1], 1)]
            rows = rows if sequence.computed < LENGTH // 2 else rows[1:2]
            before = sum(number for row, number in rows[: rows.index((sequence, count))])
            found.append(driver.step(rows)[before : before + count])
        assert torch.equal(torch.cat(found), expected)


def test_a_graph_gives_what_the_operators_give(device: CudaDevice) -> None:
    """To the bit, for every number of rows; the first step of a size goes without a graph."""
    parameters, ids = load(device, PLAIN), prompt(LENGTH)
    alone = CudaDriver(device, PLAIN, parameters, num_blocks=16)
    expected = [alone.step([(sequence, 1)]) for sequence in [Sequence(ids)] for _ in range(6)]
    for count in (1, 2, 3, 5, 8, 9, 13):
        driver = CudaDriver(device, PLAIN, parameters, num_blocks=16)
        rows = [(Sequence(ids), 1) for _ in range(count)]
        for number in range(6):
            logits = driver.step(rows)
            assert logits.shape[0] == count
            assert all(torch.equal(row, expected[number][0]) for row in logits)
        assert len(driver.decoder._graphs) == 1


def test_a_deterministic_device_gives_the_same_on_every_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, whatever instructions and libraries it has for many rows, which it takes unless told not to."""
    need_emulation()
    description, ids = replace(PLAIN, hidden_size=128, ffn_size=128), prompt(LENGTH)
    found = []
    for chip, is_deterministic in (("80", True), ("90", True), ("90", False)):
        monkeypatch.setenv("SHOAL_EMULATED_CHIP", chip)
        device = open_device(is_deterministic=is_deterministic)
        driver = CudaDriver(device, description, load(device, description, dtype=torch.float16))
        found.append(driver.step([(Sequence(ids), LENGTH), (Sequence(ids[::-1]), LENGTH)]))
    assert torch.equal(found[1], found[0])
    assert_alike(found[2], found[0])


def test_numbers_of_rows_that_have_graphs() -> None:
    assert [graph_rows(rows, 30) for rows in (1, 2, 3, 4, 5, 8, 9, 16, 17, 25, 30)] == [
        1, 2, 4, 4, 8, 8, 16, 16, 24, 30, 30,
    ]  # fmt: skip


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_token_that_only_the_device_knows(device: CudaDevice, in_one_step: bool) -> None:
    """The second step takes the first one's draws, in another order, among tokens that are known."""
    parameters, ids = load(device, PLAIN), prompt(6)
    known, fed = CudaDriver(device, PLAIN, parameters), CudaDriver(device, PLAIN, parameters)
    drawn, results = [7, 121], []
    for driver, blind in ((known, False), (fed, True)):
        first, second, third = (Sequence(list(ids)) for _ in range(3))
        driver.step([(first, 5), (second, 6), (third, 6)])
        driver.decoder.ids[:2] = torch.tensor(drawn)
        first.ids, second.ids, third.ids = (
            ids,
            [*ids, 0 if blind else drawn[1]],
            [*ids, 0 if blind else drawn[0]],
        )
        rows = [(third, 1), (first, 1), (second, 1)]
        sources = [0, -1, 1] if blind else [-1] * 3
        if not in_one_step:
            rows, sources = rows[1:], sources[1:]
        results.append(driver.step(rows, sources))
    assert torch.equal(*results)


def test_indices_out_of_range_are_refused(device: CudaDevice) -> None:
    driver = CudaDriver(device, PLAIN, load(device, PLAIN))
    sequence = Sequence(prompt(LENGTH) * 2)
    driver.step([(sequence, LENGTH - 1)])
    sequence.blocks[0] = 1000
    with pytest.raises(IndexError, match="a block table names a block outside of the cache"):
        driver.step([(sequence, 1)])


def test_states_and_their_tokens_log_probabilities_can_be_read(device: CudaDevice) -> None:
    driver = CudaDriver(device, PLAIN, load(device, PLAIN))
    logits = driver.step([(Sequence(prompt(LENGTH)), LENGTH)])
    states, ids, tops = np.array([3, 40, 0, 3]), [7, 148, 0, 9], [2, 0, 5, 1]
    found = driver.decoder.read_logprobs(states, ids, tops)
    for ours, state, token_id, top in zip(found, states, ids, tops, strict=True):
        expected = token_logprob(logits[state].numpy(), token_id, top)
        assert ours.logprob == pytest.approx(expected.logprob, abs=3e-7)
        assert [best for best, _ in ours.top] == [best for best, _ in expected.top]
    many = driver.decoder.read_logprobs(np.arange(300) % LENGTH, list(range(148)) * 2 + [1] * 4, [0] * 300)
    assert len(many) == 300
    assert many[3].logprob == driver.decoder.read_logprobs(np.array([3]), [3], [0])[0].logprob
    assert driver.decoder.hidden(LENGTH).shape == (LENGTH, PLAIN.hidden_size)
