"""``--daemon``, ``--pid_file`` and ``--log_file``: a server that no terminal holds."""

import fcntl
import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from shoal.errors import FlagError
from shoal.supervisor.console import Console


class PidFile:
    """Holds the server's process id, locked for the server's life: a leftover of a dead one is taken over."""

    def __init__(self, path: Path) -> None:
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise FlagError(f"--pid_file {path}: {error.strerror}") from None
        self._path = path
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._descriptor, 32).decode(errors="replace").strip()
            os.close(self._descriptor)
            raise FlagError(f"--pid_file {path}: the server with process id {holder} is running") from None

    def write(self) -> None:
        """This process's id."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def remove(self) -> None:
        """The server has ended."""
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


class BackgroundConsole(Console):
    """Speaks to the process in the foreground, which waits until the server is ready or has failed."""

    def __init__(self, log: BinaryIO, channel: int) -> None:
        nowhere = io.StringIO()
        super().__init__(log, nowhere, nowhere)
        self._channel = channel
        self._send(pid=os.getpid())

    def say(self, line: str) -> None:
        self._send(line=line)

    def ready(self, text: str) -> None:
        if self._channel >= 0:
            self._send(code=0, text=text)
            os.close(self._channel)
            self._channel = -1

    def failed(self, cause: str) -> None:
        """The channel stays open up to the end of this process: who waits may start another at once."""
        self.relay(f"error: {cause}\n".encode())
        self._send(code=1, text=cause)

    def _send(self, **message: Any) -> None:
        if self._channel < 0:
            return
        try:
            os.write(self._channel, json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            os.close(self._channel)
            self._channel = -1


def detach() -> int:
    """Goes on in a process of its own session, with standard streams that lead nowhere.

    Returns, there alone, the channel for ``BackgroundConsole``. The caller's process waits for what comes
    through it and ends with the server's fate as its exit code.
    """
    reader, channel = os.pipe()
    if os.fork():
        os.close(channel)
        _wait_in_foreground(reader)
    os.close(reader)
    os.setsid()
    if os.fork():
        os._exit(0)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
    return channel


def open_log(path: str) -> None:
    """Sends standard error, which the log and the children's lines go to, into a file."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise FlagError(f"--log_file {path}: {error.strerror}") from None
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _wait_in_foreground(reader: int) -> NoReturn:
    code = 1
    pid = 0
    text = "the server ended while it started"
    with os.fdopen(reader, encoding="utf-8") as lines:
        try:
            for line in lines:
                message = json.loads(line)
                pid = message.get("pid", pid)
                code, text = message.get("code", code), message.get("text", text)
                if "line" in message:
                    sys.stderr.write(f"{message['line']}\n")
        except KeyboardInterrupt:
            if pid:
                os.kill(pid, signal.SIGTERM)
            code, text = 128 + signal.SIGINT, "stopped before the server was ready"
    stream = sys.stdout if code == 0 else sys.stderr
    stream.write(text if code == 0 else f"error: {text}\n")
    stream.flush()
    os._exit(code)
