"""Memory that the ranks of one host share, through which they add up and gather. Made by ``workers/parallel.py``, used
by the operators ``all_reduce`` and ``gather_columns``.

It holds a line for each rank's progress and then two sets of slots; csrc/cpu/shared_region.h tells how they are used,
shared_region.cpp how ranks wait for each other. ``exchange`` is the same in Python, for the operators' twins. Needs
Linux: pidfds tell a waiting rank that another one is dead.
"""

import mmap
import os
import select
import time
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from shoal.cuda_ext.binding import PeerLost, library

CHUNK: Final = 1 << 15
"""Floats that a rank puts into the region at once."""
_MOST_RANKS: Final = 64
_LINE_BYTES: Final = 64
_NAP_S: Final = 50e-6
_PATIENCE_S: Final = 30.0
"""For peers that hang; one that dies is noticed at once."""


class SharedRegion:
    """One rank's hold of the region. All ranks must run the same operators on it in the same order, each of them from
    one thread."""

    def __init__(self, memory: mmap.mmap, rank: int, pids: Sequence[int], chunk: int = CHUNK) -> None:
        """memory: zeroed, ``bytes_for`` long, of the same pages for each of the processes ``pids``, one a rank.

        Raises ProcessLookupError where a process is gone."""
        self.rank, self.ranks = rank, len(pids)
        self.memory = torch.frombuffer(memory, dtype=torch.uint8)
        self._chunk = chunk
        self._meetings = 0
        self._exits: list[int] = []
        try:
            for pid in pids:
                self._exits.append(os.pidfd_open(pid))
        except OSError:
            self._close_exits()
            raise
        unused = [-1] * (_MOST_RANKS - self.ranks)
        self.member = torch.tensor([rank, self.ranks, chunk, *self._exits, *unused])
        """A RegionMember of shoal_cpu.h."""
        lines = self.memory[: _LINE_BYTES * (1 + self.ranks)].view(torch.int64).view(1 + self.ranks, -1)
        self._closed, self._come = lines[0, 0], lines[1:, 0]
        slots = self.memory[lines.nbytes :].view(torch.float32)[: 2 * self.ranks * chunk]
        self._slots = slots.view(2, self.ranks, chunk)

    @staticmethod
    def bytes_for(ranks: int, chunk: int = CHUNK) -> int:
        """Raises ValueError where there are too many ranks."""
        if not 2 <= ranks <= _MOST_RANKS:
            raise ValueError(f"{ranks} ranks cannot share a region; 2 to {_MOST_RANKS} can")
        return _LINE_BYTES * (1 + ranks) + 2 * ranks * chunk * 4

    def exchange(self, x: Tensor) -> list[Tensor]:
        """Every rank's ``x``, float32, which has one length on all of them."""
        parts: list[list[Tensor]] = [[] for _ in range(self.ranks)]
        for piece in torch.split(x, self._chunk):
            slots = self._slots[self._meetings % 2, :, : len(piece)]
            slots[self.rank] = piece
            self._meet()
            for part, slot in zip(parts, slots, strict=True):
                part.append(slot.clone())
        return [torch.cat(part) if part else torch.empty(0) for part in parts]

    def _meet(self) -> None:
        # Giving up the interpreter's lock and taking it again keeps the writes before and after it in order.
        time.sleep(0)
        self._meetings += 1
        self._come[self.rank] = self._meetings
        until_s = time.monotonic() + _PATIENCE_S
        while True:
            gone = bool(self._closed) or self._has_any_exited() or time.monotonic() > until_s
            if int(self._come.min()) >= self._meetings:
                return
            if gone:
                raise PeerLost("a tensor-parallel peer is gone or does not answer")
            time.sleep(_NAP_S)

    def _has_any_exited(self) -> bool:
        return bool(select.select(self._exits, [], [], 0)[0])

    def close(self) -> None:
        """Peers that wait for this rank get ``PeerLost``. No operator may run on it afterwards."""
        compiled = library()
        if compiled is None:
            self._closed.fill_(1)
        else:
            compiled.leave_region(self.memory.data_ptr(), self.ranks)
        self._close_exits()

    def _close_exits(self) -> None:
        while self._exits:
            os.close(self._exits.pop())
