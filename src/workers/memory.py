"""Memory that the process has freed, and the operating system is to have back. Called by ``loop`` before a sleep."""

import ctypes
import gc


def return_freed_memory() -> None:
    """Collects what only reference cycles hold, and has the C library return what it keeps of freed memory. A library
    without ``malloc_trim`` (musl) keeps nothing of large pieces."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
