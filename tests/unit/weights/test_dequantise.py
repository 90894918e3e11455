"""Every GGUF type against the reference package's dequantisation, on random bytes: equal to the last bit."""

import gguf
import numpy as np
import pytest

from shoal.checkpoint.gguf import BLOCK_SIZES, GgufType
from shoal.workers.weights.dequantise import dequantise


@pytest.mark.parametrize("kind", GgufType, ids=lambda kind: kind.name)
@pytest.mark.parametrize("count", [1, 7, 333])
def test_equals_the_reference(kind: GgufType, count: int) -> None:
    """Random bytes make random scales too: subnormal, huge, infinite and not a number."""
    elements, size = BLOCK_SIZES[kind]
    blocks = np.random.default_rng().integers(0, 256, (count, size), dtype=np.uint8)
    out = np.full((count, elements), -1.0, np.float32)
    dequantise(kind, blocks, out)
    with np.errstate(all="ignore"):
        reference = gguf.dequantize(blocks, gguf.GGMLQuantizationType(kind))
    assert np.array_equal(out, reference.reshape(out.shape), equal_nan=True)
    assert count < 300 or np.isfinite(out).mean() > 0.5


@pytest.mark.parametrize("kind", GgufType, ids=lambda kind: kind.name)
def test_block_sizes_are_the_reference(kind: GgufType) -> None:
    reference = gguf.GGMLQuantizationType(kind)
    assert reference.name == kind.name
    assert gguf.GGML_QUANT_SIZES[reference] == BLOCK_SIZES[kind]


@pytest.mark.parametrize("kind", [GgufType.Q4_0, GgufType.Q4_1, GgufType.Q5_0, GgufType.Q5_1, GgufType.Q8_0])
def test_is_near_what_was_quantised(kind: GgufType) -> None:
    values = np.random.default_rng().standard_normal((5, 96)).astype(np.float32)
    blocks = gguf.quantize(values, gguf.GGMLQuantizationType(kind)).reshape(-1, BLOCK_SIZES[kind][1])
    out = np.empty((15, 32), np.float32)
    dequantise(kind, blocks, out)
    assert np.abs(out.reshape(values.shape) - values).max() < 0.8


def test_reads_strided_blocks() -> None:
    """Blocks cut out of longer rows, as a slice of columns gives them."""
    rows = np.random.default_rng().integers(0, 64, (9, 3 * 210), dtype=np.uint8)
    out, other = np.empty((9, 256), np.float32), np.empty((9, 256), np.float32)
    dequantise(GgufType.Q6_K, rows[:, 210:420], out)
    dequantise(GgufType.Q6_K, np.ascontiguousarray(rows[:, 210:420]), other)
    assert np.array_equal(out, other)
