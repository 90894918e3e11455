"""One device and all that a rank does there besides starting operators: memory, copies, waiting, graphs. The same calls
reach a chip or the emulated library, whose device memory is ordinary memory.

A device has one stream. Whatever is put on it runs in order, and nothing but ``wait``, ``fetch`` and ``send_whole``
waits for it. One thread at a time.
"""

import ctypes
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor

from shoal.cuda_ext.cuda_binding import CudaLibrary
from shoal.cuda_ext.cuda_program import CudaProgram

_STAGE_BYTES: Final = 16 << 20
"""Of one of the two halves of pinned memory through which weights go."""
HANDLE_BYTES: Final = 64


class CudaDevice:
    """The index-th device; is_deterministic: of its programs. Raises CudaError where it cannot be used."""

    def __init__(self, library: CudaLibrary, index: int = 0, *, is_deterministic: bool = False) -> None:
        self.library = library
        self._is_deterministic = is_deterministic
        self.index = index
        self.torch_device = torch.device("cpu") if library.is_emulated else torch.device("cuda", index)
        library.do("use_device", index)
        self.stream = library.make("stream")
        self._stage: tuple[Tensor, Tensor] | None = None

    @property
    def name(self) -> str:
        """Its number and the driver's name for it."""
        return list(self.library.chips())[self.index]

    @property
    def architecture(self) -> str:
        """``sm_90``; of what is emulated ``sm_80``."""
        return self.library.chips()[self.name]

    @property
    def has_product_library(self) -> bool:
        """Whether cuBLAS, which torch's CUDA build brings, does products of many rows that need no one order."""
        return bool(self.library.ask("has_product_library"))

    def program(self) -> CudaProgram:
        """For operators on this device's stream."""
        return CudaProgram(
            self.library, self.torch_device, self.stream, is_deterministic=self._is_deterministic
        )

    # --- memory ------------------------------------------------------------------------------------------

    def free_bytes(self) -> int:
        """Of the device's memory."""
        return self._memory()[0]

    def total_bytes(self) -> int:
        """Of the device's memory."""
        return self._memory()[1]

    def _memory(self) -> tuple[int, int]:
        free, total = ctypes.c_int64(), ctypes.c_int64()
        self.library.do("memory", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """On the device. Raises MemoryError where it has not so much."""
        size = math.prod(shape) * dtype.itemsize
        memory = _Memory(self.library, "allocate", "free", size)
        raw = (
            memory.as_host() if self.library.is_emulated else torch.as_tensor(memory, device=self.torch_device)
        )
        return raw[:size].view(dtype).view(shape)

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """On the host, where the device reads and writes without its help. Holds zeros."""
        size = math.prod(shape) * dtype.itemsize
        raw = _Memory(self.library, "allocate_host", "free_host", size).as_host()
        return raw.zero_()[:size].view(dtype).view(shape)

    # --- copies ------------------------------------------------------------------------------------------

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Puts a copy on the stream; both are contiguous, equally large, and on the device or pinned."""
        if to.nbytes != source.nbytes or not to.is_contiguous() or not source.is_contiguous():
            raise ValueError(f"{tuple(source.shape)} cannot be copied to {tuple(to.shape)}")
        self.library.do("copy", _at(to), _at(source), ctypes.c_int64(to.nbytes), self.stream)

    def copy_corner(self, to: Tensor, source: Tensor, rows: int, columns: int) -> None:
        """The same, of the first rows and columns of two contiguous matrices of one shape."""
        pitch, width = (ctypes.c_int64(count * to.itemsize) for count in (to.shape[1], columns))
        self.library.do("copy_rows", _at(to), _at(source), pitch, width, ctypes.c_int64(rows), self.stream)

    def send_whole(self, to: Tensor, source: Tensor) -> None:
        """Any host tensor to a contiguous one of its shape and type on the device, through pinned memory: for loading.
        What the last pieces are may still be under way when it returns."""
        if self._stage is None:
            halves = [self.pinned(_STAGE_BYTES, dtype=torch.uint8) for _ in range(2)]
            self._stage = halves[0], halves[1]
        bytes_there = to.view(-1).view(torch.uint8)
        bytes_here = source.contiguous().view(-1).view(torch.uint8)
        for place, begin in enumerate(range(0, len(bytes_here), _STAGE_BYTES)):
            if place % 2 == 0:
                self.wait()
            piece = bytes_here[begin : begin + _STAGE_BYTES]
            half = self._stage[place % 2][: len(piece)]
            half.copy_(piece)
            self.copy(bytes_there[begin : begin + len(piece)], half)

    def drop_stage(self) -> None:
        """Loading is over."""
        self.wait()
        self._stage = None

    def fetch(self, source: Tensor) -> Tensor:
        """A copy on the host of a contiguous tensor of the device, once all that is on the stream is done."""
        pinned = self.pinned(*source.shape, dtype=source.dtype)
        self.copy(pinned, source)
        self.wait()
        return pinned

    # --- the stream --------------------------------------------------------------------------------------

    def wait(self) -> None:
        """Until all that was put on the stream is done. Raises CudaError where something failed."""
        self.library.do("synchronise", self.stream)

    def drain(self) -> None:
        """As ``wait``, whatever failed: then nothing is under way any more."""
        self.library.give_back("synchronise", self.stream)

    def mark(self) -> "Mark":
        return Mark(self)

    @contextmanager
    def capture(self) -> "Iterator[Graph]":
        """What the block puts on the stream goes into a graph, which may then be launched any number of times."""
        graph = Graph(self)
        self.library.do("begin_capture", self.stream)
        try:
            yield graph
        finally:
            graph.end(self.library.make("end_capture", self.stream))

    # --- memory that processes share ---------------------------------------------------------------------

    def share(self, memory: Tensor) -> bytes:
        """By which another process opens a tensor of ``zeros``."""
        handle = ctypes.create_string_buffer(HANDLE_BYTES)
        self.library.do("share", _at(memory), handle)
        return handle.raw

    def open_shared(self, handle: bytes) -> ctypes.c_void_p:
        """The address here of memory that another process shares."""
        return self.library.make("open_shared", ctypes.create_string_buffer(handle, HANDLE_BYTES))

    def close_shared(self, at: ctypes.c_void_p) -> None:
        self.library.do("close_shared", at)


class Mark:
    """A place in the stream that the host may wait for."""

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._event = device.library.make("event")

    def set(self) -> None:
        """Behind all that is on the stream by now."""
        self._device.library.do("record", self._event, self._device.stream)

    def is_reached(self) -> bool:
        """Raises CudaError where something before it failed; as ``wait``."""
        done = ctypes.c_int()
        self._device.library.do("ask", self._event, ctypes.byref(done))
        return bool(done.value)

    def wait(self) -> None:
        self._device.library.do("wait", self._event)


class Graph:
    """Operators and copies as they were captured, with the arguments of then. Their tensors must live as long."""

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._graph: ctypes.c_void_p | None = None

    def end(self, graph: ctypes.c_void_p) -> None:
        self._graph = graph
        weakref.finalize(self, self._device.library.give_back, "drop_graph", graph).atexit = False

    def launch(self) -> None:
        """Puts all of it on the stream."""
        self._device.library.do("launch_graph", self._graph, self._device.stream)


class _Memory:
    """Bytes of the library's, freed when nobody holds them any more."""

    def __init__(self, library: CudaLibrary, take: str, give: str, size: int) -> None:
        self._size = max(size, 1)
        self._at = library.make(take, size=self._size)
        weakref.finalize(self, library.give_back, give, self._at).atexit = False

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """By which torch makes a tensor of it that holds it."""
        return {"shape": (self._size,), "typestr": "|u1", "data": (self._at.value, False), "version": 3}

    def as_host(self) -> Tensor:
        array = (ctypes.c_uint8 * self._size).from_address(self._at.value or 0)
        array.memory = self  # type: ignore[attr-defined]
        return torch.frombuffer(array, dtype=torch.uint8)


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
