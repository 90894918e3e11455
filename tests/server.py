"""A real server for process and e2e tests: ``with running_server("--tp", "2") as server: … server.url …``."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
API_SERVER = (sys.executable, str(ROOT / "bin" / "api_server"))
FAKE_SERVER = (sys.executable, str(ROOT / "tests" / "fakes" / "fake_server.py"))
"""The same server with fake workers: no weights, an answer in milliseconds."""

_STOP_TIMEOUT_S = 60
_MARKS = {"rank": "worker", "scheduler": "shoal.scheduler", "gunicorn": "gunicorn"}


@dataclass(frozen=True)
class Server:
    """A server that answers /ready with 200."""

    url: str
    port: int
    process: "subprocess.Popen[bytes]"
    log_path: Path

    @property
    def pid(self) -> int:
        """Of the supervisor."""
        return self.process.pid

    def children(self) -> dict[str, list[int]]:
        """Process ids by what they are: rank, scheduler, gunicorn (the master first)."""
        found: dict[str, list[int]] = {"rank": [], "scheduler": [], "gunicorn": []}
        for pid, command in sorted(descendants(self.pid).items()):
            for kind, mark in _MARKS.items():
                if mark in command:
                    found[kind].append(pid)
        return found

    def log(self) -> str:
        """What the server wrote so far, standard output and error together."""
        return self.log_path.read_text(errors="replace")

    def get(self, path: str, timeout_s: float = 10) -> tuple[int, str]:
        """Status and body of a GET, errors included."""
        return _fetch(urllib.request.Request(self.url + path), timeout_s)

    def post(self, path: str, body: object, timeout_s: float = 120) -> tuple[int, Any]:
        """Status and decoded JSON of a POST, errors included."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        status, text = _fetch(request, timeout_s)
        return status, json.loads(text)

    def stream(self, path: str, body: object, timeout_s: float = 120) -> list[Any]:
        """The decoded events of a streamed answer, up to its ``[DONE]``."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        status, text = _fetch(request, timeout_s)
        assert status == 200, text
        *events, end = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
        assert end == "[DONE]"
        return [json.loads(event) for event in events]


@contextlib.contextmanager
def running_server(
    *args: str,
    command: Sequence[str] = API_SERVER,
    ready_timeout_s: float = 180,
    env: dict[str, str] | None = None,
) -> Iterator[Server]:
    """Starts ``command`` with ``args`` on a free port, waits until it is ready, ends it by pid afterwards."""
    port = free_port()
    handle, name = tempfile.mkstemp(prefix="shoal-test-", suffix=".log")
    process = subprocess.Popen(
        [*command, *args, f"--server_port={port}"],
        stdin=subprocess.DEVNULL,
        stdout=handle,
        stderr=handle,
        env=os.environ | (env or {}),
        start_new_session=True,
    )
    os.close(handle)
    server = Server(f"http://127.0.0.1:{port}", port, process, Path(name))
    try:
        wait_ready(server, ready_timeout_s)
        yield server
    finally:
        stop(process)
        server.log_path.unlink()


def wait_ready(server: Server, timeout_s: float = 60) -> None:
    """Returns once /ready answers 200; fails with the log where it does not."""
    deadline_s = time.monotonic() + timeout_s
    while not is_ready(server.port):
        code = server.process.poll()
        assert code is None, f"the server ended with {code} before it was ready:\n{server.log()}"
        assert time.monotonic() < deadline_s, f"not ready after {timeout_s} s:\n{server.log()}"
        time.sleep(0.05)


def eventually(holds: Callable[[], bool], timeout_s: float = 20) -> None:
    """Until it does."""
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def is_ready(port: int) -> bool:
    """Whether a request would be served now."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def stop(process: "subprocess.Popen[bytes]") -> int:
    """Ends a server that may have ended already; its exit code."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


def metrics(server: Server) -> dict[str, float]:
    """Every sample of /metrics: name with its labels → value."""
    status, text = server.get("/metrics")
    assert status == 200, text
    samples = (line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


def descendants(pid: int) -> dict[int, str]:
    """Command lines of the processes below ``pid``, children's children included."""
    found: dict[int, str] = {}
    parents = [pid]
    while parents:
        parent = parents.pop()
        for child in _children_of(parent):
            with contextlib.suppress(FileNotFoundError):
                found[child] = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
                parents.append(child)
    return found


def is_running(pid: int) -> bool:
    """Whether the process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _children_of(pid: int) -> list[int]:
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            children += map(int, task.read_text().split())
    return children


def needed_program(name: str) -> str:
    """Its path; skips the test, and says why, where it is not installed."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"needs the program {name}")
    return path


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _fetch(request: urllib.request.Request, timeout_s: float) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
