"""Turns GGUF's quantised blocks into float32, one function a type; called by ``weights/gguf.py``.

Each takes blocks, uint8 [n, bytes a block], and fills out, float32 [n, elements a block]. The arithmetic is that
of ggml, in its order, so results are equal to the last bit. Layouts: d and m are float16 scale and offset, qs
holds four bits an element (all low halves, then all high halves), qh the bits above.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from shoal.checkpoint.gguf import BLOCK_SIZES, GgufType

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_LOW_HALF = np.uint8(0x0F)
_HALF_BITS = np.uint8(4)
_EIGHT_SHIFTS = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
_FOUR_SHIFTS = np.arange(0, 8, 2, dtype=np.uint8).reshape(1, 1, 4, 1)


def dequantise(kind: GgufType, blocks: Bytes, out: Floats) -> None:
    """Fills out from blocks. Scales that are not finite give elements that are not, without a warning."""
    with np.errstate(all="ignore"):
        _FUNCTIONS[kind](blocks, out)


def _float16(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte ``at`` of every block, float32 [n, 1]."""
    return blocks[:, at : at + 2].view(np.float16).astype(np.float32)


def _f32(blocks: Bytes, out: Floats) -> None:
    out[:] = blocks.view(np.float32)


def _f16(blocks: Bytes, out: Floats) -> None:
    out[:] = blocks.view(np.float16)


def _bf16(blocks: Bytes, out: Floats) -> None:
    np.left_shift(blocks.view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)


def _q8_0(blocks: Bytes, out: Floats) -> None:
    out[:] = blocks[:, 2:].view(np.int8)
    out *= _float16(blocks, 0)


def halves(qs: Bytes) -> Bytes:
    """16 bytes of each row to 32 elements of four bits: the low halves first."""
    return np.concatenate([qs & _LOW_HALF, qs >> _HALF_BITS], axis=1)


def fifth_bits(qh: Bytes, qs: Bytes) -> Bytes:
    """16 bytes and 32 further bits of each row to 32 elements of five bits."""
    values = np.unpackbits(qh, axis=1, bitorder="little")
    values <<= _HALF_BITS
    values |= halves(qs)
    return values


def _q4_0(blocks: Bytes, out: Floats) -> None:
    out[:] = halves(blocks[:, 2:])
    out -= np.float32(8)
    out *= _float16(blocks, 0)


def _q4_1(blocks: Bytes, out: Floats) -> None:
    out[:] = halves(blocks[:, 4:])
    out *= _float16(blocks, 0)
    out += _float16(blocks, 2)


def _q5_0(blocks: Bytes, out: Floats) -> None:
    out[:] = fifth_bits(blocks[:, 2:6], blocks[:, 6:])
    out -= np.float32(16)
    out *= _float16(blocks, 0)


def _q5_1(blocks: Bytes, out: Floats) -> None:
    out[:] = fifth_bits(blocks[:, 4:8], blocks[:, 8:])
    out *= _float16(blocks, 0)
    out += _float16(blocks, 2)


def k_scales(blocks: Bytes) -> tuple[Floats, Floats]:
    """Scale and (subtracted) offset of the eight groups of a K block, float32 [n, 8] each.

    Twelve bytes hold eight pairs of six bits: four low scales, four low offsets (each with two bits of a high
    one above), then the low four bits of the high ones.
    """
    low, offset, high = (blocks[:, at : at + 4] for at in (4, 8, 12))
    scales = np.concatenate([low & 0x3F, (high & 0x0F) | ((low >> 2) & 0x30)], axis=1)
    offsets = np.concatenate([offset & 0x3F, (high >> 4) | ((offset >> 2) & 0x30)], axis=1)
    return _float16(blocks, 0) * scales.astype(np.float32), _float16(blocks, 2) * offsets.astype(np.float32)


def k_values(qs: Bytes) -> Bytes:
    """128 bytes of each row to eight groups of 32 elements of four bits: [n, 8, 32]."""
    qs = qs.reshape(len(qs), 4, 1, 32)
    return np.concatenate([qs & _LOW_HALF, qs >> _HALF_BITS], axis=2).reshape(len(qs), 8, 32)


def q6_k_codes(blocks: Bytes) -> Bytes:
    """16 groups of 16 elements of six bits: [n, 16, 16]."""
    count = len(blocks)
    low = blocks[:, :128].reshape(count, 2, 2, 32)
    values = (blocks[:, 128:192].reshape(count, 2, 1, 32) >> _FOUR_SHIFTS) & np.uint8(3)
    values <<= _HALF_BITS
    values[:, :, :2] |= low & _LOW_HALF
    values[:, :, 2:] |= low >> _HALF_BITS
    return values.reshape(count, 16, 16)


def _scaled_groups(blocks: Bytes, values: Bytes, out: Floats) -> None:
    """Scales and shifts eight groups of 32 elements."""
    scales, offsets = k_scales(blocks)
    groups = out.reshape(len(blocks), 8, 32)
    groups[:] = values
    groups *= scales[:, :, None]
    groups -= offsets[:, :, None]


def _q4_k(blocks: Bytes, out: Floats) -> None:
    _scaled_groups(blocks, k_values(blocks[:, 16:]), out)


def q5_k_values(blocks: Bytes) -> Bytes:
    """Eight groups of 32 elements of five bits: [n, 8, 32]."""
    high = (blocks[:, None, 16:48] >> _EIGHT_SHIFTS) & np.uint8(1)
    return k_values(blocks[:, 48:]) | high << _HALF_BITS


def _q5_k(blocks: Bytes, out: Floats) -> None:
    _scaled_groups(blocks, q5_k_values(blocks), out)


def _q6_k(blocks: Bytes, out: Floats) -> None:
    groups = out.reshape(len(blocks), 16, 16)
    groups[:] = q6_k_codes(blocks)
    groups -= np.float32(32)
    groups *= (_float16(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32))[:, :, None]


_FUNCTIONS: dict[GgufType, Callable[[Bytes, Floats], None]] = {
    GgufType.F32: _f32,
    GgufType.F16: _f16,
    GgufType.BF16: _bf16,
    GgufType.Q8_0: _q8_0,
    GgufType.Q4_0: _q4_0,
    GgufType.Q4_1: _q4_1,
    GgufType.Q5_0: _q5_0,
    GgufType.Q5_1: _q5_1,
    GgufType.Q4_K: _q4_k,
    GgufType.Q5_K: _q5_k,
    GgufType.Q6_K: _q6_k,
}

__all__ = ["BLOCK_SIZES", "dequantise"]
