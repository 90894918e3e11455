"""POST /v1/messages and /v1/messages/count_tokens: a ``Turn`` in Anthropic's form."""

from typing import Final

import falcon
import falcon.asgi
import msgspec
from msgspec import Struct

from shoal.errors import RequestError
from shoal.frontend import body, stream
from shoal.frontend.anthropic_translation import NAMES_HERE, SIGNATURE, blocks, call_id, chat_request, stop
from shoal.frontend.exchange import exchange_of
from shoal.frontend.problems import anthropic_error
from shoal.frontend.renamed import in_names
from shoal.frontend.routes import Operation, Route
from shoal.frontend.schemas.anthropic import (
    AnswerBlock,
    AnswerText,
    AnswerThinking,
    AnswerToolUse,
    AnthropicError,
    ContentBlockDelta,
    ContentBlockStart,
    ContentBlockStop,
    CountTokensRequest,
    InputJsonDelta,
    MessageDelta,
    MessageEvent,
    MessagesAnswer,
    MessagesRequest,
    MessageStart,
    MessageStop,
    MessagesUsage,
    Ping,
    SignatureDelta,
    StopDelta,
    TextDelta,
    ThinkingDelta,
    TokenCount,
)
from shoal.frontend.service import Service
from shoal.frontend.turn import AnswerPiece, CallDelta, Turn, count_prompt, open_turn

_ENCODER: Final = msgspec.json.Encoder()


def routes(service: Service) -> list[Route]:
    """The messages routes."""
    return [
        Route(
            path="/v1/messages",
            resource=Messages(service),
            operations={
                "POST": Operation(
                    summary="Continue a conversation (Anthropic's API)",
                    body=MessagesRequest,
                    answer=MessagesAnswer,
                    event=MessageEvent,
                    event_error=AnthropicError,
                    errors=(404, 408, 413),
                )
            },
            stateless=True,
        ),
        Route(
            path="/v1/messages/count_tokens",
            resource=CountTokens(service),
            operations={
                "POST": Operation(
                    summary="Count a prompt's tokens (Anthropic's API)",
                    body=CountTokensRequest,
                    answer=TokenCount,
                    errors=(404, 413),
                )
            },
            stateless=True,
        ),
    ]


class Messages:
    """The route."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Answers one conversation, whole or as a stream."""
        request = await body.read(req, MessagesRequest)
        exchange = exchange_of(req)
        asked = chat_request(request)
        with in_names(NAMES_HERE):
            turn = await open_turn(self._service, exchange, req, asked)
        model = self._service.settings.model_name
        resp.set_header("request-id", exchange.request_id)
        if request.stream:
            await stream.begin(req, resp, exchange, turn, _MessageWriter(turn, model), _NAMED_EVENTS)
            return
        (answer,) = await turn.whole()
        reason, sequence = stop(answer.finish_reason, answer.stop_reason)
        resp.content_type = falcon.MEDIA_JSON
        resp.data = _ENCODER.encode(
            MessagesAnswer(
                id=_message_id(turn),
                model=model,
                content=blocks(answer),
                stop_reason=reason,
                stop_sequence=sequence,
                usage=_usage(turn),
            )
        )


class CountTokens:
    """The route."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """How long the prompt would be."""
        request = chat_request(await body.read(req, CountTokensRequest))
        with in_names(NAMES_HERE):
            tokens = await count_prompt(self._service, request)
        resp.content_type = falcon.MEDIA_JSON
        resp.data = _ENCODER.encode(TokenCount(tokens))


class _MessageWriter:
    """Events in Anthropic's form: blocks that begin, go on and end, one after the other."""

    def __init__(self, turn: Turn, model: str) -> None:
        self._turn = turn
        self._model = model
        self._index = -1
        self._open: AnswerBlock | None = None
        self._call = -1
        """Number of the call that the open block is."""
        self._stop: tuple[str, str | None] = ("end_turn", None)

    def opening(self) -> list[Struct]:
        """The answer, still empty."""
        message = MessagesAnswer(
            id=_message_id(self._turn), model=self._model, content=[], usage=_usage(self._turn)
        )
        return [MessageStart(message), Ping()]

    def chunks(self, piece: AnswerPiece) -> list[Struct]:
        """Thoughts, text and calls, in this order."""
        events: list[Struct] = []
        if piece.reasoning:
            events += self._enter(AnswerThinking(""), isinstance(self._open, AnswerThinking))
            events.append(ContentBlockDelta(self._index, ThinkingDelta(piece.reasoning)))
        if piece.text:
            events += self._enter(AnswerText(""), isinstance(self._open, AnswerText))
            events.append(ContentBlockDelta(self._index, TextDelta(piece.text)))
        for call in piece.calls:
            events += self._add_call(call)
        if piece.finish_reason is not None:
            self._stop = stop(piece.finish_reason, piece.stop_reason)
            events += self._leave()
        return events

    def closing(self) -> list[Struct]:
        """How it ended, and the counts."""
        return [MessageDelta(StopDelta(*self._stop), _usage(self._turn)), MessageStop()]

    def _add_call(self, call: CallDelta) -> list[Struct]:
        known = isinstance(self._open, AnswerToolUse) and self._call == call.index
        events = self._enter(AnswerToolUse(call_id(call.id), call.name, {}), known)
        self._call = call.index
        if call.arguments:
            events.append(ContentBlockDelta(self._index, InputJsonDelta(call.arguments)))
        return events

    def _enter(self, block: AnswerBlock, known: bool) -> list[Struct]:
        if known:
            return []
        events = self._leave()
        self._index += 1
        self._open = block
        return [*events, ContentBlockStart(self._index, block)]

    def _leave(self) -> list[Struct]:
        if self._open is None:
            return []
        events: list[Struct] = []
        if isinstance(self._open, AnswerThinking):
            events.append(ContentBlockDelta(self._index, SignatureDelta(SIGNATURE)))
        self._open = None
        return [*events, ContentBlockStop(self._index)]


def _usage(turn: Turn) -> MessagesUsage:
    usage = turn.usage()
    cached = usage.prompt_tokens_details.cached_tokens
    return MessagesUsage(
        input_tokens=usage.prompt_tokens - cached,
        cache_read_input_tokens=cached,
        output_tokens=usage.completion_tokens,
    )


def _message_id(turn: Turn) -> str:
    return f"msg_{turn.generation.job.label}"


def _named(event: Struct) -> bytes:
    name = type(event).__struct_config__.tag
    return f"event: {name}\ndata: ".encode() + _ENCODER.encode(event) + b"\n\n"


def _error_event(error: RequestError) -> bytes:
    return b"event: error\ndata: " + _ENCODER.encode(anthropic_error(error)) + b"\n\n"


_NAMED_EVENTS: Final = stream.Framing(
    media_type="text/event-stream; charset=utf-8", event=_named, error=_error_event, comment=_named(Ping())
)
