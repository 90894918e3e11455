"""Where weights lie: one after the other in the order of loading, on huge pages where the system gives them.

A decode step reads every weight once. With pages of 4 KiB the processor's own prefetching stops at each page's end, and
each page costs a walk through the page tables: half of the bandwidth and more. Used by ``packed_weight`` and
``quantised``; the KV cache has mappings of its own.
"""

import contextlib
import math
import mmap
import weakref
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

_HUGE_PAGE: Final = 2 << 20
_CHUNK: Final = 64 << 20
"""Address space that is taken at once; memory is given page by page as it is written."""
_LINE: Final = 64
_SMALLEST: Final = 64 << 10
"""Bytes below which the ordinary allocator serves as well."""


@dataclass(slots=True)
class _Chunk:
    """A mapping that only the tensors in it keep alive."""

    mapping: weakref.ref[mmap.mmap]
    next: int
    end: int


_chunk: _Chunk | None = None


def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros, for a weight."""
    global _chunk
    size = math.prod(shape) * dtype.itemsize
    if size < _SMALLEST:
        return torch.zeros(shape, dtype=dtype)
    mapping = None if _chunk is None else _chunk.mapping()
    if _chunk is None or mapping is None or _chunk.end - _chunk.next < size:
        room = max(size, _CHUNK)
        mapping, begin = map_huge(room)
        _chunk = _Chunk(weakref.ref(mapping), begin, begin + room)
    piece = torch.frombuffer(mapping, dtype=torch.uint8, count=size, offset=_chunk.next)
    _chunk.next += -(-size // _LINE) * _LINE
    return piece.view(dtype).view(shape)


def map_huge(size: int) -> tuple[mmap.mmap, int]:
    """Zeros, given page by page as they are written; and where in the mapping ``size`` bytes on huge pages begin.
    Raises MemoryError where there is no address space."""
    # Private: shared mappings are files in memory, whose pages are small unless the system's owner says otherwise.
    try:
        mapping = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise MemoryError(f"{size} bytes: {error}") from error
    with contextlib.suppress(OSError):  # a kernel without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping, -torch.frombuffer(mapping, dtype=torch.uint8).data_ptr() % _HUGE_PAGE
