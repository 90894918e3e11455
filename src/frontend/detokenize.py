"""Turns the growing tokens of one answer into text that can be sent: whole characters, and no part of a stop string.

One ``Detokenizer`` belongs to one choice of one request; ``stream.py`` pushes what the scheduler sends.
"""

from collections import deque
from collections.abc import Iterable, Sequence

from msgspec import Struct

from shoal.tokenizer import Tokenizer


class Delta(Struct, frozen=True):
    """What one push made certain."""

    text: str
    stopped: str | None = None
    """The stop string that ended the answer."""
    consumed: int = 0
    """How many of the pushed ids belong to the answer, the one that completed the stop string included."""


class Detokenizer:
    """Text of one answer, piece by piece. The pieces together are the decoding of all ids, up to the stop string
    that is complete first (of several that end at one character, the longest)."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        skip_special: bool = True,
        include_stop: bool = False,
        unstoppable: int = 0,
        goes_on: bool = False,
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:
        """The text of the first ``unstoppable`` tokens is not searched for stop strings. An answer that ``goes_on``
        within a text keeps its first space. ``shown_ids`` are special tokens that are not skipped."""
        self._stream = tokenizer.stream(skip_special, goes_on=goes_on, shown_ids=shown_ids)
        self._matcher = _StopMatcher(stop)
        self._include_stop = include_stop
        self._unstoppable = unstoppable
        self._held = ""
        self.stopped: str | None = None

    def push(self, ids: Iterable[int]) -> Delta:
        """Takes the next tokens. After a stop string nothing more is taken."""
        ready: list[str] = []
        for token_id in ids if self.stopped is None else ():
            text, self.stopped = self._advance(self._stream.feed(token_id))
            ready.append(text)
            if self.stopped is not None:
                break
        return Delta("".join(ready), self.stopped, len(ready))

    def finish(self) -> str:
        """The text held back: the answer has ended. ``stopped`` may still become true here, when a stop string holds
        the replacement character of a broken end."""
        if self.stopped is not None:
            return ""
        text, self.stopped = self._advance(self._stream.flush())
        held, self._held = self._held, ""
        return text + held

    def _advance(self, text: str) -> tuple[str, str | None]:
        """What of the held and the new text is certain not to belong to a stop string, and the one it completes."""
        if self._matcher.idle:
            return text, None
        if self._unstoppable > 0:
            self._unstoppable -= 1
            return text, None
        whole = self._held + text
        for end in range(len(self._held), len(whole)):
            stop = self._matcher.step(whole[end])
            if stop is not None:
                self._held = ""
                return whole[: end + 1 if self._include_stop else end + 1 - len(stop)], stop
        certain = len(whole) - self._matcher.depth
        self._held = whole[certain:]
        return whole[:certain], None


class _StopMatcher:
    """Aho and Corasick's automaton over the stop strings: a step a character, however many strings there are."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._fail = [0]
        self._found: list[str | None] = [None]
        for stop in stops:
            self._insert(stop)
        self._link()
        self._state = 0
        self.idle = len(self._next) == 1

    @property
    def depth(self) -> int:
        """Length of the longest end of the text so far that begins a stop string."""
        return self._depth[self._state]

    def step(self, character: str) -> str | None:
        """Takes the next character; the longest stop string that ends with it."""
        state = self._state
        while state and character not in self._next[state]:
            state = self._fail[state]
        self._state = self._next[state].get(character, 0)
        return self._found[self._state]

    def _insert(self, stop: str) -> None:
        if not stop:
            return
        state = 0
        for character in stop:
            following = self._next[state].get(character)
            if following is None:
                following = len(self._next)
                self._next[state][character] = following
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._fail.append(0)
                self._found.append(None)
            state = following
        self._found[state] = stop

    def _link(self) -> None:
        """Sets for each state the longest proper end of it that is a state too, breadth first."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for character, following in self._next[state].items():
                fallback = self._fail[state]
                while fallback and character not in self._next[fallback]:
                    fallback = self._fail[fallback]
                self._fail[following] = self._next[fallback].get(character, 0)
                if self._found[following] is None:
                    self._found[following] = self._found[self._fail[following]]
                queue.append(following)
