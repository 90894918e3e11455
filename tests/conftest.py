"""For every test: the list of what was skipped, by name, at the end of a run; no deadline for hypothesis's examples;
and what nvcc builds for minutes is begun when a test was chosen that wants it."""

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import cuda_build
import pytest
from hypothesis import settings

settings.register_profile("shoal", deadline=None)
settings.load_profile("shoal")
"""On a busy machine an example takes as long as it takes."""


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A skipped test is not a passed one: say which, and what was missing."""
    skipped: list[pytest.TestReport] = terminalreporter.getreports("skipped")
    if skipped:
        terminalreporter.write_sep("-", f"{len(skipped)} skipped")
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        terminalreporter.write_line(f"{report.nodeid}: {reason.removeprefix('Skipped: ')}")


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Iterator[None]:
    wanted = any(item.path.name == "test_cuda_build.py" for item in session.items)
    building = cuda_build.begin() if wanted and not session.config.option.collectonly else None
    try:
        return (yield)
    finally:
        if building is not None and building.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(building.pid, signal.SIGTERM)
            building.wait()
