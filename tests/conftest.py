"""For every test: the list of what was skipped, by name, at the end of a run; no deadline for hypothesis's examples."""

from typing import Any

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
