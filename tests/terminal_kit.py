"""A program in a real pseudo-terminal, and the screen that a person would see."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import pexpect
import pyte

ROOT = Path(__file__).resolve().parent.parent
_LIMIT_S = 60


def _hear_control_c() -> None:
    """As under a person's shell: tests that run in the background pass on that they ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """``with Terminal(...) as terminal: terminal.type("hi\\r"); terminal.wait_for("hello")``."""

    def __init__(self, *command: str, state: Path, rows: int = 40, columns: int = 100) -> None:
        env = os.environ | {
            "TERM": "xterm-256color",
            "XDG_STATE_HOME": str(state),
            "PROMPT_TOOLKIT_NO_CPR": "1",
        }
        env.pop("SHOAL_API_KEY", None)
        self.process = pexpect.spawn(
            sys.executable,
            list(command),
            env=env,
            dimensions=(rows, columns),
            encoding="utf-8",
            timeout=_LIMIT_S,
            preexec_fn=_hear_control_c,
        )
        self._screen = pyte.HistoryScreen(columns, rows, history=10_000)
        self._stream = pyte.Stream(self._screen)
        self.raw = ""
        """Everything that came, sequences included."""
        self._prompts_seen = 0

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.close(force=True)

    def type(self, keys: str) -> None:
        """Sends keys."""
        self.process.send(keys)

    def say(self, text: str) -> None:
        """Types a line at the next prompt."""
        self.wait_prompt()
        self.type(text + "\r")

    def wait_prompt(self) -> None:
        """Until the program reads a line again."""
        self._wait(lambda: self.raw.count("\x1b[?2004h") > self._prompts_seen, "a prompt")
        self._prompts_seen = self.raw.count("\x1b[?2004h")

    def wait_for(self, pattern: str) -> str:
        """Until that has been shown; the whole match."""
        self._wait(lambda: re.search(pattern, self.text()) is not None, pattern)
        found = re.search(pattern, self.text())
        assert found is not None
        return found[0]

    def wait_end(self) -> int | None:
        """Until the program has ended; its exit code."""
        self.process.expect(pexpect.EOF)
        self._feed(self.process.before or "")
        self.process.close()
        return self.process.exitstatus

    def text(self) -> str:
        """What scrolled away and what the window shows."""
        columns = range(self._screen.columns)
        above = ["".join(line[column].data for column in columns) for line in self._screen.history.top]
        return "\n".join(line.rstrip() for line in [*above, *self._screen.display])

    def _wait(self, is_there: "object", what: str) -> None:
        assert callable(is_there)
        deadline_s = time.monotonic() + _LIMIT_S
        while not is_there():
            assert time.monotonic() < deadline_s, f"no {what!r} in:\n{self.text()}"
            try:
                self._feed(self.process.read_nonblocking(4096, timeout=0.2))
            except pexpect.TIMEOUT:
                continue
            except pexpect.EOF:
                assert is_there(), f"ended before {what!r}:\n{self.text()}"

    def _feed(self, text: str) -> None:
        self.raw += text
        self._stream.feed(text)
