"""Arrays that the host fills and the device reads, or the other way round, in one copy a time."""

import math
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.cuda_ext.cuda_device import CudaDevice

Shape = tuple[tuple[int, ...], torch.dtype]
_LINE = 64
"""Where each array begins."""


class Staged:
    """Named arrays: one set on the device, and two of pinned memory that take turns, so that the next is filled while
    the one before may be under way. Whoever fills must know that the one before that has arrived."""

    def __init__(self, device: CudaDevice, arrays: dict[str, Shape]) -> None:
        size = sum(_rounded(shape) for shape in arrays.values())
        self._device = device
        self._there = device.zeros(size, dtype=torch.uint8)
        self._here = [device.pinned(size, dtype=torch.uint8) for _ in range(2)]
        self._filled = [_arrays(pinned, arrays) for pinned in self._here]
        self._turn = 0
        self.device = _tensors(self._there, arrays)
        """By name."""

    def fill(self) -> dict[str, NDArray[Any]]:
        """The arrays of the set whose turn it is, with what they held two turns ago."""
        return self._filled[self._turn]

    def send(self) -> None:
        """Copies them to the device; the other set's turn comes."""
        self._device.copy(self._there, self._here[self._turn])
        self._turn ^= 1

    def bring(self) -> dict[str, NDArray[Any]]:
        """Copies the device's arrays to the set whose turn it is, which holds them once the copy is done."""
        self._device.copy(self._here[self._turn], self._there)
        self._turn ^= 1
        return self._filled[self._turn ^ 1]


def _rounded(shape: Shape) -> int:
    return -(-math.prod(shape[0]) * shape[1].itemsize // _LINE) * _LINE


def _tensors(memory: Tensor, arrays: dict[str, Shape]) -> dict[str, Tensor]:
    found, begin = {}, 0
    for name, (shape, dtype) in arrays.items():
        size = math.prod(shape) * dtype.itemsize
        found[name] = memory[begin : begin + size].view(dtype).view(shape)
        begin += _rounded((shape, dtype))
    return found


def _arrays(memory: Tensor, arrays: dict[str, Shape]) -> dict[str, NDArray[Any]]:
    return {name: tensor.numpy() for name, tensor in _tensors(memory, arrays).items()}
