"""The documents' commands, run as they stand: docs/api.md and README.md.

A block fenced ``bash`` is run, in the order of the page and in one shell; every curl in it must get a 2xx. One fenced
``bash refused`` shows an error: its curl must get a 4xx. The block that follows one of these, ``json`` or ``text``, is
what it answers, shortened: every name and every kind of value in it must be in the real answer. Other blocks are text.
"""

import itertools
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from server import ROOT, Server, needed_program, running_server

API_PAGE = ROOT / "docs" / "api.md"
README = ROOT / "README.md"
PORT, EMBED_PORT = "23333", "23334"
"""As the pages have them: of the chat model, and of the server with ``--task embed``."""
_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^ *```$", re.DOTALL | re.MULTILINE)
_BLOCK_TIMEOUT_S = 120
_PREAMBLE = """
set -E -o pipefail
trap 'failed=1' ERR
curl() { command curl --fail-with-body -sS -m 60 -w '%{stderr}HTTP %{http_code}\\n' "$@"; }
"""


@dataclass(frozen=True)
class Block:
    """A fenced block and what follows it."""

    line: int
    info: str
    body: str
    shown: "Block | None"


class Shell:
    """One bash for a page, so that a block has the variables of those before it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count()
        self._process = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1,
        )  # fmt: skip
        self._tell(_PREAMBLE)

    def run(self, script: str) -> tuple[bool, str, str]:
        """Whether every command succeeded; standard output and error."""
        files = [self._folder / f".block-{next(self._numbers)}" for _ in range(3)]
        files[0].write_text(script)
        script_file, output, error = map(str, files)
        self._tell(f"failed=0; . {script_file} >{output} 2>{error} </dev/null; echo $failed\n")
        assert self._process.stdout is not None
        succeeded = self._process.stdout.readline().strip() == "0"
        return succeeded, Path(output).read_text(), Path(error).read_text()

    def end(self) -> None:
        """Closes it."""
        self._process.communicate(timeout=_BLOCK_TIMEOUT_S)

    def _tell(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(f"--data_dir={tmp_path_factory.mktemp('data')}") as running:
        yield running


@pytest.fixture(scope="module")
def embed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data_dir = tmp_path_factory.mktemp("embed-data")
    with running_server("--task", "embed", "--session_len=1024", f"--data_dir={data_dir}") as running:
        yield running


def blocks_of(page: Path) -> list[Block]:
    """Every fenced block, in order."""
    text = page.read_text()
    matches = list(_FENCE.finditer(text))
    found: list[Block] = []
    shown: Block | None = None
    for match in reversed(matches):
        line = text.count("\n", 0, match.start()) + 1
        body = textwrap.dedent(match["body"])
        block = Block(line, match["info"].strip(), body, shown if match["info"].startswith("bash") else None)
        shown = block if block.info in ("json", "text") else None
        found.append(block)
    return found[::-1]


# --- what must be on the pages ---------------------------------------------------------------------------


def test_the_page_has_every_route(server: Server) -> None:
    page = API_PAGE.read_text()
    status, text = server.get("/openapi.json")
    assert status == 200
    described = [(method.upper(), path) for path, item in json.loads(text)["paths"].items() for method in item]
    assert len(described) > 30
    missing = [f"{method} {path}" for method, path in described if f"`{method} {path}`" not in page]
    assert not missing, "docs/api.md lacks " + ", ".join(missing)


def test_the_page_has_no_route_that_is_gone(server: Server) -> None:
    paths = json.loads(server.get("/openapi.json")[1])["paths"]
    named = set(re.findall(r"`(GET|POST|DELETE) (/[^`\s?]*)`", API_PAGE.read_text()))
    pages = {"/", "/docs", "/redoc", "/ui", "/openapi.json"}
    gone = [
        f"{method} {path}"
        for method, path in sorted(named)
        if path not in pages and method.lower() not in paths.get(path, {})
    ]
    assert not gone, "docs/api.md has " + ", ".join(gone)


def test_the_field_tables_are_complete(server: Server) -> None:
    """A request's field that the page does not have is one that nobody finds."""
    document = json.loads(server.get("/openapi.json")[1])
    page = API_PAGE.read_text()
    shown: dict[str, set[str]] = {}
    for names, table in re.findall(r"<!-- fields: ([\w ]+) -->\n(.*?)<!-- end -->", page, re.DOTALL):
        for name in names.split():
            shown.setdefault(name, set()).update(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))
    assert {"ChatCompletionRequest", "CompletionRequest", "ResponsesRequest", "GenerateRequest"} <= shown.keys()
    for name, fields in shown.items():
        known = document["components"]["schemas"][name]["properties"].keys()
        assert not known - fields, f"{name}: docs/api.md lacks {sorted(known - fields)}"
        assert not fields - known, (
            f"{name}: docs/api.md has {sorted(fields - known)}, which the server does not know"
        )


def test_links_lead_somewhere() -> None:
    for page in (README, *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#\s]+)[^)\s]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


# --- the commands ----------------------------------------------------------------------------------------


def test_the_commands_of_the_page(server: Server, embed_server: Server, tmp_path: Path) -> None:
    ports = {PORT: str(server.port), EMBED_PORT: str(embed_server.port)}
    assert run_page(API_PAGE, ports, tmp_path) > 40


def test_the_commands_of_the_readme(tmp_path: Path) -> None:
    with running_server(f"--data_dir={tmp_path / 'data'}") as server:
        assert run_page(README, {PORT: str(server.port)}, tmp_path) >= 2


def run_page(page: Path, ports: dict[str, str], folder: Path) -> int:
    """Runs every block of a page; returns how many there were."""
    needed_program("curl")
    shell = Shell(folder)
    ran = 0
    for block in blocks_of(page):
        where = f"{page.relative_to(ROOT)}, line {block.line}"
        script = re.sub(rf"\b({'|'.join(ports)})\b", lambda match: ports[match[1]], block.body)
        if block.info.startswith("bash"):
            check_commands(shell, block, script, where)
        elif block.info == "python":
            done = subprocess.run(
                [sys.executable, "-c", script],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=_BLOCK_TIMEOUT_S,
            )
            assert done.returncode == 0, f"{where}:\n{done.stderr}"
            assert done.stdout.strip(), f"{where} prints nothing"
        else:
            continue
        ran += 1
    shell.end()
    return ran


def check_commands(shell: Shell, block: Block, script: str, where: str) -> None:
    """Runs one block and compares what it answers with what the page shows."""
    succeeded, output, error = shell.run(script)
    statuses = re.findall(r"^HTTP (\d+)$", error, re.MULTILINE)
    report = f"{where}:\n{script}\n{output}\n{error}"
    if block.info == "bash refused":
        assert not succeeded, f"not refused: {report}"
        assert [status[0] for status in statuses] == ["4"], report
    else:
        assert succeeded, report
        assert all(status[0] == "2" for status in statuses), report
    if block.shown is None:
        return
    if block.shown.info == "json":
        check_shape(json.loads(block.shown.body), json.loads(output), where)
    else:
        check_lines(block.shown.body, output, where)


def check_shape(shown: Any, real: Any, where: str) -> None:
    """All that is shown is there, of the same kind; a text may be shortened, and a list too."""
    kinds = (int, float) if isinstance(shown, int | float) and not isinstance(shown, bool) else type(shown)
    assert isinstance(real, kinds), f"{where}: the page shows {shown!r}, the server answers {real!r}"
    if isinstance(shown, dict):
        for name, value in shown.items():
            assert name in real, f"{where}: the page shows {name!r}, the server answers {sorted(real)}"
            check_shape(value, real[name], f"{where}, {name}")
    elif isinstance(shown, list):
        assert len(shown) <= len(real), f"{where}: the page shows more than the server answers: {real!r}"
        for place, (value, other) in enumerate(zip(shown, real, strict=False)):
            check_shape(value, other, f"{where}, {place}")


def check_lines(shown: str, output: str, where: str) -> None:
    """Lines of a stream, of metrics, of headers: each begins like one that came, JSON has the shape of one."""
    real = [line.strip() for line in output.splitlines()]
    for line in filter(None, map(str.strip, shown.splitlines())):
        if line == "…":
            continue
        start, brace, rest = line.partition("{")
        if brace and rest.endswith("}") and start in ("", "data: "):
            candidates = [other.removeprefix(start) for other in real if other.startswith(start + "{")]
            assert any(_has_shape(line.removeprefix(start), other) for other in candidates), (
                f"{where}: {line}\n{output}"
            )
        else:
            word = line.split(maxsplit=1)[0].split("{")[0]
            assert any(other.lower().startswith(word.lower()) for other in real), (
                f"{where}: no {word}\n{output}"
            )


def _has_shape(shown: str, real: str) -> bool:
    try:
        check_shape(json.loads(shown), json.loads(real), "")
    except AssertionError:
        return False
    return True
