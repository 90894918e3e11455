"""One child process of the supervisor: started, listened to, started again after a pause that grows."""

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shoal import process

_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 5.0
_STEADY_S: Final = 10.0
"""A child that lived this long starts with the shortest pause again."""
_READ_BYTES: Final = 1 << 16
_READS_AT_ONCE: Final = 16


@dataclass(frozen=True, slots=True)
class Death:
    """How a child ended."""

    name: str
    exit_code: int
    """Negative: the signal."""
    cause: str
    """Its last line that began with ``error:``, else its last line at all."""
    in_a_row: int
    """Deaths with less than a steady life between them, this one included."""

    @property
    def manner(self) -> str:
        if self.exit_code < 0:
            return f"was killed by {signal.Signals(-self.exit_code).name}"
        return f"ended with exit code {self.exit_code}"


class Child:
    """A command that is to run always. Its output arrives line by line at ``on_line``."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str],
        cwd: Path,
        on_line: Callable[[bytes], None],
    ) -> None:
        self.name = name
        self.start_due_s: float | None = 0.0
        """When it is to be started (time.monotonic()); None while it runs, or once it is to stay ended."""
        self._command = list(command)
        self._env = dict(env)
        self._cwd = cwd
        self._on_line = on_line
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._output = -1
        self._listening = False
        """Until it closes its output."""
        self._partial = b""
        self._last_line = ""
        self._error_line = ""
        self._started_s = 0.0
        self._deaths_in_a_row = 0

    @property
    def pid(self) -> int | None:
        """None while it does not run."""
        return self._process.pid if self._process else None

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Readable when it has written or ended."""
        return (self._pidfd, self._output) if self._listening else (self._pidfd,)

    def start(self) -> None:
        """Starts it in a process group of its own: a terminal's ^C reaches the supervisor alone."""
        self._output, writer = os.pipe()
        fcntl.fcntl(self._output, fcntl.F_SETFL, os.O_NONBLOCK)
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=writer,
                stderr=writer,
                env=self._env | {process.PARENT_PID_VARIABLE: str(os.getpid())},
                cwd=self._cwd,
                process_group=0,
            )
        finally:
            os.close(writer)
        self._pidfd = os.pidfd_open(self._process.pid)
        self._partial, self._last_line, self._error_line = b"", "", ""
        self._started_s = time.monotonic()
        self._listening = True
        self.start_due_s = None

    def signal(self, number: signal.Signals) -> None:
        """To the process; to its whole group where it is SIGKILL. Nothing where it does not run."""
        if self._process is None:
            return
        if number == signal.SIGKILL:
            self._kill_group(self._process.pid)
        else:
            self._process.send_signal(number)

    def relay(self) -> None:
        """Hands on the lines that it has written."""
        for _ in range(_READS_AT_ONCE):
            chunk = self._read()
            if not chunk:
                return
            *lines, self._partial = (self._partial + chunk).split(b"\n")
            for line in lines:
                self._hand_on(line)
            if len(self._partial) > _READ_BYTES:
                self._hand_on(self._partial)
                self._partial = b""

    def reap(self) -> Death | None:
        """How it ended, told once; None while it runs. Its own children end with it."""
        if self._process is None or not self._has_ended():
            return None
        self._kill_group(self._process.pid)
        exit_code = self._process.wait()
        self.relay()
        if self._partial:
            self._hand_on(self._partial)
        self._close()
        return Death(self.name, exit_code, self._cause(), self._count_death())

    def schedule_restart(self) -> None:
        """Sets when it is started again: at once after a steady life, later and later otherwise."""
        pause_s = min(_FIRST_PAUSE_S * 2.0 ** (self._deaths_in_a_row - 1), _LONGEST_PAUSE_S)
        self.start_due_s = time.monotonic() + pause_s

    def _read(self) -> bytes:
        try:
            chunk = os.read(self._output, _READ_BYTES)
        except BlockingIOError:
            return b""
        self._listening = bool(chunk)
        return chunk

    def _hand_on(self, line: bytes) -> None:
        text = line.decode(errors="replace").strip()
        if text:
            self._last_line = text
        if text.startswith("error: "):
            self._error_line = text.removeprefix("error: ")
        self._on_line(line + b"\n")

    def _has_ended(self) -> bool:
        """Without reaping: the zombie keeps the number of the process group ours."""
        assert self._process is not None
        options = os.WEXITED | os.WNOWAIT | os.WNOHANG
        return os.waitid(os.P_PID, self._process.pid, options) is not None

    def _kill_group(self, pid: int) -> None:
        try:
            os.killpg(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return

    def _close(self) -> None:
        os.close(self._pidfd)
        os.close(self._output)
        self._pidfd = self._output = -1
        self._process = None

    def _cause(self) -> str:
        return self._error_line or self._last_line

    def _count_death(self) -> int:
        steady = time.monotonic() - self._started_s > _STEADY_S
        self._deaths_in_a_row = 1 if steady else self._deaths_in_a_row + 1
        return self._deaths_in_a_row
