"""Where a rank's weights come to lie: in the CPU library's layouts on the host, or in the CUDA library's on a device.

``load`` makes each matrix once, empty, and writes it in pieces of whole panels of 16 rows.
"""

from typing import Protocol

import torch
from torch import Tensor

from shoal.cuda_ext.binding import library
from shoal.cuda_ext.cuda_device import CudaDevice
from shoal.cuda_ext.cuda_weight import CudaWeight, empty_weight, write_fp8, write_groups, write_matrix
from shoal.cuda_ext.fp8 import Fp8, Fp8Rows
from shoal.cuda_ext.packed_weight import PackedWeight
from shoal.cuda_ext.quantised import QuantisedGroups, QuantisedWeight, WeightFormat
from shoal.workers.layers import HostWeight, W

Form = WeightFormat | Fp8 | None
"""Integers, fp8, or None: floats of the place's dtype."""
Part = Tensor | QuantisedGroups | Fp8Rows
"""Rows of a weight of each."""


class Place(Protocol[W]):
    """Of weights that are a ``W``."""

    dtype: torch.dtype
    """Of the matrices that are of neither integers nor fp8."""

    @property
    def takes_integers(self) -> bool:
        """Whether there are kernels for them."""

    @property
    def takes_fp8(self) -> bool:
        """Whether there are kernels for that."""

    def empty(self, rows: int, columns: int, form: Form) -> W:
        """form: one that the place takes."""

    def write(self, weight: W, first_row: int, part: Part) -> None:
        """The rows from ``first_row`` on, a multiple of 16."""

    def vector(self, vector: Tensor) -> Tensor:
        """A norm's weight or a bias, float32."""


class HostPlace:
    """For the CPU library, or for torch where it is not built."""

    takes_fp8 = False

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    @property
    def takes_integers(self) -> bool:
        return library() is not None

    def empty(self, rows: int, columns: int, form: Form) -> HostWeight:
        if form is None:
            return PackedWeight.empty(rows, columns, self.dtype)
        assert isinstance(form, WeightFormat)
        return QuantisedWeight.empty(rows, columns, form)

    def write(self, weight: HostWeight, first_row: int, part: Part) -> None:
        if isinstance(weight, PackedWeight):
            assert isinstance(part, Tensor)
            weight.write(first_row, part)
        else:
            assert isinstance(part, QuantisedGroups)
            weight.write(first_row, part)

    def vector(self, vector: Tensor) -> Tensor:
        return vector


class DevicePlace:
    """On a GPU: a piece goes there as soon as it is read, and is packed there. Methods that allocate raise MemoryError
    where the device has not enough."""

    takes_integers = takes_fp8 = True

    def __init__(self, device: CudaDevice, dtype: torch.dtype) -> None:
        self._device = device
        self.dtype = dtype

    def empty(self, rows: int, columns: int, form: Form) -> CudaWeight:
        return empty_weight(self._device, rows, columns, form, self.dtype)

    def write(self, weight: CudaWeight, first_row: int, part: Part) -> None:
        if isinstance(part, Tensor):
            write_matrix(self._device, weight, first_row, part)
        elif isinstance(part, Fp8Rows):
            write_fp8(self._device, weight, first_row, part)
        else:
            write_groups(self._device, weight, first_row, part)

    def vector(self, vector: Tensor) -> Tensor:
        there = self._device.zeros(*vector.shape, dtype=vector.dtype)
        self._device.send_whole(there, vector)
        return there
