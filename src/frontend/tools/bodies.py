"""What stands behind the openings of calls: see ``parser.Body``."""

import re
from collections.abc import Collection
from typing import Final

from shoal.frontend.tools.call_object import CallObject
from shoal.frontend.tools.events import Argued, Began, Ended, Event
from shoal.frontend.tools.json_reader import WHITE, JsonValue, Verdict

_LONGEST_HEAD: Final = 300
_HEAD: Final = re.compile(r"\s*([\w.:/-]+)\s*(?:\[CALL_ID\][^\[\]]*)?(?:\[ARGS\])?\s*", re.ASCII)


class EnclosedCall:
    """One call object and what closes it."""

    def __init__(self, names: Collection[str], events: list[Event], closing: str) -> None:
        self._call = CallObject(names, events)
        self._closing = closing
        self._reached = 0
        self.may_end = False

    def feed(self, character: str) -> Verdict:
        """Takes the next character, unless it says otherwise."""
        if not self.may_end:
            verdict = self._call.feed(character)
            self.may_end = verdict is Verdict.LAST
            return Verdict.MORE if self.may_end else verdict
        if character == self._closing[self._reached]:
            self._reached += 1
            return Verdict.LAST if self._reached == len(self._closing) else Verdict.MORE
        if self._reached:
            return Verdict.BROKEN
        return Verdict.MORE if character in WHITE else Verdict.PAST


class CallSeries:
    """Call objects with semicolons between them."""

    def __init__(self, names: Collection[str], events: list[Event]) -> None:
        self._names = names
        self._events = events
        self._call: CallObject | None = CallObject(names, events)
        self._calls = 0

    @property
    def may_end(self) -> bool:
        """Behind a call, and behind a semicolon."""
        return self._calls > 0 and (self._call is None or self._call.is_untouched)

    def feed(self, character: str) -> Verdict:
        """Takes the next character, unless it says otherwise."""
        if self._call is not None:
            verdict = self._call.feed(character)
            if verdict is not Verdict.LAST:
                return verdict
            self._call = None
            self._calls += 1
        elif character == ";":
            self._call = CallObject(self._names, self._events)
        elif character not in WHITE:
            return Verdict.PAST
        return Verdict.MORE


class CallArray:
    """A JSON array of call objects."""

    def __init__(self, names: Collection[str], events: list[Event]) -> None:
        self._names = names
        self._events = events
        self._call: CallObject | None = None
        self._expects = "open"
        """open, call, comma."""

    @property
    def may_end(self) -> bool:
        """Behind a call."""
        return self._expects == "comma"

    def feed(self, character: str) -> Verdict:
        """Takes the next character, unless it says otherwise."""
        if self._call is not None:
            verdict = self._call.feed(character)
            if verdict is Verdict.LAST:
                self._call = None
                self._expects = "comma"
                return Verdict.MORE
            return verdict
        if character in WHITE:
            return Verdict.MORE
        match self._expects, character:
            case "open", "[":
                self._expects = "call"
            case "comma", ",":
                self._expects = "call"
            case "comma", "]":
                return Verdict.LAST
            case "call", "{":
                self._call = CallObject(self._names, self._events)
                return self._call.feed(character)
            case _:
                return Verdict.BROKEN
        return Verdict.MORE


class NamedArguments:
    """A function's name, then its arguments."""

    may_end = False

    def __init__(self, names: Collection[str], events: list[Event]) -> None:
        self._names = names
        self._events = events
        self._head: list[str] = []
        self._arguments: JsonValue | None = None

    def feed(self, character: str) -> Verdict:
        """Takes the next character, unless it says otherwise."""
        if self._arguments is None and character != "{":
            self._head.append(character)
            return Verdict.MORE if len(self._head) <= _LONGEST_HEAD else Verdict.BROKEN
        if self._arguments is None:
            head = _HEAD.fullmatch("".join(self._head))
            if head is None or head[1] not in self._names:
                return Verdict.BROKEN
            self._events.append(Began(head[1]))
            self._arguments = JsonValue()
        verdict = self._arguments.feed(character)
        if verdict in (Verdict.MORE, Verdict.LAST):
            self._events.append(Argued(character))
        if verdict is Verdict.LAST:
            self._events.append(Ended())
        return verdict


class MistralBody:
    """An array of calls, as Mistral's earlier models write them, or a name and its arguments, as the later ones do."""

    def __init__(self, names: Collection[str], events: list[Event]) -> None:
        self._names = names
        self._events = events
        self._form: CallArray | NamedArguments | None = None

    @property
    def may_end(self) -> bool:
        """As the form that it has."""
        return self._form is not None and self._form.may_end

    def feed(self, character: str) -> Verdict:
        """Takes the next character, unless it says otherwise."""
        if self._form is None:
            if character in WHITE:
                return Verdict.MORE
            form = CallArray if character == "[" else NamedArguments
            self._form = form(self._names, self._events)
        return self._form.feed(character)
