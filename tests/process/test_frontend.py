"""The real frontends over the real scheduler with fake workers: clients that leave, a scheduler that dies, bad bodies
on real sockets."""

import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import models
import pytest
import server as servers
from server import FAKE_SERVER, Server, eventually, running_server

SLOTS = 4
DELAY_MS = 40
LONG = {"prompt": "one two three", "max_tokens": 2000, "ignore_eos": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    model = str(models.default_model_path())
    env = {"SHOAL_FAKE_FAULTS": json.dumps({"delay_ms": DELAY_MS, "num_blocks": 4096})}
    args = (model, "--frontends", "2", "--instance_num", str(SLOTS))
    with running_server(*args, command=FAKE_SERVER, env=env, ready_timeout_s=60) as running:
        yield running


def send(server: Server, path: str, body: dict[str, Any]) -> socket.socket:
    """A client that has asked and not read; closing the socket is its going away."""
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n"
    client = socket.create_connection(("127.0.0.1", server.port))
    client.settimeout(20)
    client.sendall(head.encode() + raw)
    return client


def held(server: Server) -> dict[str, float]:
    now = servers.metrics(server)
    return {
        name: now[f"shoal:{name}"]
        for name in ("num_requests_running", "num_requests_waiting", "kv_blocks_used")
    }


def nothing_held(server: Server) -> bool:
    return not any(held(server).values())


def reset(client: socket.socket) -> None:
    """Goes away with a reset, as a killed process with unread data does."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    client.close()


@pytest.mark.parametrize("leave", [socket.socket.close, reset], ids=["close", "reset"])
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_that_goes_away_frees_its_blocks_at_once(
    server: Server, path: str, stream: bool, leave: Callable[[socket.socket], None]
) -> None:
    eventually(lambda: nothing_held(server))
    prompt = {"messages": "one two three"} if "chat" in path else {"prompt": "one two three"}
    client = send(server, path, {**prompt, "max_tokens": 2000, "ignore_eos": True, "stream": stream, "n": 2})
    eventually(lambda: held(server)["num_requests_running"] == 2)
    if stream:
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
    leave(client)
    eventually(lambda: nothing_held(server), timeout_s=2)


def test_a_queued_client_that_goes_away_leaves_the_queue(server: Server) -> None:
    eventually(lambda: nothing_held(server))
    running = [send(server, "/v1/completions", LONG | {"stream": n % 2 == 0}) for n in range(SLOTS)]
    eventually(lambda: held(server)["num_requests_running"] == SLOTS)
    queued = [send(server, "/v1/completions", LONG | {"stream": stream}) for stream in (False, True)]
    eventually(lambda: held(server)["num_requests_waiting"] == 2)
    for client in queued:
        client.close()
    eventually(lambda: held(server)["num_requests_waiting"] == 0, timeout_s=2)
    assert held(server)["num_requests_running"] == SLOTS
    for client in running:
        client.close()
    eventually(lambda: nothing_held(server), timeout_s=2)


def test_a_client_that_stops_reading_hinders_nobody(server: Server) -> None:
    stuck = send(server, "/v1/completions", LONG | {"stream": True})
    status, answer = server.post("/v1/completions", {"prompt": "a", "max_tokens": 3, "ignore_eos": True})
    assert status == 200
    assert answer["usage"]["completion_tokens"] == 3
    stuck.close()
    eventually(lambda: nothing_held(server), timeout_s=2)


@pytest.mark.parametrize("kind", ["scheduler", "rank"])
def test_answers_go_on_when_a_process_dies(server: Server, kind: str) -> None:
    """Those that stream, one that waits for a seat, and one that comes meanwhile."""
    body = {"prompt": "one two three", "max_tokens": 50, "ignore_eos": True, "seed": 4, "temperature": 1}
    status, whole = server.post("/v1/completions", body)
    assert status == 200
    clients = [send(server, "/v1/completions", body | {"stream": True}) for _ in range(SLOTS)]
    answers = [http.client.HTTPResponse(client) for client in clients]
    first = []
    for answer in answers:
        answer.begin()
        assert answer.status == 200
        first.append(answer.readline())
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(server.post, "/v1/completions", body)
        eventually(lambda: held(server)["num_requests_waiting"] == 1)
        (victim,) = server.children()[kind]
        os.kill(victim, signal.SIGKILL)
        late = pool.submit(server.post, "/v1/completions", body)
        for line, answer in zip(first, answers, strict=True):
            *events, done = (line + answer.read()).strip(b"\n").split(b"\n\n")
            assert done == b"data: [DONE]"
            choices = [json.loads(event[6:])["choices"][0] for event in events]
            assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
            assert choices[-1]["finish_reason"] == "length"
        for status, answer in (waiting.result(), late.result()):
            assert status == 200
            assert answer["choices"] == whole["choices"]
    for client in clients:
        client.close()
    assert victim not in server.children()[kind]


def test_a_large_body_gets_its_answer(server: Server) -> None:
    body = {"prompt": "x" * (10 << 20)}
    status, answer = server.post("/v1/completions", body)
    assert status == 413
    assert answer["error"]["code"] == "body_too_large"


def test_a_chunked_body_is_limited_too(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    pieces = (b"x" * 65536 for _ in range(160))
    connection.request(
        "POST", "/v1/completions", pieces, encode_chunked=True, headers={"Transfer-Encoding": "chunked"}
    )
    answer = connection.getresponse()
    assert answer.status == 413
    assert json.loads(answer.read())["error"]["code"] == "body_too_large"
    connection.close()


def test_a_long_text_does_not_hold_up_the_others(server: Server) -> None:
    slowest_s = 0.0
    answers: list[tuple[int, Any]] = []
    text = " ".join(f"word{n}" for n in range(500_000))
    asking = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", {"prompt": text})))
    asking.start()
    while asking.is_alive():
        began_s = time.monotonic()
        assert server.get("/v1/models")[0] == 200
        slowest_s = max(slowest_s, time.monotonic() - began_s)
    asking.join()
    assert answers[0][0] == 400
    assert answers[0][1]["error"]["code"] == "context_length_exceeded"
    assert slowest_s < 3.0


def test_connections_are_kept(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    for body in (b"{", b'{"prompt": "a", "max_tokens": 2}', b"[]"):
        connection.request("POST", "/v1/completions", body)
        answer = connection.getresponse()
        answer.read()
        assert answer.status in (200, 400)
        assert connection.sock is not None
    connection.close()
    assert "Traceback" not in server.log()
