"""TLS, keys and the administration's routes over real connections, with fake workers."""

import http.client
import json
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server import FAKE_SERVER, free_port, needed_program, running_server, stop

KEYS = """
[[key]]
name = "boss"
key = "sk-boss"
[[key]]
name = "team"
key = "sk-team"
scopes = ["inference"]
max_concurrent = 1
"""


class Https:
    """Requests to a server whose certificate must be the one that is given."""

    def __init__(self, port: int, certificate: Path) -> None:
        self.port = port
        self._context = ssl.create_default_context(cafile=str(certificate))

    def request(
        self, method: str, path: str, key: str = "sk-boss", body: object = None
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and decoded body."""
        connection = http.client.HTTPSConnection("localhost", self.port, timeout=20, context=self._context)
        try:
            connection.request(method, path, json.dumps(body) if body else None, {"x-api-key": key})
            answer = connection.getresponse()
            return (
                answer.status,
                {name.lower(): value for name, value in answer.getheaders()},
                json.load(answer),
            )
        finally:
            connection.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Self-signed, with its key beside it."""
    needed_program("openssl")
    folder = tmp_path_factory.mktemp("tls")
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 2 -subj /CN=localhost"
    )
    arguments = [*command.split(), "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run(arguments, cwd=folder, check=True, capture_output=True)
    return folder / "cert.pem"


@pytest.fixture
def server(certificate: Path, tmp_path: Path) -> Iterator[tuple[Https, "subprocess.Popen[bytes]", Path]]:
    """HTTPS with two keys."""
    keys, log, port = tmp_path / "keys.toml", tmp_path / "log", free_port()
    keys.write_text(KEYS)
    keys.chmod(0o600)
    flags = [
        "--ssl",
        "--ssl_keyfile",
        str(certificate.with_name("key.pem")),
        "--ssl_certfile",
        str(certificate),
    ]
    flags += ["--api_keys", f"@{keys}", "--data_dir", str(tmp_path / "data"), f"--server_port={port}"]
    with log.open("wb") as out:
        process = subprocess.Popen([*FAKE_SERVER, *flags], stdout=out, stderr=out, start_new_session=True)
    try:
        https = Https(port, certificate)
        _wait_ready(process, log)
        yield https, process, log
    finally:
        stop(process)


def _wait_ready(process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Until the supervisor says so: it has asked over TLS too."""
    give_up_s = time.monotonic() + 60
    while " is ready\n" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < give_up_s, log.read_text()
        time.sleep(0.05)


def test_https_with_keys_from_start_to_drain(server: tuple[Https, "subprocess.Popen[bytes]", Path]) -> None:
    https, process, log = server
    assert f"URL        https://127.0.0.1:{https.port}" in log.read_text()
    assert https.request("GET", "/v1/models", key="sk-wrong")[0] == 401
    assert https.request("GET", "/v1/models", key="sk-team")[0] == 200
    assert https.request("GET", "/metrics", key="sk-team")[0] == 403
    _refuse_plain(https.port)
    assert https.request("POST", "/admin/drain")[0] == 200
    assert process.wait(timeout=20) == 0
    assert "sk-" not in log.read_text()


def _refuse_plain(port: int) -> None:
    """Without TLS there is no answer at all."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/health")
        with pytest.raises((http.client.HTTPException, OSError)):
            connection.getresponse()
    finally:
        connection.close()


def test_what_one_key_runs_is_seen_and_ended_through_another_frontend(
    server: tuple[Https, "subprocess.Popen[bytes]", Path],
) -> None:
    https, _, _ = server
    answers: list[tuple[int, dict[str, str], Any]] = []
    body = {"prompt": "a", "max_tokens": 4000, "ignore_eos": True}
    running = threading.Thread(
        target=lambda: answers.append(https.request("POST", "/v1/completions", "sk-team", body))
    )
    running.start()
    found: list[dict[str, Any]] = []
    while not found:
        assert running.is_alive(), answers
        found = https.request("GET", "/admin/requests")[2]["data"]
    assert found[0]["tenant"] == "team"
    status, headers, refused = https.request("POST", "/v1/completions", "sk-team", body)
    assert (status, refused["error"]["code"]) == (429, "rate_limit_exceeded")
    assert int(headers["retry-after"]) >= 1
    assert https.request("GET", "/load")[2]["server_load"] == 1
    assert https.request("POST", "/abort_request", "sk-team", {"rid": found[0]["id"]})[2] == {"aborted": 1}
    running.join(timeout=20)
    status, _, answer = answers[0]
    assert (status, answer["choices"][0]["finish_reason"]) == (200, "abort")


def test_sleep_and_wake_up(tmp_path: Path) -> None:
    with running_server("--data_dir", str(tmp_path), command=FAKE_SERVER) as server:
        body = {"prompt": "a", "max_tokens": 5, "seed": 1}
        before = server.post("/v1/completions", body)[1]["choices"]
        assert server.post("/sleep?level=2", {}) == (200, {"is_sleeping": True, "level": 2})
        for _ in range(6):
            status, refused = server.post("/v1/completions", body)
            assert (status, refused["error"]["code"]) == (503, "sleeping")
            assert server.get("/health")[0] == 200
            assert server.get("/ready")[0] == 503
        assert server.post("/wakeup", {}) == (200, {"is_sleeping": False, "level": 0})
        assert server.post("/v1/completions", body)[1]["choices"] == before


def test_a_certificate_that_is_no_use_ends_the_start(certificate: Path, tmp_path: Path) -> None:
    flags = ["--ssl_keyfile", str(certificate), "--ssl_certfile", str(certificate), "--data_dir", str(tmp_path)]
    ended = subprocess.run(
        [*FAKE_SERVER, *flags, f"--server_port={free_port()}"], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: --ssl_certfile")
