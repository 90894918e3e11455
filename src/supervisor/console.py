"""What a person sees of a start: the children's lines, progress, then readiness or the cause of a failure."""

import contextlib
from typing import BinaryIO, Final, TextIO

_BAR_CELLS: Final = 30
_CLEAR_LINE: Final = "\r\x1b[K"


class Console:
    """A terminal, or whatever stands in its place. Nobody reading is no reason to stop serving."""

    def __init__(self, log: BinaryIO, err: TextIO, out: TextIO) -> None:
        self._log = log
        self._err = err
        self._out = out
        self._shown_bar = ""
        self._phase = ""
        self._last_line = ""

    def relay(self, line: bytes) -> None:
        """A line of a child, as it is."""
        self.clear()
        self._last_line = line.decode(errors="replace").rstrip()
        with contextlib.suppress(OSError):
            self._log.write(line)
            self._log.flush()

    def clear(self) -> None:
        """Takes the progress bar away, for a line to be written."""
        if self._shown_bar:
            self._write(self._err, _CLEAR_LINE)
            self._shown_bar = ""

    def progress(self, phase: str, done: int, total: int) -> None:
        """A bar on a terminal; elsewhere one line a phase."""
        if self._err.isatty():
            self._show_bar(f"{phase} {_bar(done, total)}")
        elif phase != self._phase:
            self.say(phase)
        self._phase = phase

    def say(self, line: str) -> None:
        """One line on the error stream."""
        self.clear()
        self._last_line = line
        self._write(self._err, f"{line}\n")

    def ready(self, text: str) -> None:
        """The server serves."""
        self.clear()
        self._write(self._out, text)

    def failed(self, cause: str) -> None:
        """The server could not start: the cause is the last line."""
        line = f"error: {cause}"
        if line != self._last_line:
            self.say(line)

    def _show_bar(self, bar: str) -> None:
        if bar != self._shown_bar:
            self._write(self._err, _CLEAR_LINE + bar)
            self._shown_bar = bar

    def _write(self, stream: TextIO, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            stream.write(text)
            stream.flush()


def _bar(done: int, total: int) -> str:
    if total <= 0:
        return ""
    share = min(done / total, 1.0)
    cells = round(share * _BAR_CELLS)
    return f"[{'#' * cells}{'.' * (_BAR_CELLS - cells)}] {share:4.0%}"
