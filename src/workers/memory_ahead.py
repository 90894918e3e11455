"""Memory that the system gives before it is used. Called by ``kv_cache``.

The system gives memory when it is first written: a tenth of a second a gigabyte, and seconds in a virtual machine whose
host has to find it first. A step would wait for that. So some of it is asked for ahead of use: when the rank starts,
for a second at most, and the rest when it is idle. Not all, since most servers never fill their cache. And not more at
once after each request: the next one would wait for that. When half is used up, the rest is made up for.
"""

import mmap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from shoal.cuda_ext.binding import library

_START_BYTES: Final = 8 << 20
_START_S: Final = 1.0
_IDLE_BYTES: Final = 64 << 10
_IDLE_S: Final = 0.001
"""What a rank does when it is idle delays what comes meanwhile."""


@dataclass(slots=True)
class Part:
    """``size`` bytes of a mapping from ``begin`` on, which are used from their first one on."""

    mapping: mmap.mmap
    begin: int
    size: int
    taken: int = 0
    """Bytes that the system has given."""


class MemoryAhead:
    """Of parts of one size, which are used alike: the keys or values of a layer each. Without the compiled library
    nothing is taken."""

    def __init__(self, parts: Sequence[Part], bytes_ahead: int) -> None:
        """bytes_ahead: of all parts together."""
        self._parts = parts
        self._ahead = bytes_ahead // len(parts)
        self._library = library()
        self._is_going_on = True

    def take_at_start(self) -> None:
        """For a second, or until all that is wanted ahead is there."""
        until_s = time.monotonic() + _START_S
        while time.monotonic() < until_s and self._take(_START_BYTES, self._ahead):
            pass

    def take_when_idle(self, used: int) -> bool:
        """For a millisecond, or until one huge page is there. False where enough lies beyond the first ``used``
        bytes of each part."""
        until_s = time.monotonic() + _IDLE_S
        least = min(part.taken for part in self._parts)
        self._is_going_on = self._is_going_on or least < used + self._ahead // 2
        while self._is_going_on and time.monotonic() < until_s:
            self._is_going_on = self._take(_IDLE_BYTES, used + self._ahead)
        return self._is_going_on

    def _take(self, piece: int, wanted: int) -> bool:
        """A piece more of the part that has least; False where all have ``wanted`` bytes."""
        part = min(self._parts, key=lambda part: part.taken)
        missing = min(part.size, wanted) - part.taken
        if self._library is None or missing <= 0:
            return False
        address = torch.frombuffer(part.mapping, dtype=torch.uint8).data_ptr() + part.begin + part.taken
        before = address % mmap.PAGESIZE
        size = min(piece, missing)
        try:
            self._library.populate(address - before, before + size)
        except MemoryError:
            self._library = None
        part.taken += size
        return True
