"""One server at a time: started on a free loopback port, ended by its pid before the next one starts."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from serve import fetch, free_port, wait_ready

from peers.progress import tail

_END_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class Server:
    """How to start one."""

    name: str
    command: Callable[[int], list[str]]
    """The command line, given the port."""
    ready_path: str = "/health"
    ready_timeout_s: float = 180
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Running:
    """A server that answers."""

    url: str
    model: str
    ready_s: float
    """From its start until it said that it was ready."""


@contextlib.contextmanager
def running(server: Server, log: Path) -> Iterator[Running]:
    """The server, its output in ``log``. Raises RuntimeError with the output's end when it does not come up."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environment = os.environ | dict(server.environment)
    with log.open("wb") as output:
        began_s = time.monotonic()
        process = subprocess.Popen(
            server.command(port),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            wait_ready(url, process, server.ready_path, server.ready_timeout_s)
            ready_s = time.monotonic() - began_s
            yield Running(url, fetch(f"{url}/v1/models")["data"][0]["id"], ready_s)
        except (RuntimeError, OSError) as error:
            raise RuntimeError(f"{server.name}: {error}; see {log}:\n{tail(log)}") from error
        finally:
            end(process)


def end(process: "subprocess.Popen[bytes]") -> None:
    """Asks it to go, waits, and clears away what of its own session is left."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
