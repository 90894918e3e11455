"""Ties between processes: a child that ends with its parent, orphans, handles on processes by pidfd.

Called by the supervisor for the children it starts and first thing by each child's ``main``.
"""

import ctypes
import os
import signal
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Final

PARENT_PID_VARIABLE: Final = "SHOAL_PARENT_PID"
"""Environment variable in which the supervisor tells a child its own pid."""

START_FAILED_EXIT: Final = 3
"""Exit code of a child that cannot start (a bad model, a taken port): starting it again would not help."""

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent_pid: int) -> None:
    """Has the kernel end this process with SIGKILL when the thread that started it ends.

    A parent that ended before the call is noticed too: then this process ends here.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def die_with_supervisor() -> None:
    """``die_with_parent`` for the parent named in the environment; nothing where we were started by hand."""
    parent_pid = supervisor_pid()
    if parent_pid is not None:
        die_with_parent(parent_pid)


def supervisor_pid() -> int | None:
    """The supervisor that this process belongs to; None where it was started by hand."""
    parent_pid = os.environ.get(PARENT_PID_VARIABLE, "")
    return int(parent_pid) if parent_pid.isdecimal() else None


def adopt_orphans() -> None:
    """Has the children of a child that ends become this process's own: ``reap_orphans`` sees to their ends."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def reap_orphans(known: Container[int | None]) -> None:
    """Takes the exit codes of ended children, so that none stays a zombie; the ``known`` ones are another's to take."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid in known:
            return
        os.waitpid(ended.si_pid, os.WNOHANG)


def open_pidfd(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends; None where it has ended already."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def available_cores() -> int:
    """Cores this process may use: its affinity mask, and the processor quotas of its cgroups."""
    cores = float(len(os.sched_getaffinity(0)))
    return max(1, int(min([cores, *_cgroup_cores()])))


def _prctl(option: int, value: int) -> None:
    arguments = (ctypes.c_ulong(argument) for argument in (value, 0, 0, 0))
    if _LIBC.prctl(ctypes.c_int(option), *arguments) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def _cgroup_cores() -> Iterator[float]:
    """The quotas, in cores, of this process's cgroup and of those above it."""
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, name = line.split(":", 2)
        if not controllers:
            yield from _quotas(Path("/sys/fs/cgroup"), name, "cpu.max")
        elif "cpu" in controllers.split(","):
            yield from _quotas(Path("/sys/fs/cgroup/cpu"), name, "cpu.cfs_quota_us", "cpu.cfs_period_us")


def _quotas(root: Path, name: str, *files: str) -> Iterator[float]:
    """Version 2 has "quota period" in one file, version 1 in two; "max" and -1 are no limit."""
    own = root / name.lstrip("/")
    for folder in (own, *own.parents):
        words = [word for file in files for line in _lines(folder / file) for word in line.split()]
        if len(words) == 2 and words[0].isdecimal():
            yield int(words[0]) / int(words[1])
        if folder == root:
            return


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
