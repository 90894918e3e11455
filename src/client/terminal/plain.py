"""A pipe's end: turns are lines, answers are raw text, everything else goes to standard error."""

from collections.abc import Iterable
from typing import TextIO

from shoal.client.terminal.show import Piece


class LineReader:
    """A turn a line; one that ends in a backslash goes on in the next."""

    def __init__(self, source: TextIO) -> None:
        self._source = source

    def read(self) -> str:
        """Raises EOFError at the end."""
        lines: list[str] = []
        for line in iter(self._source.readline, ""):
            text = line.rstrip("\n")
            if not text.endswith("\\"):
                return "\n".join([*lines, text])
            lines.append(text[:-1])
        if not lines:
            raise EOFError
        return "\n".join(lines)


class PlainDisplay:
    """Text as it is, each answer ended by a line's end."""

    def __init__(self, out: TextIO, err: TextIO) -> None:
        self._out = out
        self._err = err

    def answer(self, pieces: Iterable[Piece]) -> None:
        """Writes each piece at once, but for the reasoning: programs want the answer."""
        for piece in pieces:
            if not piece.is_thought:
                self._out.write(piece.text)
                self._out.flush()
        self._out.write("\n")
        self._out.flush()

    def note(self, text: str) -> None:
        """Beside the answers, not among them."""
        self._err.write(f"{text}\n")
        self._err.flush()

    def error(self, text: str) -> None:
        """Beside the answers, not among them."""
        self.note(f"error: {text}")
