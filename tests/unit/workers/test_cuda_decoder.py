"""The decoder over the emulated CUDA library: the CPU decoder's logits and tokens, integer weights, chunks and batches
that change nothing."""

import random

import emulated
import pytest
import torch
from decoding import Driver, MemorySource, Sequence, biased, load_whole, random_checkpoint, rich
from msgspec.structs import replace
from torch import Tensor

from shoal.checkpoint.description import ModelDescription, Rope
from shoal.cuda_ext.cuda_binding import CudaLibrary
from shoal.cuda_ext.cuda_program import CudaProgram
from shoal.cuda_ext.cuda_weight import from_cpu, unpack
from shoal.cuda_ext.quantised import QuantisedGroups, WeightFormat, pack_quantised
from shoal.workers.cuda_decoder import CudaDecoder
from shoal.workers.kv_cache import KVCache
from shoal.workers.layers import Parameters
from shoal.workers.load import load_parameters
from shoal.workers.parallel import split

SEED = random.randrange(1 << 30)
LENGTH = 41
CPU = torch.device("cpu")
PLAIN = ModelDescription(
    family="qwen3",
    vocab_size=149,
    hidden_size=48,
    num_layers=3,
    num_heads=6,
    num_kv_heads=3,
    head_dim=16,
    ffn_size=80,
    max_position=64,
    norm_eps=1e-5,
    qk_norm=True,
    rope=Rope(dim=16),
    layer_windows=(0, 0, 0),
    attention_scale=0.25,
)
RICH = rich(PLAIN)
BIASED = biased(PLAIN)
DESCRIPTIONS = pytest.mark.parametrize("description", [PLAIN, RICH, BIASED], ids=["plain", "rich", "biased"])


@pytest.fixture(scope="module")
def cuda() -> CudaLibrary:
    return CudaLibrary(emulated.build())


class CudaDriver(Driver):
    """A ``Driver`` of the other decoder."""

    def __init__(self, cuda: CudaLibrary, description: ModelDescription, parameters: Parameters) -> None:
        super().__init__(description, parameters, LENGTH)
        cache = KVCache(description, split(description, 1, 0), torch.bfloat16, 64, self._block_size)
        self._decoder = CudaDecoder(description, parameters, cache, LENGTH, cuda, CPU)


def checkpoint(description: ModelDescription) -> MemorySource:
    """Numbers that bfloat16 holds: both decoders have the same weights."""
    source = random_checkpoint(description, SEED)
    return MemorySource({name: tensor.bfloat16().float() for name, tensor in source.tensors.items()})


def prompt(length: int) -> list[int]:
    return torch.randint(0, 149, (length,), generator=torch.Generator().manual_seed(SEED)).tolist()


def assert_alike(logits: Tensor, truth: Tensor) -> None:
    """Within what bfloat16 activations cost, which may turn a near-tie round."""
    error = (logits - truth).abs() / truth.std()
    assert error.mean() < 0.02
    assert error.max() < 0.15
    assert (logits.argmax(1) == truth.argmax(1)).float().mean() > 0.8


@DESCRIPTIONS
def test_it_computes_what_the_cpu_computes(cuda: CudaLibrary, description: ModelDescription) -> None:
    source, ids = checkpoint(description), prompt(LENGTH)
    truth = Driver(description, load_whole(source, description), LENGTH).logits([(Sequence(ids), LENGTH)])
    driver = CudaDriver(cuda, description, load_whole(source, description, dtype=torch.bfloat16))
    assert_alike(driver.logits([(Sequence(ids), LENGTH)]), truth)


@pytest.mark.parametrize("quantization", ["w4", "w8"])
def test_integer_weights(cuda: CudaLibrary, quantization: str) -> None:
    description, ids = replace(PLAIN, hidden_size=96, ffn_size=160), prompt(LENGTH)
    source, shard = checkpoint(description), split(description, 1, 0)
    parameters = load_parameters(source, description, shard, torch.bfloat16, lambda *_: None, quantization)
    truth = Driver(description, parameters, LENGTH).logits([(Sequence(ids), LENGTH)])
    assert_alike(CudaDriver(cuda, description, parameters).logits([(Sequence(ids), LENGTH)]), truth)


@DESCRIPTIONS
def test_chunks_and_batches_change_nothing(cuda: CudaLibrary, description: ModelDescription) -> None:
    """To the bit: a prompt at once, in pieces, token by token, among others."""
    parameters, ids = load_whole(checkpoint(description), description, dtype=torch.bfloat16), prompt(LENGTH)
    expected = CudaDriver(cuda, description, parameters).logits([(Sequence(ids), LENGTH)])
    for steps in ([20, 1, 13, 1, 1, 5], [1] * LENGTH):
        driver, sequence, found = CudaDriver(cuda, description, parameters), Sequence(ids), []
        others = [Sequence(ids[::-1]), Sequence(ids[5:] + ids[:5])]
        for count in steps:
            rows = [(others[0], 1), (sequence, count), (others[1], 1)]
            rows = rows if sequence.computed < LENGTH // 2 else rows[1:2]
            before = sum(number for row, number in rows[: rows.index((sequence, count))])
            found.append(driver.logits(rows)[before : before + count])
        assert torch.equal(torch.cat(found), expected)


def test_indices_out_of_range_are_refused(cuda: CudaLibrary) -> None:
    driver = CudaDriver(cuda, PLAIN, load_whole(checkpoint(PLAIN), PLAIN, dtype=torch.bfloat16))
    sequence = Sequence(prompt(LENGTH) * 2)
    driver.logits([(sequence, LENGTH)])
    with pytest.raises(IndexError, match="rope table"):
        driver.logits([(sequence, 1)])


@pytest.mark.parametrize(
    "form", [WeightFormat(4, 32, True), WeightFormat(8, 16, False), WeightFormat(8, 32, True)]
)
def test_panels_of_the_cpu_library_are_unpacked(cuda: CudaLibrary, form: WeightFormat) -> None:
    generator = torch.Generator().manual_seed(SEED)
    codes = torch.randint(0, 2**form.bits, (35, 96 // form.group, form.group), generator=generator)
    scales, offsets = torch.randn(2, 35, 96 // form.group, generator=generator).half().unbind()
    groups = QuantisedGroups(codes.to(torch.uint8), scales, offsets if form.has_offset else None, form.bits)
    packed = pack_quantised(groups, 96)
    assert torch.equal(unpack(packed).dequantise(), groups.dequantise())
    weight = from_cpu(CudaProgram(cuda, CPU), packed, torch.bfloat16)
    assert (weight.rows, weight.columns, weight.format) == (35, 96, form)
