"""Sessions on a running server: ten turns over both frontends and a restart, ends of every kind, keys, an end by force.

A connection stays with the frontend that accepted it; which one that is, the kernel's socket table tells.
"""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server import API_SERVER, Server, descendants, eventually, free_port, is_running, running_server

PATH = "/v1/chat/interactive"
BLOCK_TOKENS = 16
QUESTIONS = [
    "Hello! My name is Ann and I live in Oslo.", "What is a river?", "Name three colours.", "And one more?",
    "What do cats eat?", "Where do I live?", "Say something about snow.", "Why?", "Tell me a fact about the moon.",
    "What did we talk about?",
]  # fmt: skip
EXACT = {"request_output_len": 16, "temperature": 0.8, "top_k": 40, "top_p": 0.95, "seed": 7}
LONG = {"ignore_eos": True, "request_output_len": 4000, "prompt": "Tell me a very long story."}


class Frontend:
    """A connection to one frontend process."""

    def __init__(self, server: Server, key: str = "") -> None:
        self.key = key
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        self.call("GET", "/health")
        self.pid = _worker_of(server, self._connection.sock.getsockname()[1])

    def call(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, Any]:
        """Status and decoded body."""
        answer = self.send(method, path, body, **headers)
        text = answer.read().decode()
        return answer.status, json.loads(text) if text.startswith("{") else text

    def send(self, method: str, path: str, body: object = None, **headers: str) -> http.client.HTTPResponse:
        """The answer, unread."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.key:
            named["Authorization"] = f"Bearer {self.key}"
        raw = None if body is None else json.dumps(body)
        self._connection.request(method, path, raw, {"Content-Type": "application/json", **named})
        return self._connection.getresponse()

    def turn(self, prompt: object, session: int, **fields: Any) -> Any:
        """A turn that must succeed."""
        body = {"prompt": prompt, "session_id": session, "interactive_mode": True, **EXACT, **fields}
        status, answer = self.call("POST", PATH, body)
        assert status == 200, answer
        return answer

    def session(self, session: int) -> Any:
        """What /v1/sessions tells."""
        status, answer = self.call("GET", f"/v1/sessions/{session}")
        assert status == 200, answer
        return answer

    def close(self) -> None:
        """Hangs up."""
        self._connection.close()


def both_frontends(server: Server, key: str = "") -> tuple[Frontend, Frontend]:
    """A connection to each; new ones are opened until the second process has accepted one."""
    first = Frontend(server, key)
    for _ in range(500):
        other = Frontend(server, key)
        if other.pid != first.pid:
            return first, other
        other.close()
    pytest.fail("one frontend took 500 connections")


def _worker_of(server: Server, client_port: int) -> int:
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    local, remote = f":{server.port:04X}", f":{client_port:04X}"
    inode = next(row[9] for row in rows if row[1].endswith(local) and row[2].endswith(remote))
    for pid in server.children()["gunicorn"][1:]:
        with contextlib.suppress(FileNotFoundError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if os.readlink(descriptor) == f"socket:[{inode}]":
                        return pid
    raise AssertionError("no frontend has accepted this connection")


@contextlib.contextmanager
def running_turn(frontend: Frontend, session: int, **fields: Any) -> Iterator[http.client.HTTPResponse]:
    """A long streamed turn that has begun to answer."""
    body = {"session_id": session, "interactive_mode": True, "stream": True, **LONG, **fields}
    answer = frontend.send("POST", PATH, body, X_Request_Id=f"long-{session}")
    assert answer.status == 200, answer.read()
    assert json.loads(answer.readline())["finish_reason"] is None
    yield answer


def kill_everything(server: Server) -> None:
    """At once, as a power cut does."""
    pids = [server.pid, *descendants(server.pid)]
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    server.process.wait()
    eventually(lambda: not any(map(is_running, pids)), 30)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(f"--data_dir={tmp_path_factory.mktemp('data')}") as running:
        yield running


def test_ten_turns_through_both_frontends_and_across_an_end_by_force(tmp_path: Path) -> None:
    args = (f"--data_dir={tmp_path}", "--frontends=2")
    with running_server(*args) as before:
        frontends = both_frontends(before)
        answers = [frontends[number % 2].turn(QUESTIONS[number], session=1) for number in range(5)]
        with running_turn(frontends[1], session=1):
            kill_everything(before)
    with running_server(*args) as after:
        frontends = both_frontends(after)
        kept = [each["content"] for each in frontends[0].session(1)["messages"]]
        assert kept == [
            text for pair in zip(QUESTIONS, answers, strict=False) for text in (pair[0], pair[1]["text"])
        ]
        answers += [frontends[number % 2].turn(QUESTIONS[number], session=1) for number in range(5, 10)]
        _check_counts(answers, restarted_at=5)
        undisturbed = [frontends[0].turn(question, session=2) for question in QUESTIONS]
        assert [each["text"] for each in undisturbed] == [each["text"] for each in answers]
        _check_counts(undisturbed, restarted_at=0)
        assert frontends[1].session(1)["turns"] == 10


def _check_counts(answers: list[Any], restarted_at: int) -> None:
    """The history is all that came before, and comes from the cache but for its last, unfilled block."""
    history = 0
    for number, answer in enumerate(answers):
        assert answer["history_tokens"] == history, number
        if number != restarted_at:
            assert answer["cached_tokens"] >= (history - 1) // BLOCK_TOKENS * BLOCK_TOKENS, number
        assert answer["tokens"] > 0
        history += answer["input_tokens"] + answer["tokens"]


def test_one_turn_at_a_time_until_it_is_cancelled_from_the_other_frontend(server: Server) -> None:
    first, other = both_frontends(server)
    with running_turn(first, session=11) as answer:
        body = {"prompt": "Second.", "session_id": 11, "interactive_mode": True}
        status, refused = other.call("POST", PATH, body)
        assert (status, refused["error"]["code"]) == (409, "session_busy")
        assert "long-11" in refused["error"]["message"]
        assert other.call("DELETE", "/v1/sessions/11")[0] == 409
        status, cancelled = other.call("POST", PATH, {"session_id": 11, "cancel": True})
        assert (status, cancelled["finish_reason"]) == (200, "stop")
        *_, last = [json.loads(line) for line in answer.read().decode().splitlines()]
        assert last["finish_reason"] == "cancelled"
        assert 0 < last["tokens"] < 4000
    _, partial = other.session(11)["messages"]
    assert partial["mark"] == "cancelled"
    following = other.turn("Go on.", session=11)
    assert following["history_tokens"] == last["input_tokens"] + last["tokens"]


def test_a_session_is_free_at_once_when_its_frontend_is_killed(server: Server) -> None:
    first, other = both_frontends(server)
    other.turn("Hello.", session=12)
    with running_turn(first, session=12):
        os.kill(first.pid, signal.SIGKILL)
        eventually(lambda: not is_running(first.pid), 30)
        began_s = time.monotonic()
        other.turn("Are you there?", session=12)
        assert time.monotonic() - began_s < 20, "it waited for the lease to expire"
    said = [each["content"] for each in other.session(12)["messages"][::2]]
    assert said == ["Hello.", "Are you there?"]
    eventually(lambda: len(server.children()["gunicorn"]) == 3, 30)


def test_who_hangs_up_on_a_stream_finds_what_he_saw(server: Server) -> None:
    first, other = both_frontends(server)
    with running_turn(first, session=13):
        first.close()
    following = other.turn("Go on.", session=13)
    _, partial, _, answer = other.session(13)["messages"]
    assert partial["mark"] == "disconnected"
    assert answer["content"] == following["text"]


def test_a_retry_is_no_second_turn_though_the_first_reached_another_frontend(server: Server) -> None:
    first, other = both_frontends(server)
    body = {"prompt": "Say hello.", "session_id": 14, "interactive_mode": True, **EXACT}
    answers = [each.call("POST", PATH, body, X_Request_Id="once-14") for each in (first, other)]
    assert answers[0] == answers[1]
    assert answers[0][0] == 200
    assert other.session(14)["turns"] == 1


def test_a_crowd_at_one_session_gets_in_one_by_one(server: Server) -> None:
    results: list[tuple[int, Any]] = []

    def ask(number: int) -> None:
        body = {"prompt": f"Turn {number}.", "session_id": 15, "interactive_mode": True, **EXACT}
        results.append(Frontend(server).call("POST", PATH, body))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    served = [answer for status, answer in results if status == 200]
    assert {status for status, _ in results} == {200, 409}
    kept = Frontend(server).session(15)
    assert kept["turns"] == len(served)
    assert sorted(each["text"] for each in served) == sorted(m["content"] for m in kept["messages"][1::2])


def test_two_keys_have_a_session_1_each(tmp_path: Path) -> None:
    env = {"SHOAL_API_KEYS": "key-of-ann-0123456789 key-of-ben-0123456789"}
    with running_server(f"--data_dir={tmp_path}", env=env) as guarded:
        ann = both_frontends(guarded, "key-of-ann-0123456789")[0]
        ben = both_frontends(guarded, "key-of-ben-0123456789")[1]
        ann.turn("I am Ann.", session=1)
        assert ben.call("GET", "/v1/sessions/1")[0] == 404
        assert ben.turn("I am Ben.", session=1)["history_tokens"] == 0
        with running_turn(ann, session=1):
            assert (
                ben.call("POST", PATH, {"session_id": 1, "cancel": True})[1]["detail"]
                == "no answer was running"
            )
            assert ben.turn("Still here.", session=1)["history_tokens"] > 0
            ann.close()
        assert ben.call("DELETE", "/v1/sessions")[1]["deleted"] == 1
        assert both_frontends(guarded, ann.key)[0].session(1)["messages"][0]["content"] == "I am Ann."


def test_a_session_ends_with_reason_length_when_it_is_full(tmp_path: Path) -> None:
    with running_server(f"--data_dir={tmp_path}", "--session_len=160") as small:
        frontend = Frontend(small)
        answers = [frontend.turn("Tell me more, please.", session=1, seed=1)]
        while answers[-1]["tokens"]:
            answers.append(frontend.turn("Tell me more, please.", session=1))
        full = answers[-1]
        assert (full["text"], full["finish_reason"]) == ("", "length")
        assert full["history_tokens"] + full["input_tokens"] + EXACT["request_output_len"] > 160
        assert "--session_len" in full["detail"]
        turns = frontend.session(1)["turns"]
        assert turns == len(answers) - 1 >= 2
        body = {"prompt": "Bye.", "session_id": 1, "request_output_len": 512}
        answer = frontend.send("POST", PATH, body)
        assert (answer.status, answer.headers["X-Session-State"]) == (200, "full")
        answer.read()
        assert frontend.call("GET", "/v1/sessions/1")[0] == 404, "interactive_mode false ended it"
        assert frontend.turn("Hello again.", session=1)["history_tokens"] == 0


def test_a_store_that_is_something_else_stops_the_start(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("remember the milk; and that this is no database\n")
    command = [*API_SERVER, f"--server_port={free_port()}", f"--data_dir={tmp_path}", f"--session_store={path}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert str(path) in last
    assert "--session_store" in last
    assert path.read_text().startswith("remember the milk")
