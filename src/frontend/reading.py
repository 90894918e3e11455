"""What of an answer is text, what thinking and what calls. ``turn.py`` has one reader a choice."""

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from shoal.frontend.generation import Piece
from shoal.frontend.reasoning import Markers, State, ThoughtSplitter
from shoal.frontend.tools.events import Argued, Began, Event, Said
from shoal.frontend.tools.format import ToolFormat
from shoal.messages import TokenLogprob
from shoal.tokenizer import Tokenizer

_CALLED: Final = "tool_calls"


class CallDelta(Struct, kw_only=True):
    """What a piece adds to one tool call."""

    index: int
    """Of the call, in its choice."""
    id: str = ""
    """Set in the call's first delta, with the name."""
    name: str = ""
    arguments: str = ""
    """A part of the arguments' JSON text."""


class AnswerPiece(Struct, kw_only=True):
    """What became certain of one choice."""

    index: int
    text: str = ""
    reasoning: str = ""
    calls: list[CallDelta] = []
    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    """Empty, or one for each id."""
    finish_reason: str | None = None
    """Set in the choice's last piece: stop, length, tool_calls, …"""
    stop_reason: str | int | None = None


class Reading(Struct, frozen=True, kw_only=True):
    """How the answers of one request are read."""

    markers: Markers | None = None
    """Of the thinking; None: nothing is told apart."""
    state: State = "after"
    """Where the thinking stands at the beginning."""
    closing_ids: tuple[int, ...] = ()
    """The tokens that end the thinking, as the tokenizer spells its end."""
    tool_format: ToolFormat | None = None
    """Of the calls; None: there are none to look for."""
    names: frozenset[str] = frozenset()
    """The functions that may be called."""
    patient: bool = False
    """A call is told when it is complete."""
    held: bool = False
    """A grammar holds the calls."""

    def shown_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """The special tokens without whose text an answer could not be read."""
        texts = [*(self.tool_format.markers if self.tool_format is not None else ())]
        if self.markers is not None:
            texts += [self.markers.opening, self.markers.closing]
        return frozenset(tokenizer.special_ids.intersection(map(tokenizer.token_id, texts)))


class AnswerReader:
    """Reads one choice."""

    def __init__(self, reading: Reading) -> None:
        self.reasoning_tokens = 0
        """Those up to the end of the thinking."""
        self._reading = reading
        markers, tool_format = reading.markers, reading.tool_format
        self._thoughts = None if markers is None else ThoughtSplitter(markers, reading.state)
        self._calls = None
        if tool_format is not None:
            self._calls = tool_format.parser(reading.names, patient=reading.patient, held=reading.held)
        self._called = 0
        self._counts = markers is not None and reading.state != "after"
        """Whether tokens may still belong to the thinking."""
        self._tail: tuple[int, ...] = ()
        """The last tokens, which may begin its end."""

    def read(self, piece: Piece) -> AnswerPiece:
        """The next piece of the answer, split."""
        reasoning, text = self._think(piece)
        events = [Said(text)] if self._calls is None else self._calls.feed(text)
        if piece.finish_reason is not None and self._calls is not None:
            by_itself = piece.finish_reason == "stop" and not isinstance(piece.stop_reason, str)
            events += self._calls.finish(cut=not by_itself)
        calls = self._deltas(events)
        reason = piece.finish_reason
        return AnswerPiece(
            index=piece.index,
            text="".join(event.text for event in events if isinstance(event, Said)),
            reasoning=reasoning,
            calls=calls,
            ids=piece.ids,
            logprobs=piece.logprobs,
            finish_reason=_CALLED if reason == "stop" and self._called else reason,
            stop_reason=piece.stop_reason,
        )

    def _think(self, piece: Piece) -> tuple[str, str]:
        thoughts = self._thoughts
        if thoughts is None:
            return "", piece.text
        reasoning, text = thoughts.feed(piece.text)
        if piece.finish_reason is not None:
            more_reasoning, more_text = thoughts.finish()
            reasoning, text = reasoning + more_reasoning, text + more_text
        if self._counts:
            ended = thoughts.state == "after" or piece.finish_reason is not None
            self._counts = self._count(piece.ids) and not ended
            if not thoughts.opened and not self._counts:
                self.reasoning_tokens = 0
        return reasoning, text

    def _count(self, ids: Sequence[int]) -> bool:
        """Counts tokens up to the end of the thinking; whether it goes on, as far as the ids tell."""
        closing = self._reading.closing_ids
        before = len(self._tail)
        seen = (*self._tail, *ids)
        places = range(len(closing), len(seen) + 1)
        end = next((n for n in places if seen[n - len(closing) : n] == closing), None)
        self.reasoning_tokens += len(ids) if end is None else end - before
        self._tail = seen[len(seen) - len(closing) + 1 :] if len(seen) >= len(closing) else seen
        return end is None

    def _deltas(self, events: Sequence[Event]) -> list[CallDelta]:
        """The open call's deltas, those that stand together joined."""
        tool_format = self._reading.tool_format
        deltas: list[CallDelta] = []
        for event in events:
            match event:
                case Began(name=name):
                    assert tool_format is not None
                    deltas.append(CallDelta(index=self._called, id=tool_format.call_id(), name=name))
                    self._called += 1
                case Argued(text=text):
                    _argue(deltas, self._called - 1, text)
        return deltas


def _argue(deltas: list[CallDelta], index: int, text: str) -> None:
    """A call's first delta has no arguments: clients expect its name alone."""
    last = deltas[-1] if deltas else None
    if last is not None and last.index == index and not last.name:
        last.arguments += text
    else:
        deltas.append(CallDelta(index=index, arguments=text))
