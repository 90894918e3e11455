"""An answer as the Responses API's output items, and as the events of its stream."""

from typing import Final

import msgspec
from msgspec import Struct

from shoal.errors import RequestError
from shoal.frontend.logprobs import chat_logprobs
from shoal.frontend.responses_translation import encrypted
from shoal.frontend.schemas.chat import ChatTokenLogprob
from shoal.frontend.schemas.responses import (
    FunctionCall,
    OutputItem,
    OutputMessage,
    OutputText,
    ReasoningItem,
    ReasoningText,
    ResponseEvent,
    ResponseObject,
)
from shoal.frontend.stream import Framing
from shoal.frontend.turn import AnswerPiece, CallDelta
from shoal.tokenizer import Tokenizer

_ENCODER: Final = msgspec.json.Encoder()


class Outline:
    """The items of one answer as they grow. Streamed or not, an answer is put together here alone."""

    def __init__(self, label: str, tokenizer: Tokenizer, *, seals_reasoning: bool) -> None:
        self.items: list[OutputItem] = []
        self._label = label
        self._tokenizer = tokenizer
        self._seals_reasoning = seals_reasoning
        self._call = -1
        """Number of the call that the last item is."""

    def add(self, piece: AnswerPiece) -> list[ResponseEvent]:
        """Thoughts, text and calls, in this order; the events that tell of them."""
        events: list[ResponseEvent] = []
        if piece.reasoning:
            events += self._add_reasoning(piece.reasoning)
        if piece.text or (piece.logprobs and not piece.reasoning and not piece.calls):
            events += self._add_text(piece)
        for call in piece.calls:
            events += self._add_call(call)
        if piece.finish_reason is not None:
            events += self._end_last("incomplete" if piece.finish_reason == "length" else "completed")
        return events

    def _add_reasoning(self, text: str) -> list[ResponseEvent]:
        events: list[ResponseEvent] = []
        last = self._last
        if not isinstance(last, ReasoningItem):
            last = ReasoningItem(id=f"rs_{self._name}", content=[ReasoningText("")])
            events = self._begin(last, ReasoningText(""))
        last.content[0].text += text
        return [*events, self._part_event("response.reasoning_text.delta", last.id, delta=text)]

    def _add_text(self, piece: AnswerPiece) -> list[ResponseEvent]:
        events: list[ResponseEvent] = []
        last = self._last
        if not isinstance(last, OutputMessage):
            last = OutputMessage(id=f"msg_{self._name}", content=[OutputText("", [], [])])
            events = self._begin(last, OutputText("", [], []))
        logprobs: list[ChatTokenLogprob] = []
        if piece.logprobs:
            logprobs = chat_logprobs(self._tokenizer, piece.ids, piece.logprobs).content
        last.content[0].text += piece.text
        last.content[0].logprobs += logprobs
        delta = self._part_event("response.output_text.delta", last.id, delta=piece.text, logprobs=logprobs)
        return [*events, delta]

    def _add_call(self, call: CallDelta) -> list[ResponseEvent]:
        events: list[ResponseEvent] = []
        last = self._last
        if not isinstance(last, FunctionCall) or self._call != call.index:
            self._call = call.index
            last = FunctionCall(id=f"fc_{self._name}", call_id=call.id, name=call.name)
            events = self._begin(last, None)
        last.arguments += call.arguments
        if call.arguments:
            events.append(
                ResponseEvent(
                    type="response.function_call_arguments.delta",
                    item_id=last.id,
                    output_index=len(self.items) - 1,
                    delta=call.arguments,
                )
            )
        return events

    @property
    def _last(self) -> OutputItem | None:
        return self.items[-1] if self.items else None

    @property
    def _name(self) -> str:
        """Of the next item: unique in the answer, and the answer's own among all."""
        return f"{self._label}_{len(self.items)}"

    def _begin(self, item: OutputItem, part: OutputText | ReasoningText | None) -> list[ResponseEvent]:
        events = self._end_last("completed")
        self.items.append(item)
        index = len(self.items) - 1
        empty = msgspec.structs.replace(item)
        if isinstance(empty, OutputMessage | ReasoningItem):
            empty.content = []
        events.append(ResponseEvent(type="response.output_item.added", output_index=index, item=empty))
        if part is not None:
            events.append(self._part_event("response.content_part.added", item.id, part=part))
        return events

    def _end_last(self, status: str) -> list[ResponseEvent]:
        item = self._last
        if item is None or item.status != "in_progress":
            return []
        item.status = status
        events: list[ResponseEvent] = []
        index = len(self.items) - 1
        match item:
            case OutputMessage(content=[part]):
                done = {"text": part.text, "logprobs": part.logprobs}
                events.append(self._part_event("response.output_text.done", item.id, **done))
                events.append(self._part_event("response.content_part.done", item.id, part=part))
            case ReasoningItem(content=[part]):
                if self._seals_reasoning:
                    item.encrypted_content = encrypted(part.text)
                events.append(self._part_event("response.reasoning_text.done", item.id, text=part.text))
                events.append(self._part_event("response.content_part.done", item.id, part=part))
            case FunctionCall():
                events.append(
                    ResponseEvent(
                        type="response.function_call_arguments.done",
                        item_id=item.id,
                        output_index=index,
                        name=item.name,
                        arguments=item.arguments,
                    )
                )
        return [*events, ResponseEvent(type="response.output_item.done", output_index=index, item=item)]

    def _part_event(self, kind: str, item_id: str, **fields: object) -> ResponseEvent:
        event = ResponseEvent(type=kind, item_id=item_id, output_index=len(self.items) - 1, content_index=0)
        return msgspec.structs.replace(event, **fields)


class EventWriter:
    """The stream of one response; numbers its events."""

    def __init__(self, outline: Outline, response: ResponseObject) -> None:
        self._outline = outline
        self._response = response
        self._sent = 0

    def framing(self) -> Framing:
        """Named events; an error too has its number."""
        return Framing(
            media_type="text/event-stream; charset=utf-8",
            event=_named,
            error=self._error,
            comment=b": still here\n\n",
        )

    def opening(self) -> list[Struct]:
        """The response, still empty."""
        shown = msgspec.structs.replace(self._response, output=[])
        return self._numbered(
            [ResponseEvent(type=f"response.{state}", response=shown) for state in ("created", "in_progress")]
        )

    def chunks(self, piece: AnswerPiece) -> list[Struct]:
        """What a piece adds."""
        return self._numbered(self._outline.add(piece))

    def closing(self) -> list[Struct]:
        """The response, complete."""
        kind = "incomplete" if self._response.status == "incomplete" else "completed"
        return self._numbered([ResponseEvent(type=f"response.{kind}", response=self._response)])

    def _numbered(self, events: list[ResponseEvent]) -> list[Struct]:
        for event in events:
            event.sequence_number = self._sent
            self._sent += 1
        return list(events)

    def _error(self, error: RequestError) -> bytes:
        event = ResponseEvent(type="error", code=error.code, message=error.message, param=error.param)
        self._numbered([event])
        return _named(event)


def _named(event: ResponseEvent) -> bytes:
    return f"event: {event.type}\ndata: ".encode() + _ENCODER.encode(event) + b"\n\n"
