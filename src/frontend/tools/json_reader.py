"""Reads JSON a character at a time, so that a call's arguments can be passed on while the model still writes them."""

import json
from enum import Enum, auto
from typing import Final

WHITE: Final = " \t\n\r"
_DEEPEST: Final = 200
_LONGEST_SCALAR: Final = 512
_LITERALS: Final = ("true", "false", "null")
_SCALAR: Final = "+-.0123456789eEtrufalsn"
_ESCAPES: Final = '"\\/bfnrtu'
_HEX: Final = "0123456789abcdefABCDEF"


class Verdict(Enum):
    """What a reader says of the character that it was told."""

    MORE = auto()
    """Taken; the value goes on."""
    LAST = auto()
    """Taken; the value is complete."""
    PAST = auto()
    """Not taken: the value was complete before it."""
    BROKEN = auto()
    """Not taken: it cannot stand here."""


class JsonValue:
    """One value of any type. Takes what JSON's grammar allows, and nothing else."""

    def __init__(self) -> None:
        self._closers: list[str] = []
        self._expects = "value"
        """value, item, first item, first key, next key, colon, comma, end; within: string, key, scalar."""
        self._escaped = False
        self._hex_left = 0
        self._scalar = ""

    def feed(self, character: str) -> Verdict:
        """Takes the next character, unless it says otherwise."""
        match self._expects:
            case "string" | "key":
                return self._in_string(character)
            case "scalar":
                return self._in_scalar(character)
            case "end":
                return Verdict.PAST
        return Verdict.MORE if character in WHITE else self._between(character)

    def _between(self, character: str) -> Verdict:
        expects = self._expects
        if expects in ("first key", "first item", "comma") and character == self._closers[-1]:
            self._closers.pop()
            return self._after_value()
        if expects in ("value", "item", "first item"):
            return self._begin(character)
        if expects in ("first key", "next key") and character == '"':
            self._expects = "key"
        elif expects == "colon" and character == ":":
            self._expects = "item"
        elif expects == "comma" and character == ",":
            self._expects = "next key" if self._closers[-1] == "}" else "item"
        else:
            return Verdict.BROKEN
        return Verdict.MORE

    def _begin(self, character: str) -> Verdict:
        if character in "{[" and len(self._closers) < _DEEPEST:
            self._closers.append("}" if character == "{" else "]")
            self._expects = "first key" if character == "{" else "first item"
        elif character == '"':
            self._expects = "string"
        elif character in "-0123456789tfn":
            self._scalar = character
            self._expects = "scalar"
        else:
            return Verdict.BROKEN
        return Verdict.MORE

    def _in_string(self, character: str) -> Verdict:
        if self._hex_left:
            self._hex_left -= 1
            return Verdict.MORE if character in _HEX else Verdict.BROKEN
        if self._escaped:
            self._escaped = False
            self._hex_left = 4 if character == "u" else 0
            return Verdict.MORE if character in _ESCAPES else Verdict.BROKEN
        if character == '"' and self._expects == "key":
            self._expects = "colon"
        elif character == '"':
            return self._after_value()
        elif character < " ":
            return Verdict.BROKEN
        self._escaped = character == "\\"
        return Verdict.MORE

    def _in_scalar(self, character: str) -> Verdict:
        """A number has no end of its own: what follows it is."""
        if character in _SCALAR and len(self._scalar) < _LONGEST_SCALAR:
            self._scalar += character
            return Verdict.MORE if _begins_scalar(self._scalar) else Verdict.BROKEN
        if not _is_scalar(self._scalar):
            return Verdict.BROKEN
        self._after_value()
        return self.feed(character)

    def _after_value(self) -> Verdict:
        self._expects = "comma" if self._closers else "end"
        return Verdict.MORE if self._closers else Verdict.LAST


def _begins_scalar(text: str) -> bool:
    """Whether a literal or a number can begin so."""
    if text[0] in "tfn":
        return any(literal.startswith(text) for literal in _LITERALS)
    return any(_is_scalar(text + rest) for rest in ("", "0", ".0", "0.0"))


def _is_scalar(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
