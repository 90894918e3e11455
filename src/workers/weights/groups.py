"""GGUF's quantised blocks as W8 and W4 groups, without going through floats: codes, scales and offsets of
``cuda_ext.quantised``. Called by ``gguf.py``; ``dequantise.py`` has the same blocks as floats.

Scales stay the file's half-precision numbers, but for the K types: there a group's scale is a product of a
half-precision number with one of six or eight bits, rounded to half precision here.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from shoal.checkpoint.gguf import GgufType
from shoal.cuda_ext.quantised import WeightFormat
from shoal.workers.weights.dequantise import (
    Bytes,
    fifth_bits,
    halves,
    k_scales,
    k_values,
    q5_k_values,
    q6_k_codes,
)

Halfs = NDArray[np.float16]
Blocks = tuple[Bytes, Halfs, Halfs | None]
"""codes uint8 [blocks, groups, group]; scales and offsets float16 [blocks, groups]."""

FORMATS: dict[GgufType, WeightFormat] = {
    GgufType.Q8_0: WeightFormat(8, 32, False),
    GgufType.Q4_0: WeightFormat(4, 32, False),
    GgufType.Q4_1: WeightFormat(4, 32, True),
    GgufType.Q5_0: WeightFormat(8, 32, False),
    GgufType.Q5_1: WeightFormat(8, 32, True),
    GgufType.Q4_K: WeightFormat(4, 32, True),
    GgufType.Q5_K: WeightFormat(8, 32, True),
    GgufType.Q6_K: WeightFormat(8, 16, False),
}


def read_blocks(kind: GgufType, blocks: Bytes) -> Blocks:
    """blocks: [n, bytes of a block]. Scales that are not finite stay so."""
    with np.errstate(all="ignore"):
        return _FUNCTIONS[kind](blocks)


def _half(blocks: Bytes, at: int) -> Halfs:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)


def _one_group(codes: Bytes, scales: Halfs, offsets: Halfs | None = None) -> Blocks:
    return codes[:, None, :], scales, offsets


def _q8_0(blocks: Bytes) -> Blocks:
    return _one_group(blocks[:, 2:] ^ np.uint8(128), _half(blocks, 0))


def _q4_0(blocks: Bytes) -> Blocks:
    return _one_group(halves(blocks[:, 2:]), _half(blocks, 0))


def _q4_1(blocks: Bytes) -> Blocks:
    return _one_group(halves(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: Bytes) -> Blocks:
    return _one_group(fifth_bits(blocks[:, 2:6], blocks[:, 6:]) + np.uint8(128 - 16), _half(blocks, 0))


def _q5_1(blocks: Bytes) -> Blocks:
    codes = fifth_bits(blocks[:, 4:8], blocks[:, 8:]) + np.uint8(128)
    return _one_group(codes, _half(blocks, 0), _half(blocks, 2))


def _k(blocks: Bytes, codes: Bytes) -> Blocks:
    scales, offsets = k_scales(blocks)
    return codes.reshape(len(blocks), 8, 32), scales.astype(np.float16), (-offsets).astype(np.float16)


def _q4_k(blocks: Bytes) -> Blocks:
    return _k(blocks, k_values(blocks[:, 16:]))


def _q5_k(blocks: Bytes) -> Blocks:
    return _k(blocks, q5_k_values(blocks) + np.uint8(128))


def _q6_k(blocks: Bytes) -> Blocks:
    codes = q6_k_codes(blocks) + np.uint8(128 - 32)
    scales = _half(blocks, 208).astype(np.float32) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return codes, scales.astype(np.float16), None


_FUNCTIONS: dict[GgufType, Callable[[Bytes], Blocks]] = {
    GgufType.Q8_0: _q8_0,
    GgufType.Q4_0: _q4_0,
    GgufType.Q4_1: _q4_1,
    GgufType.Q5_0: _q5_0,
    GgufType.Q5_1: _q5_1,
    GgufType.Q4_K: _q4_k,
    GgufType.Q5_K: _q5_k,
    GgufType.Q6_K: _q6_k,
}
