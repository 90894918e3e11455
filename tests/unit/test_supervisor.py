"""The supervisor's parts: run directory, pid file, console and texts."""

import io
import os
from pathlib import Path

import pytest

from shoal.config import Settings
from shoal.errors import FlagError
from shoal.messages import Limits, RankStatus, Stats
from shoal.supervisor import report
from shoal.supervisor.background import PidFile
from shoal.supervisor.console import Console
from shoal.supervisor.run_dir import run_dir


def test_run_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    stranger = tmp_path / "shoal-notes"
    stranger.mkdir()
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / "lock").touch()
    (tmp_path / "shoal-link").symlink_to(target)
    with run_dir() as first:
        assert first.parent == tmp_path
        assert first.stat().st_mode & 0o777 == 0o700
        with run_dir() as second:
            assert second != first
            assert first.exists()
        assert not second.exists()
        abandoned = tmp_path / "shoal-dead"
        abandoned.mkdir()
        (abandoned / "lock").touch()
        with run_dir():
            assert not abandoned.exists()
            assert first.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "shoal-link", "shoal-notes"]


@pytest.mark.parametrize("base", ["", "relative", "/no/such/folder", "/" + "long/" * 20])
def test_run_directory_where_the_runtime_directory_is_of_no_use(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", base)
    with run_dir() as path:
        assert path.parent == Path("/tmp")


def test_pid_file_of_a_dead_server_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    path.write_text("4194304 and more\n")
    held = PidFile(path)
    held.write()
    assert path.read_text() == f"{os.getpid()}\n"
    with pytest.raises(FlagError, match=f"process id {os.getpid()} is running"):
        PidFile(path)
    held.remove()
    assert not path.exists()
    with pytest.raises(FlagError, match="--pid_file"):
        PidFile(tmp_path / "no" / "pid")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_console_on_a_terminal() -> None:
    log, terminal, out = io.BytesIO(), Terminal(), io.StringIO()
    console = Console(log, terminal, out)
    console.progress("loading", 1, 4)
    assert terminal.getvalue().endswith("loading [########......................]  25%")
    console.relay(b"a line\n")
    assert terminal.getvalue().endswith("\r\x1b[K")
    assert log.getvalue() == b"a line\n"
    console.progress("waiting", 0, 0)
    console.failed("it broke")
    assert terminal.getvalue().endswith("waiting \r\x1b[Kerror: it broke\n")


def test_console_elsewhere_says_each_phase_once() -> None:
    log, err, out = io.BytesIO(), io.StringIO(), io.StringIO()
    console = Console(log, err, out)
    for phase, done in [("one", 0), ("one", 1), ("two", 0), ("two", 2)]:
        console.progress(phase, done, 2)
    console.ready("go\n")
    assert err.getvalue() == "one\ntwo\n"
    assert out.getvalue() == "go\n"


def test_a_cause_that_was_just_shown_is_not_shown_twice() -> None:
    err = io.StringIO()
    console = Console(io.BytesIO(), err, io.StringIO())
    console.relay(b"error: no model\n")
    console.failed("no model")
    assert err.getvalue() == ""
    console.relay(b"something else\n")
    console.failed("no model")
    assert err.getvalue() == "error: no model\n"


def stats(*ranks: RankStatus) -> Stats:
    return Stats(0, False, False, ranks, None, 0, 0, {}, {}, {})


def test_the_slowest_rank_says_how_far_the_start_is() -> None:
    assert report.phase(None) == ("starting the processes", 0, 0)
    ready, behind = RankStatus(0, 1, "ready"), RankStatus(1, 2, "loading", 3, 9)
    assert report.phase(stats(ready, behind)) == ("loading the weights", 3, 9)
    both = RankStatus(0, 1, "loading", 2, 9)
    assert report.phase(stats(both, behind)) == ("loading the weights", 5, 18)
    assert report.phase(stats(ready, RankStatus(1, 0, "absent")))[0] == "starting the processes"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("127.0.0.1", "http://127.0.0.1:23333"),
        ("0.0.0.0", "http://127.0.0.1:23333"),
        ("::", "http://[::1]:23333"),
        ("models.example.org", "http://models.example.org:23333"),
    ],
)
def test_url(name: str, expected: str) -> None:
    assert report.url(Settings(model="m", model_name="n", run_dir="/r", server_name=name)) == expected


def test_how_many_sequences_fit() -> None:
    settings = Settings(model="m", model_name="n", run_dir="/r", instance_num=8, session_len=300)
    assert "8 at once; 5 fit" in report.ready(settings, Limits(300, 100, 16, 8))
    assert "8 at once; 8 fit" in report.ready(settings, Limits(300, 10_000, 16, 8))
