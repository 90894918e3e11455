"""For every test: the list of what was skipped, by name, at the end of a run."""

from typing import Any

import pytest


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A skipped test is not a passed one: say which, and what was missing."""
    skipped: list[pytest.TestReport] = terminalreporter.getreports("skipped")
    if skipped:
        terminalreporter.write_sep("-", f"{len(skipped)} skipped")
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        terminalreporter.write_line(f"{report.nodeid}: {reason.removeprefix('Skipped: ')}")
