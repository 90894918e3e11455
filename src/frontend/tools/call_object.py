"""Reads ``{"name": …, "arguments": {…}}``, which every format that is served has at its heart."""

import json
from collections.abc import Collection
from typing import Final

from shoal.frontend.tools.events import Argued, Began, Ended, Event
from shoal.frontend.tools.json_reader import WHITE, JsonValue, Verdict

ARGUMENTS: Final = ("arguments", "parameters")
_NAME: Final = "name"
_KNOWN: Final = (_NAME, *ARGUMENTS, "id", "type", "function")
_LONGEST_KEY: Final = 64


class CallObject:
    """One call. Its events go to ``events``: the arguments as they come, once the name is known. Broken where the
    name is none of ``names``, or the arguments are no object (nor the JSON text of one, nor null)."""

    def __init__(self, names: Collection[str], events: list[Event]) -> None:
        self._names = names
        self._events = events
        self._expects = "open"
        """open, first key, next key, colon, value, comma, end; or within a key or a value."""
        self._key: str | None = None
        self._value: JsonValue | None = None
        self._raw: list[str] = []
        self._name: str | None = None
        self._arguments: str | None = None
        self._began = False

    @property
    def is_untouched(self) -> bool:
        """Whether nothing of it has come."""
        return self._expects == "open"

    def feed(self, character: str) -> Verdict:
        """Takes the next character, unless it says otherwise."""
        if self._value is not None:
            return self._in_value(self._value, character)
        if character in WHITE:
            return Verdict.MORE
        match self._expects, character:
            case "open", "{":
                self._expects = "first key"
            case (("first key" | "next key"), '"'):
                self._key = None
                return self._open_value(character)
            case (("first key" | "comma"), "}"):
                return self._close()
            case "colon", ":":
                self._expects = "value"
            case "comma", ",":
                self._expects = "next key"
            case "value", _:
                return self._open_value(character)
            case _:
                return Verdict.BROKEN
        return Verdict.MORE

    def _open_value(self, character: str) -> Verdict:
        if self._key in ARGUMENTS and (character not in '{"n' or self._arguments is not None):
            return Verdict.BROKEN
        if self._key == _NAME and (character != '"' or self._name is not None):
            return Verdict.BROKEN
        self._value = JsonValue()
        self._raw = []
        if self._key in ARGUMENTS and character == "{" and self._name is not None:
            self._begin()
        return self._in_value(self._value, character)

    def _in_value(self, value: JsonValue, character: str) -> Verdict:
        verdict = value.feed(character)
        if verdict is Verdict.BROKEN:
            return verdict
        if verdict is Verdict.PAST:
            return self.feed(character) if self._close_value() else Verdict.BROKEN
        if self._began and self._arguments is None:
            self._events.append(Argued(character))
        else:
            self._raw.append(character)
        if self._key is None and len(self._raw) > _LONGEST_KEY:
            return Verdict.BROKEN
        if verdict is Verdict.LAST and not self._close_value():
            return Verdict.BROKEN
        return Verdict.MORE

    def _close_value(self) -> bool:
        """Takes note of a key or a value that is complete; False where it cannot be."""
        self._value = None
        text = "".join(self._raw)
        if self._expects != "value":
            self._key = json.loads(text)
            self._expects = "colon"
            return self._key in _KNOWN
        self._expects = "comma"
        if self._key == _NAME:
            self._name = json.loads(text)
            return self._name in self._names
        if self._key in ARGUMENTS:
            self._arguments = "" if self._began else _as_object(text)
            return self._arguments is not None
        return True

    def _begin(self) -> None:
        assert self._name is not None
        self._began = True
        self._events.append(Began(self._name))

    def _close(self) -> Verdict:
        if self._name is None:
            return Verdict.BROKEN
        if not self._began:
            self._begin()
            self._events.append(Argued(self._arguments or "{}"))
        self._events.append(Ended())
        self._expects = "end"
        return Verdict.LAST


def _as_object(text: str) -> str | None:
    """Arguments that came before the name, or in a form of their own, as the text of an object."""
    if text == "null":
        return "{}"
    if text.startswith('"'):
        text = json.loads(text)
    return text if is_object(text) else None


def is_object(text: str) -> bool:
    """Whether ``text`` is a JSON object that can be sent on."""
    if not text.startswith("{") or not _is_unicode(text):
        return False
    reader = JsonValue()
    return (
        all(reader.feed(each) is Verdict.MORE for each in text[:-1]) and reader.feed(text[-1]) is Verdict.LAST
    )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
