"""Who may import whom (docs/design.md), read from the sources with ast; nothing is imported here."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[2] / "src"
FILES = sorted(SRC.rglob("*.py"))

SHARED = {"messages", "wire", "config", "transport", "errors", "logs", "checkpoint", "process"}
"""What the three kinds of processes have in common."""

MAY_IMPORT = {
    "frontend": SHARED | {"access", "frontend", "grammar_tokens", "storage", "tokenizer"},
    "batches": SHARED | {"frontend", "storage"},
    "storage": {"storage", "errors"},
    "scheduler": SHARED | {"scheduler"},
    "workers": SHARED | {"workers", "cuda_ext", "tokenizer", "grammar_tokens"},
    "cuda_ext": {"cuda_ext", "errors", "logs"},
    "checkpoint": {"checkpoint", "errors"},
    "tokenizer": {"tokenizer", "checkpoint", "errors"},
    "grammar_tokens": {"tokenizer", "errors"},
    "client": {"client"},
    "supervisor": SHARED | {"access", "supervisor", "launch"},
    "launch": {"access", "checkpoint", "command_line", "process", "config", "errors"},
    "access": {"config", "errors"},
    "command_line": {"flags", "errors"},
    "cli": {"launch", "supervisor", "client", "errors"},
    "messages": set(),
    "wire": {"messages"},
    "transport": set(),
    "config": set(),
    "errors": set(),
    "logs": set(),
    "process": set(),
    "flags": set(),
}

ONLY_IN = {
    "torch": re.compile(r"(workers|cuda_ext)/"),
    "falcon": re.compile(r"frontend/"),
    "zmq": re.compile(r"transport\.py|[a-z_]+/(link|[a-z_]+_link|gateway|crew)\.py"),
    "gunicorn": re.compile(r"frontend/"),
    "numpy": re.compile(r"(workers|cuda_ext|checkpoint|tokenizer|frontend)/"),
}

NEVER = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "transformers", "src"}


def imported_modules(path: Path) -> Iterator[str]:
    """Dotted names of every import statement of a file, also of those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write shoal.…"
            module = node.module or ""
            if module == "shoal":
                yield from (f"shoal.{alias.name}" for alias in node.names)
            else:
                yield module


def part_of(path: Path) -> str:
    """The folder or the module directly under src/."""
    relative = path.relative_to(SRC)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def test_no_hot_path_goes_through_torchs_dispatcher() -> None:
    dispatching = {"shoal.cuda_ext.registration", "shoal.cuda_ext.cuda_registration"}
    importers = [path.stem for path in FILES if dispatching & set(imported_modules(path))]
    assert importers == ["cuda_registration"], "which takes the other's kind of table"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_a_file_imports_only_what_its_part_may(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        assert not list(imported_modules(path)), "the package itself imports nothing"
        return
    assert part in MAY_IMPORT, f"{part} is new: say in MAY_IMPORT what it may import"
    ours = {name.split(".")[1] for name in imported_modules(path) if name.startswith("shoal.")}
    assert ours - {"__version__"} <= MAY_IMPORT[part]


@pytest.mark.parametrize("package", sorted(ONLY_IN))
def test_a_package_stays_in_its_place(package: str) -> None:
    users = {
        path.relative_to(SRC).as_posix()
        for path in FILES
        if any(name.split(".")[0] == package for name in imported_modules(path))
    }
    assert [user for user in sorted(users) if not ONLY_IN[package].match(user)] == []


def test_nobody_imports_what_is_banned() -> None:
    banned = [
        (path.relative_to(SRC).as_posix(), name)
        for path in FILES
        for name in imported_modules(path)
        if name.split(".")[0] in NEVER
    ]
    assert banned == []


def test_nobody_runs_text_as_code() -> None:
    calls = [
        (path.relative_to(SRC).as_posix(), node.lineno, node.func.id)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in {"eval", "exec", "compile", "__import__"}
    ]
    assert calls == []


def test_nobody_unpickles_with_torch_or_numpy() -> None:
    calls = [
        (path.relative_to(SRC).as_posix(), node.lineno)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and (node.func.value.id, node.func.attr) in {("torch", "load"), ("np", "load"), ("numpy", "load")}
    ]
    assert calls == []
