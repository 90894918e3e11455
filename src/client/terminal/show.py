"""What the loop tells a person with: a screen, or two plain streams."""

import re
from collections.abc import Iterable
from typing import Final, NamedTuple, Protocol

_CONTROLS: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Piece(NamedTuple):
    """Some more of an answer."""

    text: str
    is_thought: bool = False
    """Of the reasoning before the answer."""


class Display(Protocol):
    """Shows answers, and what is said about them."""

    def answer(self, pieces: Iterable[Piece]) -> None:
        """Shows a text while it comes."""

    def note(self, text: str) -> None:
        """A remark of the program's."""

    def error(self, text: str) -> None:
        """Something that went wrong."""


def harmless(text: str) -> str:
    """Without characters that steer a terminal: a model may have been told to write some."""
    return _CONTROLS.sub("", text)
