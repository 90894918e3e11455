"""The run directory: sockets, settings, rendezvous files of one server; made at start, removed at the end.

It is locked for the supervisor's life, so a directory whose lock is free belonged to a dead one.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_PREFIX: Final = "shoal-"
_LOCK: Final = "lock"
_LONGEST_BASE_BYTES: Final = 70
"""Of the 107 bytes of a socket's path: room for our own part."""


@contextlib.contextmanager
def run_dir() -> Iterator[Path]:
    """A fresh directory of mode 0700 under ``$XDG_RUNTIME_DIR`` or /tmp."""
    base = _base()
    _remove_stale(base)
    path, lock = _make(base)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _base() -> Path:
    named = os.environ.get("XDG_RUNTIME_DIR", "")
    fits = named.startswith("/") and len(named.encode()) <= _LONGEST_BASE_BYTES
    return Path(named) if fits and os.access(named, os.W_OK | os.X_OK) else Path("/tmp")


def _make(base: Path) -> tuple[Path, int]:
    """The directory and its held lock. Another start may remove it before it is locked: then once more."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        lock = _lock(path, os.O_CREAT)
        if lock is not None and path.exists():
            return path, lock


def _remove_stale(base: Path) -> None:
    for path in base.glob(f"{_PREFIX}*"):
        if path.is_symlink() or not path.is_dir() or path.stat().st_uid != os.geteuid():
            continue
        lock = _lock(path, 0)
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _lock(path: Path, create: int) -> int | None:
    """The lock's descriptor; None where somebody else holds it, or there is none."""
    try:
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | create, 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock
