"""Ties between processes: a child that ends with its parent, handles on processes by pidfd.

Called by the supervisor for the children it starts and first thing by each child's ``main``.
"""

import ctypes
import os
import signal
from typing import Final

PARENT_PID_VARIABLE: Final = "SHOAL_PARENT_PID"
"""Environment variable in which the supervisor tells a child its own pid."""

START_FAILED_EXIT: Final = 3
"""Exit code of a child that cannot start (a bad model, a taken port): starting it again would not help."""

_PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent_pid: int) -> None:
    """Has the kernel end this process with SIGKILL when the thread that started it ends.

    A parent that ended before the call is noticed too: then this process ends here.
    """
    arguments = (ctypes.c_ulong(value) for value in (signal.SIGKILL, 0, 0, 0))
    if _LIBC.prctl(ctypes.c_int(_PR_SET_PDEATHSIG), *arguments) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    if os.getppid() != parent_pid:
        os._exit(1)


def die_with_supervisor() -> None:
    """``die_with_parent`` for the parent named in the environment; nothing where a person started us by hand."""
    parent_pid = os.environ.get(PARENT_PID_VARIABLE, "")
    if parent_pid.isdecimal():
        die_with_parent(int(parent_pid))


def open_pidfd(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends; None where it has ended already."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def available_cores() -> int:
    """Cores this process may use: its affinity mask, and the processor quota of its cgroup."""
    cores = len(os.sched_getaffinity(0))
    quota = _cgroup_cores()
    return max(1, min(cores, int(quota))) if quota else cores


def _cgroup_cores() -> float | None:
    """The cgroup's quota in cores (version 2, then version 1); None where there is none."""
    unified = _words("/sys/fs/cgroup/cpu.max")
    if len(unified) == 2 and unified[0] != "max":
        return int(unified[0]) / int(unified[1])
    quota = _words("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
    period = _words("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
    if quota and period and int(quota[0]) > 0:
        return int(quota[0]) / int(period[0])
    return None


def _words(path: str) -> list[str]:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().split()
    except OSError:
        return []
