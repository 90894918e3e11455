"""The supervisor's process: what stands around its loop, from the checked command line to the exit code."""

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from shoal import config, logs
from shoal.config import Settings
from shoal.errors import FlagError, StartError
from shoal.launch import Launch
from shoal.supervisor import background
from shoal.supervisor.console import Console
from shoal.supervisor.loop import Supervisor
from shoal.supervisor.run_dir import run_dir

RANK_COMMAND: Final = (sys.executable, "-P", "-m", "shoal.workers.main")
"""What a rank is started with; the settings file and the rank's number follow."""


def serve(launch: Launch, rank_command: Sequence[str] = RANK_COMMAND) -> int:
    """Runs a server until it is told to stop; the exit code.

    Raises StartError for what can be told before anything runs. With ``--daemon`` it returns in the background
    process alone: the one that called ends itself when the server is ready or has failed.
    """
    _check_address(launch.settings)
    for warning in launch.warnings:
        sys.stderr.write(f"warning: {warning}\n")
    with _pid_file(launch.pid_file) as pid_file:
        console = _console(launch)
        if pid_file is not None:
            pid_file.write()
        logs.configure("supervisor", launch.settings.log_level)
        try:
            with run_dir() as path:
                return _supervise(launch, path, console, rank_command)
        except StartError as error:
            console.failed(str(error))
            return 1


def _supervise(launch: Launch, path: Path, console: Console, rank_command: Sequence[str]) -> int:
    settings = msgspec.structs.replace(launch.settings, run_dir=str(path))
    settings_path = path / "settings.json"
    config.save(settings, settings_path)
    return Supervisor(settings, settings_path, console, rank_command, launch.daemon).run()


def _console(launch: Launch) -> Console:
    """Where the start is shown; standard error is the log from here on."""
    if launch.daemon:
        channel = background.detach()
        if launch.log_file:
            background.open_log(launch.log_file)
        return background.BackgroundConsole(sys.stderr.buffer, channel)
    err = sys.stderr
    if launch.log_file:
        err = os.fdopen(os.dup(2), "w", encoding="utf-8")
        background.open_log(launch.log_file)
    return Console(sys.stderr.buffer, err, sys.stdout)


@contextlib.contextmanager
def _pid_file(path: str) -> Iterator[background.PidFile | None]:
    if not path:
        yield None
        return
    pid_file = background.PidFile(Path(path))
    try:
        yield pid_file
    finally:
        pid_file.remove()


def _check_address(settings: Settings) -> None:
    """Tells a bad address or a taken port before minutes of loading."""
    where = f"--server_name {settings.server_name}"
    try:
        found = socket.getaddrinfo(settings.server_name, settings.server_port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        raise FlagError(f"{where}: there is no such address") from None
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(1)
        except OSError as error:
            raise FlagError(_why_not(settings, error)) from None


def _why_not(settings: Settings, error: OSError) -> str:
    port = f"--server_port {settings.server_port}"
    match error.errno:
        case errno.EADDRINUSE:
            return f"{port}: another process listens there already; end it or choose another port"
        case errno.EACCES:
            return f"{port}: only the administrator may listen there; choose one above 1023"
        case _:
            return f"--server_name {settings.server_name}: {error.strerror}"
