"""Mistakes on the command lines of the terminal client and the page: one line, and an exit code."""

import importlib.util

import pytest

from shoal.client.terminal import main as terminal
from shoal.client.webui import main as webui


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--session_id", "x"], "--session-id: x: must be a whole number, at least 0"),
        (["--temperature=-1"], "--temperature: -1: must be a number at least 0"),
        (["--top_p", "nan"], "--top-p: nan: must be a number above 0, at most 1"),
        (["--timeout", "inf"], "--timeout: inf: must be a number above 0"),
        (["--sesion-id", "3"], "unrecognized arguments: --sesion-id"),
    ],
)
def test_mistakes(args: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        terminal.run(["http://127.0.0.1:1", *args])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith(f"error: {line}")
    assert said.endswith("see api_client --help\n")
    assert said.count("\n") == 1


def test_an_address_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert terminal.run(["ftp://host"]) == 1
    assert capsys.readouterr().err.startswith("error: 'ftp://host' is no address of a server")


def test_the_page_without_gradio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert webui.run(["http://127.0.0.1:1"]) == 2
    assert capsys.readouterr().err == "error: the page needs gradio: pip install 'shoal[webui]'\n"


@pytest.mark.parametrize("login", ["ada", ":secret", "ada:"])
def test_a_login_that_is_none(login: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        webui.run(["--login", login])
    assert "must look like NAME:PASSWORD" in capsys.readouterr().err
