"""What tests compute on: the CUDA kernels as g++ compiles them, or a chip where ``SHOAL_CUDA_LIBRARY`` names a library
for one. Operators' tests keep their tensors on the host: for each run they are copied to the chip and back."""

import ctypes
import os
import time
from collections.abc import Sequence
from pathlib import Path

import emulated
import pytest
import torch
from torch import Tensor

from shoal.cuda_ext.cuda_binding import Call, CudaLibrary, Value
from shoal.cuda_ext.cuda_device import CudaDevice
from shoal.cuda_ext.cuda_step_ops import REGION_HEADER

_OF_THE_HOST = ("regions", "widths")
"""Fields whose arrays the launcher reads. Regions' memory is copied as if it were a field's."""
_MOST_WAITING_S = 20

# Calls that wait for each other need queues of their own; read when the driver starts.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


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
        if is_chip and together:
            copies.stop_late(streams)
        if is_chip:
            torch.cuda.synchronize(self._device)
        copies.bring_back()


class _Copies:
    """Of whole storages, so that views stay views of one memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._stops: list[Tensor] = []

    def add(self, fields: dict[str, Value]) -> None:
        for name, value in fields.items():
            if name == "regions" and isinstance(value, Tensor):
                slot_bytes = fields["slot_bytes"]
                assert isinstance(slot_bytes, int)
                for address in value.tolist():
                    self._add(_memory_at(address, REGION_HEADER + 2 * slot_bytes))
            elif isinstance(value, Tensor) and name not in _OF_THE_HOST:
                self._add(torch.tensor([], dtype=torch.uint8).set_(value.untyped_storage()), name == "stop")

    def _add(self, here: Tensor, is_stop: bool = False) -> None:
        if self._place(here.data_ptr()) is not None:
            return
        there = here.clone() if self._device.type == "cpu" else here.to(self._device)
        self._pairs.append((here, there))
        if is_stop:
            self._stops.append(there)

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

    def stop_late(self, streams: Sequence[torch.cuda.Stream]) -> None:
        """Tells calls that wait for each other for too long to wait no longer, so that only their test fails."""
        deadline_s = time.monotonic() + _MOST_WAITING_S
        while not all(stream.query() for stream in streams):
            if time.monotonic() > deadline_s:
                with torch.cuda.stream(torch.cuda.Stream(self._device)):
                    for stop in self._stops:
                        stop.copy_(torch.ones(stop.shape, dtype=stop.dtype), non_blocking=True)
                return
            time.sleep(1e-4)

    def bring_back(self) -> None:
        for here, there in self._pairs:
            here.copy_(there)


def _memory_at(address: int, count: int) -> Tensor:
    """Bytes of the host that belong to somebody else."""
    return torch.frombuffer((ctypes.c_uint8 * count).from_address(address), dtype=torch.uint8)
