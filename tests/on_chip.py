"""What tests compute on: the CUDA kernels as g++ compiles them, or a chip where ``SHOAL_CUDA_LIBRARY`` names a library
for one. Operators' tests keep their tensors on the host: for each run they are copied to the chip and back."""

import os
from collections.abc import Sequence
from pathlib import Path

import emulated
import pytest
import torch
from torch import Tensor

from shoal.cuda_ext.cuda_binding import Call, CudaLibrary, Value
from shoal.cuda_ext.cuda_device import CudaDevice

_OF_THE_HOST = ("regions", "widths")
"""Fields whose arrays the launcher reads."""


def library_path() -> Path:
    named = os.environ.get("SHOAL_CUDA_LIBRARY")
    return Path(named) if named else emulated.build()


def open_device(*, is_deterministic: bool = False) -> CudaDevice:
    """The first."""
    return CudaDevice(CudaLibrary(library_path()), is_deterministic=is_deterministic)


def need_emulation() -> None:
    """For a test of what only the emulation does."""
    if not CudaLibrary(library_path()).is_emulated:
        pytest.skip("this is about the emulation")


class OnChip(CudaLibrary):
    """Runs on ``device``; on the CPU, where the library is emulated, on copies."""

    def __init__(self, path: Path, device: torch.device) -> None:
        super().__init__(path)
        self._device = device

    def run(self, calls: Sequence[Call], *, together: bool = False) -> None:
        """together: on a stream each."""
        copies = _Copies(self._device)
        for _, fields in calls:
            copies.add(fields)
        moved = [(operator, copies.moved(fields)) for operator, fields in calls]
        is_chip = self._device.type != "cpu"
        if is_chip and together:
            streams = [torch.cuda.Stream(self._device) for _ in calls]
            moved = [(op, {**f, "stream": s.cuda_stream}) for (op, f), s in zip(moved, streams, strict=True)]
        if is_chip:
            torch.cuda.synchronize(self._device)
        super().run(moved, together=together and not is_chip)
        if is_chip:
            torch.cuda.synchronize(self._device)
        copies.bring_back()


class _Copies:
    """Of whole storages, so that views stay views of one memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def add(self, fields: dict[str, Value]) -> None:
        for name, value in fields.items():
            if isinstance(value, Tensor) and name not in _OF_THE_HOST and self._place(value.data_ptr()) is None:
                here = torch.tensor([], dtype=torch.uint8).set_(value.untyped_storage())
                self._pairs.append(
                    (here, here.clone() if self._device.type == "cpu" else here.to(self._device))
                )

    def moved(self, fields: dict[str, Value]) -> dict[str, Value]:
        return {
            name: self._moved(name, value) if isinstance(value, Tensor) else value
            for name, value in fields.items()
        }

    def _moved(self, name: str, value: Tensor) -> Value:
        if name == "widths":
            return value
        if name != "regions":
            return self._place(value.data_ptr())
        # An array of the host's, of addresses of the device's.
        return torch.tensor([self._place(address) or 0 for address in value.tolist()])

    def _place(self, address: int) -> int | None:
        for here, there in self._pairs:
            if here.data_ptr() <= address < here.data_ptr() + max(here.numel(), 1):
                return there.data_ptr() + address - here.data_ptr()
        return None

    def bring_back(self) -> None:
        for here, there in self._pairs:
            here.copy_(there)
