"""Answers on a terminal, as Markdown while they come.

Blocks that are complete are printed for good and scroll away; only the last one is drawn again and again, and of it
no more than fits the window. So an answer of any length is shown in time that grows with it, and nothing flickers.
"""

import contextlib
import itertools
import sys
import termios
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.text import Text

from shoal.client.terminal import markdown
from shoal.client.terminal.show import Piece, harmless

_REDRAWS_PER_S: Final = 10


class Screen:
    """A Display for people."""

    def __init__(self, *, markdown: bool = True, console: Console | None = None) -> None:
        self._text = _MARKDOWN if markdown else _RAW
        self._console = console or Console(highlight=False)

    def answer(self, pieces: Iterable[Piece]) -> None:
        """Shows a text while it comes; also what came before an interruption."""
        with _unseen_keys():
            for is_thought, run in itertools.groupby(pieces, key=lambda piece: piece.is_thought):
                self._show(run, _THOUGHT if is_thought else self._text)

    def note(self, text: str) -> None:
        """Dim, to be told from answers."""
        self._console.print(Text(harmless(text), style="dim"))

    def error(self, text: str) -> None:
        """Red."""
        self._console.print(Text(f"error: {harmless(text)}", style="red"))

    def _show(self, pieces: Iterable[Piece], form: "_Form") -> None:
        rest = ""
        try:
            with Live(console=self._console, refresh_per_second=_REDRAWS_PER_S, transient=True) as live:
                for piece in pieces:
                    rest += harmless(piece.text)
                    if "\n" in piece.text:
                        rest = self._print_settled(rest, form)
                    live.update(_Tail(rest, form))
        finally:
            if rest:
                self._console.print(form.render(rest))

    def _print_settled(self, text: str, form: "_Form") -> str:
        """Prints what will not change any more; what remains."""
        length = form.settled_length(text)
        if length:
            self._console.print(form.render(text[:length]), end="")
            if form.is_spaced:
                self._console.print()
        return text[length:]


class _Form(NamedTuple):
    """A way to show a text that grows."""

    render: Callable[[str], RenderableType]
    settled_length: Callable[[str], int]
    """How much of a text looks the same whatever follows it."""
    is_spaced: bool
    """Whether an empty line parts what settles at different times."""


def _whole_lines(text: str) -> int:
    return text.rfind("\n") + 1


_MARKDOWN: Final = _Form(markdown.render, markdown.settled_length, is_spaced=True)
_RAW: Final = _Form(Text, _whole_lines, is_spaced=False)
_THOUGHT: Final = _Form(lambda text: Text(text, style="dim italic"), _whole_lines, is_spaced=False)


@contextlib.contextmanager
def _unseen_keys() -> Iterator[None]:
    """Keys pressed meanwhile wait for the next prompt; shown at once, they would stand amid the answer.

    Nor may ctrl-C, as it does otherwise, throw away what is on its way to the terminal: half a sequence that moves
    the cursor would be left.
    """
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    silent = [*before[:3], before[3] & ~termios.ECHO | termios.NOFLSH, *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


class _Tail:
    """The last lines of a text, as many as the window has room for. Rendered only when the screen is drawn."""

    def __init__(self, text: str, form: _Form) -> None:
        self._text = text
        self._form = form

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._form.render(self._text), options.update(height=None), pad=False)
        for line in lines[-max(1, console.height - 2) :]:
            yield from line
            yield Segment.line()
