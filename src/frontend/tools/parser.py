"""Splits a growing answer into text and calls. One parser a choice; the formats give it what they open calls with.

It sees the answer in pieces that may end anywhere, and finds the same in it however it is cut. What looked like a call
and is none is text, every character of it.
"""

from collections.abc import Callable
from typing import Protocol

from shoal.frontend.tools.events import Ended, Event, Said
from shoal.frontend.tools.json_reader import WHITE, Verdict


class Body(Protocol):
    """What stands behind an opening: one call, or several."""

    def feed(self, character: str) -> Verdict:
        """Takes the next character, unless it says otherwise."""
        ...

    @property
    def may_end(self) -> bool:
        """Whether an answer may end here: what stands behind the last call is no part of a next one."""
        ...


class CallParser:
    """``opening`` begins a call (several, in formats where one body has several); with ``bare`` a brace at the very
    beginning of the answer does too. A ``patient`` parser tells of a call when it is complete, so that a broken one
    can still be text; the others pass on its arguments as they come. Where calls are ``held`` to a grammar, one that
    is cut off before its name is no text either. White space around calls is dropped."""

    def __init__(
        self,
        opening: str,
        body: Callable[[list[Event]], Body],
        *,
        bare: bool = False,
        patient: bool,
        held: bool,
    ) -> None:
        self._opening = opening
        self._make_body = body
        self._bare = bare
        """Still, that is: nothing but white space has come."""
        self._patient = patient
        self._held_to = held
        self._held = ""
        """White space, and what may begin an opening."""
        self._body: Body | None = None
        self._news: list[Event] = []
        """From the body, not yet looked at."""
        self._kept: list[Event] = []
        """Of a call that a patient parser waits for."""
        self._raw: list[str] = []
        """Text since the last event that was passed on."""
        self._in_call = False
        """An event of a call was passed on, and its end was not."""
        self._just_ended = False
        self._after_call = False
        """Nothing was said since the last call."""
        self._found: list[Event] = []

    def feed(self, text: str) -> list[Event]:
        """What became certain."""
        at = 0
        while at < len(text):
            at = self._read_text(text, at) if self._body is None else self._read_body(self._body, text, at)
        return self._take()

    def finish(self, *, cut: bool) -> list[Event]:
        """What was held back. ``cut``: the answer was broken off, so a call without an end is one all the same."""
        body, self._body = self._body, None
        if body is not None and not body.may_end:
            if cut and self._kept:
                self._found += self._kept
                self._in_call = True
            if not self._in_call and not (cut and self._held_to):
                self._say("".join(self._raw))
            return self._take()
        if body is None and (self._held.strip(WHITE) or not self._after_call):
            self._say(self._held)
        return self._take()

    def _take(self) -> list[Event]:
        found, self._found = self._found, []
        return found

    def _say(self, text: str) -> None:
        if text:
            self._after_call = False
            self._found.append(Said(text))

    # --- text ---

    def _read_text(self, text: str, at: int) -> int:
        """Takes text up to an opening; the place from which on the body reads."""
        known = self._held + text[at:]
        if self._bare and (begun := known.lstrip(WHITE)):
            self._bare = False
            if begun[0] == "{":
                space = known[: -len(begun)]
                after = at + len(space) - len(self._held)
                self._open(space)
                return after
        place = known.find(self._opening)
        if place < 0:
            held = _beginning_of(self._opening, known)
            certain = known[: len(known) - held].rstrip(WHITE)
            self._say(certain)
            self._held = known[len(certain) :]
            return len(text)
        certain = known[:place].rstrip(WHITE)
        self._say(certain)
        end = place + len(self._opening)
        after = at + end - len(self._held)
        self._open(known[len(certain) : end])
        return after

    def _open(self, raw: str) -> None:
        self._news = []
        self._body = self._make_body(self._news)
        self._raw = [raw]
        self._held = ""

    # --- calls ---

    def _read_body(self, body: Body, text: str, at: int) -> int:
        verdict = body.feed(text[at])
        self._offer()
        if verdict is Verdict.BROKEN:
            self._give_up()
            return at
        if verdict is Verdict.PAST:
            self._body = None
            self._held = "".join(self._raw)
            return at
        self._raw.append(text[at])
        if self._in_call or verdict is Verdict.LAST or self._just_ended:
            self._raw = []
        if verdict is Verdict.LAST:
            self._body = None
        return at + 1

    def _offer(self) -> None:
        """Passes on what the body found, or keeps it."""
        self._just_ended = False
        for event in self._news:
            self._kept.append(event)
            self._just_ended = isinstance(event, Ended)
            self._after_call = self._after_call or self._just_ended
            if self._just_ended or not self._patient:
                self._in_call = not self._just_ended
                self._found += self._kept
                self._kept = []
        self._news.clear()

    def _give_up(self) -> None:
        """It is no call after all."""
        self._body = None
        self._kept = []
        if self._in_call:
            self._in_call = False
        else:
            self._say("".join(self._raw))
        self._raw = []


def _beginning_of(opening: str, text: str) -> int:
    """Length of the longest end of ``text`` that begins ``opening``."""
    longest = min(len(opening) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if opening.startswith(text[-n:])), 0)
