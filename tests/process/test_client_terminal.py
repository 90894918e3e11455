"""``bin/api_client`` in a real pseudo-terminal and in a pipe, with a scripted server behind it."""

import json
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from client_kit import Answer, Asked, ScriptedServer, ndjson, said, scripted_server
from terminal_kit import ROOT, Terminal

API_CLIENT = str(ROOT / "bin" / "api_client")
MODELS = {"object": "list", "data": [{"id": "tiny"}, {"id": "other"}]}
CODE = "Here it is:\n\n```python\ndef add(a, b):\n    return a + b\n```\n\nIt *adds* `vector<int>`.\n"


class Chat:
    """What the server does: each turn takes the next of ``replies``, pieces of text."""

    def __init__(self) -> None:
        self.replies: list[list[str | Callable[[], None]]] = []
        self.turns: list[dict[str, Any]] = []
        self.ended: list[int] = []
        self.cancelled = threading.Event()
        self.known: dict[str, Any] = {}

    def answer(self, asked: Asked) -> Answer:
        if asked.path == "/v1/models":
            return Answer(json=MODELS)
        if asked.path.startswith("/v1/sessions/"):
            known = self.known.get(asked.path.rpartition("/")[2])
            return Answer(json=known) if known else Answer(json={"message": "no such session"}, status=404)
        if asked.body.get("cancel"):
            self.cancelled.set()
            return Answer(json=said("", 0, "stop"))
        if asked.body.get("request_output_len") == 0:
            self.ended.append(asked.body["session_id"])
            return Answer(json=said("", 0, "stop"))
        self.turns.append(asked.body)
        return Answer(pieces=list(self._lines(self.replies.pop(0))))

    def _lines(self, reply: "list[str | Callable[[], None]]") -> "Iterator[bytes | Callable[[], None]]":
        for count, piece in enumerate(reply, 1):
            yield piece if callable(piece) else ndjson(said(piece, count))[0]
        yield ndjson(said("", len(reply), "stop", history_tokens=7))[0]


@pytest.fixture
def chat() -> Chat:
    return Chat()


@pytest.fixture
def server(chat: Chat) -> Iterator[ScriptedServer]:
    with scripted_server() as scripted:
        scripted.always = chat.answer
        yield scripted


@pytest.fixture
def terminal(server: ScriptedServer, tmp_path: Path) -> Iterator[Terminal]:
    with Terminal(API_CLIENT, server.url, "--session_id=5", state=tmp_path) as started:
        yield started


def test_a_conversation(terminal: Terminal, chat: Chat, tmp_path: Path) -> None:
    chat.replies = [[CODE[:30], CODE[30:]], ["Sure."]]
    terminal.say("Write add")
    terminal.wait_for(r"It adds vector<int>\.")
    terminal.say("Thanks")
    terminal.wait_for(r"Sure\.")
    terminal.wait_prompt()
    assert [turn["prompt"] for turn in chat.turns] == ["Write add", "Thanks"]
    assert all(turn["interactive_mode"] and turn["session_id"] == 5 for turn in chat.turns)
    assert terminal.text().count("def add(a, b):") == 1, "drawn again and again, left standing once"
    assert "```" not in terminal.text()
    terminal.type("/stats\r")
    terminal.wait_for(
        r"session 5, 4 messages, tiny\nhistory 7 tokens, turn 5, answer 1 \(stop\)\nfirst text after"
    )
    terminal.say("exit")
    assert terminal.wait_end() == 0
    assert chat.ended == [5]
    history = tmp_path / "shoal" / "api_client_history"
    assert "+Write add" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_control_c_stops_the_answer_and_not_the_program(terminal: Terminal, chat: Chat) -> None:
    stuck = threading.Event()
    chat.replies = [["Once upon ", lambda: stuck.wait(30) and None], ["Yes."]]
    terminal.say("A long story")
    terminal.wait_for("Once upon")
    terminal.type("\x03")
    terminal.wait_for("stopped")
    assert chat.cancelled.is_set()
    stuck.set()
    terminal.say("Still there?")
    terminal.wait_for(r"Yes\.")
    terminal.wait_prompt()
    terminal.type("half a li\x03")
    terminal.wait_for("ctrl-D leaves")
    terminal.wait_prompt()
    terminal.type("\x04")
    terminal.wait_for("--session-id 5 continues it")
    assert terminal.wait_end() == 0
    assert chat.ended == []


def test_several_lines(terminal: Terminal, chat: Chat) -> None:
    chat.replies = [["ok."], ["fine."]]
    terminal.wait_prompt()
    terminal.type("one\\\rtwo\x1b\rthree\r")
    terminal.wait_for(r"ok\.")
    terminal.wait_prompt()
    terminal.type("\x1b[200~def f():\n    return 1\n\x1b[201~\r")
    terminal.wait_for(r"fine\.")
    assert [turn["prompt"] for turn in chat.turns] == ["one\ntwo\nthree", "def f():\n    return 1"]


def test_commands(terminal: Terminal, chat: Chat, tmp_path: Path) -> None:
    chat.replies = [["Arr."], ["Paths."]]
    terminal.say("/help")
    terminal.wait_for("writes the conversation")
    terminal.say("/stats")
    terminal.wait_for("nothing has been answered")
    terminal.say("/model")
    terminal.wait_for(r"\* tiny\n  other")
    terminal.say("/model none-such")
    terminal.wait_for("none-such is not served; there is tiny, other")
    terminal.say("/model other")
    terminal.wait_for("other answers from now on")
    terminal.say("/system Be a pirate.")
    terminal.wait_for("with this system text")
    terminal.say("Hello")
    terminal.wait_for(r"Arr\.")
    terminal.say(f"/save {tmp_path / 'chat.md'}")
    terminal.wait_for("saved to")
    terminal.say(f"/save {tmp_path / 'chat.json'}")
    terminal.wait_for(r"saved to (.|\n)*saved to")
    terminal.say(f"/save {tmp_path / 'chat.md'}")
    terminal.wait_for("is there already")
    terminal.say("/dance")
    terminal.wait_for("there is no /dance")
    terminal.say("/etc/hosts is what?")
    terminal.wait_for(r"Paths\.")
    terminal.say("/reset")
    terminal.wait_for("a new conversation\n")
    assert chat.turns[0]["model"] == "other"
    assert chat.turns[0]["prompt"] == [
        {"role": "system", "content": "Be a pirate."},
        {"role": "user", "content": "Hello"},
    ]
    assert chat.turns[1]["prompt"] == "/etc/hosts is what?"
    assert chat.ended == [5, 5]
    written = "## system\n\nBe a pirate.\n\n## user\n\nHello\n\n## assistant\n\nArr.\n"
    assert (tmp_path / "chat.md").read_text() == written
    assert json.loads((tmp_path / "chat.json").read_text())["messages"][2]["content"] == "Arr."


def test_an_answer_longer_than_the_window(server: ScriptedServer, chat: Chat, tmp_path: Path) -> None:
    lines = [f"line {number} of the answer" for number in range(300)]
    chat.replies = [[f"{line}\n" for line in lines]]
    with Terminal(API_CLIENT, server.url, state=tmp_path, rows=12) as terminal:
        terminal.say("Go on and on")
        terminal.wait_for("line 299 of the answer")
        terminal.wait_prompt()
        shown = [line.strip() for line in terminal.text().splitlines() if "of the answer" in line]
    assert shown == lines


def test_what_a_model_writes_does_not_steer_the_terminal(terminal: Terminal, chat: Chat) -> None:
    chat.replies = [["\x1b]0;owned\x07\x1b[31mred\x9b2J end."]]
    terminal.say("Try it")
    terminal.wait_for(r"red2J end\.")
    assert "\x1b]0;owned" not in terminal.raw
    assert "\x9b" not in terminal.raw


def test_an_error_is_shown_and_the_program_goes_on(
    terminal: Terminal, chat: Chat, server: ScriptedServer
) -> None:
    terminal.wait_prompt()
    server.answers = [Answer(json={"error": {"message": "top_k: too much", "param": "top_k"}}, status=400)]
    terminal.type("Hello\r")
    terminal.wait_for("error: 400: top_k: too much")
    chat.replies = [["Better."]]
    terminal.say("Again")
    terminal.wait_for(r"Better\.")


def test_a_full_session_says_what_to_do(terminal: Terminal, server: ScriptedServer) -> None:
    terminal.wait_prompt()
    server.answers = [Answer(pieces=ndjson(said("", 0, "length")))]
    terminal.type("Hello\r")
    terminal.wait_for("/reset begins another")


def test_a_session_is_continued(server: ScriptedServer, chat: Chat, tmp_path: Path) -> None:
    chat.known["9"] = {"id": 9, "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}
    with Terminal(API_CLIENT, server.url, "--session-id", "9", state=tmp_path) as terminal:
        terminal.wait_for(r"tiny · session 9 \(continued, 1 messages\)")


def test_a_wrong_key_says_how_to_give_one(server: ScriptedServer, tmp_path: Path) -> None:
    server.answers = [Answer(json={"error": {"message": "missing or wrong API key"}}, status=401)]
    with Terminal(API_CLIENT, server.url, state=tmp_path) as terminal:
        terminal.wait_for(
            "error: 401: missing or wrong API key: start with --api-key KEY, or set SHOAL_API_KEY"
        )
        assert terminal.wait_end() == 1


# --- pipes -----------------------------------------------------------------------------------------------


def pipe(text: str, *args: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, API_CLIENT, *args]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)


def test_a_pipe_gets_raw_answers(server: ScriptedServer, chat: Chat) -> None:
    chat.replies = [["**bo", "ld**"], ["two"]]
    ended = pipe("first\n\nsecond \\\nline\n", server.url)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "**bold**\ntwo\n", "")
    assert [turn["prompt"] for turn in chat.turns] == ["first", "second \nline"]
    assert chat.ended == [chat.turns[0]["session_id"]], "nobody will continue what has no known number"


def test_a_pipe_keeps_a_session_that_has_a_number(server: ScriptedServer, chat: Chat) -> None:
    chat.replies = [["one"], ["two"]]
    assert pipe("a\n", server.url, "--session-id=4").returncode == 0
    assert chat.ended == []
    assert pipe("b\nend\n", server.url, "--session-id=4").returncode == 0
    assert chat.ended == [4]


def test_a_pipe_whose_turn_fails(server: ScriptedServer, chat: Chat) -> None:
    server.answers = [Answer(json=MODELS), Answer(json={"message": "no"}, status=400)]
    chat.replies = [["fine"]]
    ended = pipe("a\nb\n", server.url)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "fine\n", "error: 400: no\n")


def test_a_model_that_is_not_served(server: ScriptedServer) -> None:
    ended = pipe("a\n", server.url, "--model", "big")
    assert (ended.returncode, ended.stderr) == (
        1,
        "error: --model: 'big' is not served; there is tiny, other\n",
    )
