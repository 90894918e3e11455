"""``bin/webui`` as a process: how it ends, and what it says before it serves."""

import signal
import socket
import subprocess
import sys

import pytest
from client_kit import Answer, scripted_server
from server import ROOT, free_port

pytest.importorskip("gradio", reason="needs gradio: pip install 'shoal[webui]'")

WEBUI = (sys.executable, str(ROOT / "bin" / "webui"))
ONE_MODEL = Answer(json={"data": [{"id": "tiny"}]})


def failure(*args: str) -> tuple[int, str]:
    ended = subprocess.run([*WEBUI, *args], capture_output=True, text=True, timeout=120, check=False)
    return ended.returncode, ended.stderr


def test_a_taken_port() -> None:
    with scripted_server() as server, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server.always = lambda asked: ONE_MODEL
        code, said = failure(server.url, "--server_name=127.0.0.1", f"--server_port={taken.getsockname()[1]}")
    assert code == 1
    assert said.startswith("error: ")
    assert "Traceback" not in said


def test_no_server_and_no_model() -> None:
    assert failure(f"http://127.0.0.1:{free_port()}")[1].startswith("error: cannot reach http://127.0.0.1:")
    with scripted_server() as server:
        server.always = lambda asked: Answer(json={"data": []})
        assert failure(server.url) == (1, f"error: {server.url} serves no model\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_when_told_to(number: signal.Signals) -> None:
    with scripted_server() as server:
        server.always = lambda asked: ONE_MODEL
        process = subprocess.Popen(
            [*WEBUI, server.url, "--server_name=0.0.0.0", f"--server_port={free_port()}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline().startswith("the page is at http://")
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said == "warning: whoever reaches this page can use the server; set --login\n"
