"""The commands as a person types them: one line a mistake, exit code 2, never a trace."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import models
import pytest

from shoal import __version__

ROOT = models.ROOT
API_SERVER = ROOT / "bin" / "api_server"


def run(*command: str, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=os.environ | (env or {})
    )


def shoal(*args: str) -> "subprocess.CompletedProcess[str]":
    return run(sys.executable, "-m", "shoal.cli", *args)


def api_server(*args: str) -> "subprocess.CompletedProcess[str]":
    return run(sys.executable, str(API_SERVER), *args)


MISTAKES = [
    (["--quant_policy", "4"], "error: --quant_policy 4: not available yet"),
    (["--server_port", "70000"], "error: --server_port 70000: must be a whole number from 1 to 65535"),
    (["--serverport", "1"], "error: --serverport: unknown flag; did you mean --server_port?"),
    (["--trust_remote_code"], "error: --trust_remote_code: refused"),
    (["/no/such/model"], "error: '/no/such/model': no such file or folder"),
    (["--config", "/no/such/file"], "error: --config /no/such/file: No such file or directory"),
]


@pytest.mark.parametrize(("args", "line"), MISTAKES)
def test_mistakes_of_api_server(args: list[str], line: str) -> None:
    ended = api_server(*args)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith(line)


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ([], "error: a command is missing"),
        (["serve"], "error: serve what?"),
        (["serve", "api_client", "--session_id", "x"], "error: --session-id: x: must be a whole number"),
        (["serve", "gradio", "--server_port", "x"], "error: --server-port: x: must be a whole number"),
        (["serve", "pigeons"], "error: serve pigeons: unknown command"),
        (["fly"], "error: fly: unknown command"),
        (["serve", "api_server", "--tp", "0"], "error: --tp 0: must be a whole number from 1 to 64"),
    ],
)
def test_mistakes_of_shoal(args: list[str], line: str) -> None:
    ended = shoal(*args)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith(line)


def test_version_and_help() -> None:
    assert shoal("--version").stdout == f"shoal {__version__}\n"
    assert api_server("--version").stdout == f"shoal {__version__}\n"
    assert "serve api_server" in shoal("--help").stdout
    shown = shoal("serve", "api_server", "--help")
    assert shown.returncode == 0
    assert shown.stdout == api_server("--help").stdout
    assert "--cache_max_entry_count" in shown.stdout


def test_console_script_is_installed() -> None:
    script = Path(sys.executable).parent / "shoal"
    if not script.exists():
        pytest.skip("shoal is not installed beside this interpreter")
    assert run(str(script), "--version").stdout == f"shoal {__version__}\n"


def test_a_truncated_model_is_one_line(tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    with models.default_model_path().open("rb") as whole:
        cut.write_bytes(whole.read(50_000))
    ended = api_server(str(cut))
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert "cut.gguf" in ended.stderr


def bare_python() -> str:
    """An interpreter that does not see the environment of the tests."""
    return str(Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}")


def test_api_server_finds_the_environment_of_its_checkout(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    script = str(shutil.copy(API_SERVER, tmp_path / "bin"))
    without = run(bare_python(), "-I", script, "--version")
    assert without.returncode == 1
    assert without.stderr == "error: Shoal is not installed: run `make serve` once\n"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    found = run(bare_python(), "-I", script, "--version")
    assert found.stdout == f"shoal {__version__}\n"
