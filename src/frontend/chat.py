"""POST /v1/chat/completions: a ``Turn`` in OpenAI's chat form."""

from typing import Final

import falcon
import falcon.asgi
import msgspec
from msgspec import UNSET, UnsetType

from shoal.frontend import body, stream
from shoal.frontend.checks import tier_of
from shoal.frontend.exchange import exchange_of
from shoal.frontend.logprobs import chat_logprobs, prompt_logprobs
from shoal.frontend.routes import Operation, Route
from shoal.frontend.schemas.chat import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionRequest,
    ChatLogprobs,
    Delta,
)
from shoal.frontend.schemas.errors import ErrorAnswer
from shoal.frontend.schemas.tools import AnswerCall, AnswerFunction, CallChunk, FunctionDelta
from shoal.frontend.schemas.usage import Usage
from shoal.frontend.service import Service, now
from shoal.frontend.turn import AnswerPiece, CallDelta, Turn, WholeAnswer, open_turn

_ENCODER: Final = msgspec.json.Encoder()


def routes(service: Service) -> list[Route]:
    """The chat route."""
    return [
        Route(
            path="/v1/chat/completions",
            resource=ChatCompletions(service),
            operations={
                "POST": Operation(
                    summary="Continue a conversation",
                    body=ChatCompletionRequest,
                    answer=ChatCompletion,
                    event=ChatChunk,
                    event_error=ErrorAnswer,
                    event_end=stream.DONE,
                    errors=(404, 408, 413),
                )
            },
            stateless=True,
        )
    ]


class ChatCompletions:
    """The route."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Answers one conversation, whole or as a stream."""
        exchange = exchange_of(req)
        request = await body.read(req, ChatCompletionRequest)
        turn = await open_turn(self._service, exchange, req, request)
        if request.stream:
            await stream.begin(req, resp, exchange, turn, _ChatWriter(self._service, turn))
        else:
            resp.content_type = falcon.MEDIA_JSON
            resp.data = _ENCODER.encode(await _collect(self._service, turn))


async def _collect(service: Service, turn: Turn) -> ChatCompletion:
    """Waits for every choice."""
    answers = await turn.whole()
    completion = ChatCompletion(
        id=_completion_id(turn),
        created=now(),
        model=service.settings.model_name,
        choices=[_choice(service, turn, index, answer) for index, answer in enumerate(answers)],
        usage=turn.usage(),
        system_fingerprint=service.fingerprint,
        service_tier=tier_of(turn.request),
    )
    _add_extras(service, turn, completion)
    return completion


def _add_extras(service: Service, turn: Turn, completion: ChatCompletion) -> None:
    """What only some requests ask for."""
    request, generation = turn.request, turn.generation
    prompt = generation.job.prompts[0]
    if request.metadata:
        completion.metadata = request.metadata
    if request.return_token_ids:
        completion.prompt_token_ids = prompt
        for choice in completion.choices:
            choice.token_ids = generation.choices[choice.index].ids
    if request.prompt_logprobs is not None:
        scores = generation.choices[0].prompt_logprobs
        most = int(request.prompt_logprobs)
        completion.prompt_logprobs = prompt_logprobs(service.tokenizer, prompt, scores, most)
    if request.timings_per_token:
        completion.timings = generation.timings()


def _choice(service: Service, turn: Turn, index: int, answer: WholeAnswer) -> ChatChoice:
    logprobs = None
    if turn.generation.job.sampling.logprobs >= 0:
        logprobs = ChatLogprobs([])
        for piece in answer.pieces:
            logprobs.content += chat_logprobs(service.tokenizer, piece.ids, piece.logprobs).content
    reason = _finish_reason(turn, answer.finish_reason)
    return ChatChoice(index, _message(turn, answer), reason, answer.stop_reason, logprobs)


def _message(turn: Turn, answer: WholeAnswer) -> AnswerMessage:
    message = AnswerMessage(answer.text)
    if answer.reasoning:
        message.reasoning_content = answer.reasoning
    if answer.calls:
        message.content = answer.text or None
        functions = [AnswerFunction(call.name, call.arguments) for call in answer.calls]
        if turn.wish is not None and turn.wish.is_legacy:
            message.function_call = functions[0]
        else:
            ids = [call.id for call in answer.calls]
            message.tool_calls = [AnswerCall(*each) for each in zip(ids, functions, strict=True)]
    return message


def _finish_reason(turn: Turn, reason: str) -> str:
    """As OpenAI has it: a call that was asked for by name is no reason of its own."""
    if reason != "tool_calls" or turn.wish is None:
        return reason
    if turn.wish.mode == "named":
        return "stop"
    return "function_call" if turn.wish.is_legacy else reason


class _ChatWriter:
    """Chunks in the chat form."""

    def __init__(self, service: Service, turn: Turn) -> None:
        options = turn.request.stream_options
        self._service = service
        self._turn = turn
        self._wants_ids = bool(turn.request.return_token_ids)
        self._wants_timings = bool(turn.request.timings_per_token)
        self._id = _completion_id(turn)
        self._created = now()
        self._wants_usage = options is not None and bool(options.include_usage)
        self._continuous = options is not None and bool(options.continuous_usage_stats)

    def opening(self) -> list[msgspec.Struct]:
        """Each choice's role; with the first one the prompt's tokens, where they are asked for."""
        generation = self._turn.generation
        chunks = [
            self._chunk(ChatChunkChoice(choice.index, Delta(role="assistant", content="")))
            for choice in generation.choices
        ]
        if self._wants_ids:
            chunks[0].prompt_token_ids = generation.job.prompts[0]
        return [*chunks]

    def chunks(self, piece: AnswerPiece) -> list[msgspec.Struct]:
        """The thinking, the text, the calls, then the reason of the end."""
        logprobs = chat_logprobs(self._service.tokenizer, piece.ids, piece.logprobs) if piece.logprobs else None
        chunks: list[msgspec.Struct] = []
        if piece.reasoning:
            thought = ChatChunkChoice(piece.index, Delta(reasoning_content=piece.reasoning))
            chunks.append(self._chunk(thought))
        if piece.text or logprobs is not None or (piece.ids and self._wants_ids):
            delta = Delta(content=piece.text) if piece.text or not (piece.reasoning or piece.calls) else Delta()
            choice = ChatChunkChoice(piece.index, delta, logprobs=logprobs)
            if self._wants_ids:
                choice.token_ids = list(piece.ids)
            chunks.append(self._chunk(choice))
        chunks += [self._chunk(ChatChunkChoice(piece.index, self._call(call))) for call in piece.calls]
        if piece.finish_reason is not None:
            reason = _finish_reason(self._turn, piece.finish_reason)
            last = ChatChunkChoice(piece.index, Delta(), reason, piece.stop_reason)
            chunks.append(self._chunk(last))
        return chunks

    def _call(self, call: CallDelta) -> Delta:
        """A call's first delta has its name and no arguments yet."""
        named = bool(call.name)
        function = FunctionDelta(call.name or None, call.arguments)
        if self._turn.wish is not None and self._turn.wish.is_legacy:
            return Delta(function_call=function)
        kind = "function" if named else None
        return Delta(tool_calls=[CallChunk(call.index, call.id or None, kind, function)])

    def closing(self) -> list[msgspec.Struct]:
        """Usage and timings, in a chunk without choices."""
        if not (self._wants_usage or self._wants_timings):
            return []
        last = self._chunk(None)
        if self._wants_usage:
            last.usage = self._turn.usage()
        if self._wants_timings:
            last.timings = self._turn.generation.timings()
        return [last]

    def _chunk(self, choice: ChatChunkChoice | None) -> ChatChunk:
        usage: Usage | UnsetType | None = None if self._wants_usage else UNSET
        return ChatChunk(
            id=self._id,
            created=self._created,
            model=self._service.settings.model_name,
            choices=[] if choice is None else [choice],
            system_fingerprint=self._service.fingerprint,
            usage=self._turn.usage() if self._continuous else usage,
            service_tier=tier_of(self._turn.request),
        )


def _completion_id(turn: Turn) -> str:
    return f"chatcmpl-{turn.generation.job.label}"
