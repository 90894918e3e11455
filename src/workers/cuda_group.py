"""The ranks of one crew epoch on the GPUs of one host: they add up and gather through memory of each other's devices,
in the order of the ranks, by kernels that wait for each other. What ``parallel`` has for CPUs.

Each rank shares its regions by handles, which travel through the rendezvous file. A thread sees to it that nobody waits
for a rank that has died or left: it tells this rank's device to stop waiting.
"""

import ctypes
import mmap
import os
import select
import threading
from datetime import timedelta
from typing import Any, Final, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.cuda_ext import cuda_step_ops as ops
from shoal.cuda_ext.binding import PeerLost
from shoal.cuda_ext.cuda_device import CudaDevice
from shoal.cuda_ext.cuda_program import CudaProgram
from shoal.cuda_ext.program import Count

_TIMEOUT_S: Final = 30.0
"""For peers that do not come to the rendezvous."""
_LOOK_S: Final = 0.05
_MOST_SUMMED: Final = 16 << 20
"""Bytes that are summed at once: 2048 tokens of 4096 elements in 16 bits."""


class DeviceGroup(Protocol):
    """Every rank must record and run the same in the same order. Peers that are lost are told by ``fault``."""

    @property
    def is_alone(self) -> bool:
        """Whether the rank may run what no other does."""

    def add_up(self, program: CudaProgram, x: Tensor, rows: Count) -> None:
        """Appends: overwrites the first rows of ``x``, contiguous [rows, columns], with the sum of every rank's."""

    def gather_logits(self, program: CudaProgram, out: Tensor, x: Tensor, rows: Count) -> None:
        """Appends: puts all ranks' ``x``, float32 [rows, the rank's width], side by side in rank 0's ``out``."""

    def tell_ids(self, program: CudaProgram, ids: Tensor, rows: Count) -> None:
        """Appends: overwrites ``ids``, int64 [rows], with rank 0's."""

    def close(self) -> None:
        """Leaves."""


class SoloDeviceGroup:
    """One rank: logits are where they are wanted."""

    is_alone = True

    def add_up(self, program: CudaProgram, x: Tensor, rows: Count) -> None:
        pass

    def gather_logits(self, program: CudaProgram, out: Tensor, x: Tensor, rows: Count) -> None:
        pass

    def tell_ids(self, program: CudaProgram, ids: Tensor, rows: Count) -> None:
        pass

    def close(self) -> None:
        pass


class PeerRegions:
    """A rank's own regions, one for each kind of meeting, which outlive the crew's epochs: a peer that was left behind
    never finds that they are gone. fault: int32 [1] on the device, set where a peer is lost."""

    def __init__(
        self,
        device: CudaDevice,
        widths: tuple[int, ...],
        hidden_size: int,
        tokens: int,
        sequences: int,
        fault: Tensor,
    ) -> None:
        self.device = device
        self.widths = torch.tensor(widths)
        self.id_widths = torch.tensor([2] + [0] * (len(widths) - 1))
        self.fault = fault
        slots = {
            "half_sums": min(tokens * hidden_size * 2, _MOST_SUMMED),
            "float_sums": min(tokens * hidden_size * 4, _MOST_SUMMED),
            "logits": sequences * max(widths) * 4,
            "ids": sequences * 8,
        }
        self.slot_bytes = {name: -(-size // 32) * 32 for name, size in slots.items()}
        self.memory = {
            name: device.zeros(ops.REGION_HEADER + 2 * size, dtype=torch.uint8)
            for name, size in self.slot_bytes.items()
        }

    def clear(self) -> None:
        """For a new group: calls are counted from the first on. Nobody may wait or write any more."""
        headers = [memory[: ops.REGION_HEADER].view(torch.int32) for memory in self.memory.values()]
        for part in (*headers, self.fault):
            self.device.send_whole(part, torch.zeros(part.shape, dtype=torch.int32))
        self.device.drop_stage()


class PeerGroup:
    """Waits for all ranks to arrive at the file ``rendezvous``, which must be new: else PeerLost."""

    is_alone = False

    def __init__(self, rank: int, rendezvous: str, regions: PeerRegions) -> None:
        self._rank, self._ranks = rank, len(regions.widths)
        self._own = regions
        self._device = regions.device
        self._stop = self._device.pinned(1, dtype=torch.int32)
        self._opened: list[ctypes.c_void_p] = []
        self._exits: list[int] = []
        regions.clear()
        try:
            store = dist.FileStore(rendezvous, self._ranks)  # type: ignore[attr-defined]
            store.set_timeout(timedelta(seconds=_TIMEOUT_S))
            self._left = _share_page(store, rank, self._ranks)
            self._addresses = {name: self._meet(store, name) for name in regions.memory}
            self._exits = [os.pidfd_open(int(store.get(f"pid{peer}"))) for peer in range(self._ranks)]
        except (RuntimeError, OSError) as error:
            self._let_go()
            raise PeerLost(f"a tensor-parallel peer did not come: {error}") from error
        self._closing = threading.Event()
        self._watch = threading.Thread(target=self._look_out, name="peers", daemon=True)
        self._watch.start()

    def add_up(self, program: CudaProgram, x: Tensor, rows: Count) -> None:
        ops.all_reduce(program, x, rows, **self._meeting("float_sums" if x.itemsize == 4 else "half_sums"))

    def gather_logits(self, program: CudaProgram, out: Tensor, x: Tensor, rows: Count) -> None:
        there = out if self._rank == 0 else None
        ops.gather_columns(program, there, x, self._own.widths, rows, **self._meeting("logits"))

    def tell_ids(self, program: CudaProgram, ids: Tensor, rows: Count) -> None:
        words = ids.view(torch.float32).view(-1, 2)
        own = words if self._rank == 0 else words[:, :0]
        ops.gather_columns(program, words, own, self._own.id_widths, rows, **self._meeting("ids"))

    def close(self) -> None:
        """Peers that wait for this rank stop waiting."""
        if not self._closing.is_set():
            self._left[0] = 1
            self._closing.set()
            self._watch.join()
            self._stop[0] = 1
            self._device.drain()
            self._let_go()

    def _meeting(self, name: str) -> ops.Meeting:
        return {
            "regions": self._addresses[name],
            "stop": self._stop,
            "fault": self._own.fault,
            "rank": self._rank,
            "ranks": self._ranks,
            "slot_bytes": self._own.slot_bytes[name],
        }

    def _meet(self, store: Any, name: str) -> Tensor:
        """The addresses of all ranks' regions."""
        memory = self._own.memory[name]
        store.set(f"{name}{self._rank}", self._device.share(memory).hex())
        addresses = []
        for peer in range(self._ranks):
            handle = bytes.fromhex(store.get(f"{name}{peer}").decode())
            if peer == self._rank:
                addresses.append(memory.data_ptr())
            else:
                self._opened.append(self._device.open_shared(handle))
                addresses.append(self._opened[-1].value or 0)
        return torch.tensor(addresses)

    def _look_out(self) -> None:
        while not self._closing.wait(_LOOK_S):
            if self._left[0] or select.select(self._exits, [], [], 0)[0]:
                self._stop[0] = 1
                return

    def _let_go(self) -> None:
        while self._opened:
            self._device.close_shared(self._opened.pop())
        while self._exits:
            os.close(self._exits.pop())


def _share_page(store: Any, rank: int, ranks: int) -> mmap.mmap:
    """Zeros that all ranks see, through a descriptor of rank 0's; also tells all ranks' process ids."""
    pid = os.getpid()
    if rank == 0:
        file = os.memfd_create("shoal")
        os.ftruncate(file, mmap.PAGESIZE)
        store.set("page", f"/proc/{pid}/fd/{file}")
    else:
        file = os.open(store.get("page"), os.O_RDWR | os.O_CLOEXEC)
    try:
        page = mmap.mmap(file, mmap.PAGESIZE)
        store.set(f"pid{rank}", str(pid))
        for peer in range(ranks):
            store.get(f"pid{peer}")
    finally:
        os.close(file)
    return page
