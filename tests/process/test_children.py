"""The supervisor's ``Child`` with real processes: what it relays, how it tells an end, when it starts again."""

import os
import selectors
import signal
import sys
import time
from pathlib import Path

from shoal.process import open_pidfd
from shoal.supervisor.children import Child, Death


def child(script: str, lines: list[bytes], cwd: Path) -> Child:
    return Child("child", [sys.executable, "-c", script], os.environ, cwd, lines.append)


def death_of(running: Child) -> Death:
    deadline_s = time.monotonic() + 10
    while True:
        with selectors.DefaultSelector() as selector:
            for descriptor in running.descriptors:
                selector.register(descriptor, selectors.EVENT_READ)
            selector.select(0.1)
        running.relay()
        death = running.reap()
        if death is not None:
            return death
        assert time.monotonic() < deadline_s


def test_a_childs_lines_and_its_cause(tmp_path: Path) -> None:
    lines: list[bytes] = []
    script = (
        "import sys, os\n"
        "print('one')\n"
        "sys.stdout.flush()\n"
        "sys.stderr.write('error: no such file\\nlast words')\n"
        "sys.stderr.flush()\n"
        "sys.exit(3)"
    )
    failing = child(script, lines, tmp_path)
    failing.start()
    death = death_of(failing)
    assert lines == [b"one\n", b"error: no such file\n", b"last words\n"]
    assert (death.exit_code, death.cause, death.in_a_row) == (3, "no such file", 1)
    assert death.manner == "ended with exit code 3"
    assert failing.pid is None
    assert failing.reap() is None


def test_a_child_without_a_last_newline_and_with_bytes_that_are_no_text(tmp_path: Path) -> None:
    lines: list[bytes] = []
    talking = child("import os; os.write(2, b'\\xff' * 200_000 + b'\\nend')", lines, tmp_path)
    talking.start()
    death = death_of(talking)
    assert b"".join(lines).replace(b"\n", b"") == b"\xff" * 200_000 + b"end"
    assert death.cause == "end"


def test_a_child_that_closes_its_output_is_no_busy_loop(tmp_path: Path) -> None:
    silent = child("import os, time; os.close(1); os.close(2); time.sleep(60)", [], tmp_path)
    silent.start()
    deadline_s = time.monotonic() + 10
    while len(silent.descriptors) == 2:
        assert time.monotonic() < deadline_s
        silent.relay()
        time.sleep(0.01)
    silent.signal(signal.SIGTERM)
    assert death_of(silent).exit_code == -signal.SIGTERM


def test_a_grandchild_ends_with_the_child(tmp_path: Path) -> None:
    lines: list[bytes] = []
    script = (
        "import subprocess, sys\n"
        "grandchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "sys.stderr.write(f'{grandchild.pid}\\n')"
    )
    parent = child(script, lines, tmp_path)
    parent.start()
    death_of(parent)
    pidfd = open_pidfd(int(lines[0]))
    if pidfd is not None:
        with selectors.DefaultSelector() as selector:
            selector.register(pidfd, selectors.EVENT_READ)
            assert selector.select(5), "the grandchild lives"
        os.close(pidfd)


def test_pauses_before_a_restart_grow(tmp_path: Path) -> None:
    dying = child("", [], tmp_path)
    pauses: list[float] = []
    for death in range(1, 5):
        dying.start()
        assert death_of(dying).in_a_row == death
        dying.schedule_restart()
        assert dying.start_due_s is not None
        pauses.append(dying.start_due_s - time.monotonic())
    assert pauses == sorted(pauses)
    assert pauses[0] < 0.1
    assert 0.2 < pauses[-1] < 1
