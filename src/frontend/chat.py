"""POST /v1/chat/completions: messages through the model's template, answers in OpenAI's chat form."""

from typing import Any, Final

import falcon
import falcon.asgi
import msgspec
from msgspec import UNSET, UnsetType

from shoal.errors import RequestError
from shoal.frontend import body, checks, stream
from shoal.frontend.api_types import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionRequest,
    ChatLogprobs,
    ChatMessage,
    ChatTokenLogprob,
    Delta,
    Usage,
)
from shoal.frontend.exchange import exchange_of
from shoal.frontend.generation import Generation, Piece
from shoal.frontend.logprobs import chat_logprobs
from shoal.frontend.prompts import text_ids
from shoal.frontend.service import Service, now, off_loop
from shoal.messages import Limits

_ENCODER: Final = msgspec.json.Encoder()
_ROLES: Final = ("system", "developer", "user", "assistant", "tool")


class ChatCompletions:
    """The route."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Answers one conversation, whole or as a stream."""
        exchange = exchange_of(req)
        request = await body.read(req, ChatCompletionRequest)
        self._service.check_model(request.model)
        checks.check_available(request)
        exchange.user = request.user or ""
        logprobs = checks.chat_logprobs(request)
        limits = await self._service.switchboard.wait_ready()
        prompt = await off_loop(
            _characters(request.messages), lambda: _prompt_ids(self._service, limits, request.messages)
        )
        job = checks.make_job(
            self._service, request, [prompt],
            label=exchange.request_id, logprobs=logprobs, header_timeout=req.get_header("X-Request-Timeout"),
        )  # fmt: skip
        generation = Generation(self._service, job)
        exchange.open(generation)
        if request.stream:
            writer = _ChatWriter(self._service, generation, request)
            await stream.begin(req, resp, exchange, generation, writer)
        else:
            resp.content_type = falcon.MEDIA_JSON
            resp.data = _ENCODER.encode(await _collect(self._service, generation))


def _prompt_ids(service: Service, limits: Limits, messages: str | list[ChatMessage]) -> list[int]:
    if not messages:
        raise checks.invalid("messages", "must not be empty")
    if isinstance(messages, str):
        return text_ids(service, limits, messages, add_special=True, field="messages")
    for number, message in enumerate(messages):
        _check_message(message, f"messages[{number}]")
    text = service.template.render(_plain(messages), add_generation_prompt=True)
    return text_ids(service, limits, text, add_special=False, field="messages")


def _check_message(message: ChatMessage, where: str) -> None:
    if message.role not in _ROLES:
        raise checks.invalid(f"{where}.role", f"must be one of {', '.join(_ROLES)}, not {message.role[:40]!r}")
    if not isinstance(message.content, list):
        if message.content is None and not message.tool_calls and message.role != "assistant":
            raise checks.invalid(f"{where}.content", "must not be null")
        return
    for number, part in enumerate(message.content):
        if part.type != "text" or part.text is None:
            name = f"{where}.content[{number}]"
            raise RequestError(
                400, f"{name}: this model reads only text parts", param=name, code="not_available"
            )


def _plain(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """As dictionaries without what was not given; a template tells absent from null."""
    plain = [_without_nulls(msgspec.to_builtins(message)) for message in messages]
    for message in plain:
        message.setdefault("content", None)
        if message["role"] == "developer":
            message["role"] = "system"
    return plain


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _characters(messages: str | list[ChatMessage]) -> int:
    if isinstance(messages, str):
        return len(messages)
    return sum(_content_characters(message) for message in messages)


def _content_characters(message: ChatMessage) -> int:
    if isinstance(message.content, list):
        return 64 + sum(len(part.text or "") for part in message.content)
    return 64 + len(message.content or "")


class _Answer:
    """One choice as it is put together."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.logprobs: list[ChatTokenLogprob] = []
        self.last: Piece | None = None


async def _collect(service: Service, generation: Generation) -> ChatCompletion:
    """Waits for every choice."""
    answers = [_Answer() for _ in generation.choices]
    while not generation.done:
        for piece in await generation.advance():
            answer = answers[piece.index]
            answer.texts.append(piece.text)
            if piece.logprobs:
                answer.logprobs += chat_logprobs(service.tokenizer, piece).content
            answer.last = piece
    await generation.settle()
    wants_logprobs = generation.job.sampling.logprobs >= 0
    return ChatCompletion(
        id=_completion_id(generation),
        created=now(),
        model=service.settings.model_name,
        choices=[_choice(index, answer, wants_logprobs) for index, answer in enumerate(answers)],
        usage=generation.usage(),
        system_fingerprint=service.fingerprint,
    )


def _choice(index: int, answer: _Answer, wants_logprobs: bool) -> ChatChoice:
    assert answer.last is not None
    assert answer.last.finish_reason is not None
    return ChatChoice(
        index,
        AnswerMessage("".join(answer.texts)),
        answer.last.finish_reason,
        answer.last.stop_reason,
        ChatLogprobs(answer.logprobs) if wants_logprobs else None,
    )


class _ChatWriter:
    """Chunks in the chat form."""

    def __init__(self, service: Service, generation: Generation, request: ChatCompletionRequest) -> None:
        options = request.stream_options
        self._service = service
        self._generation = generation
        self._id = _completion_id(generation)
        self._created = now()
        self._wants_usage = options is not None and bool(options.include_usage)
        self._continuous = options is not None and bool(options.continuous_usage_stats)

    def opening(self) -> list[msgspec.Struct]:
        """Each choice's role."""
        return [
            self._chunk(ChatChunkChoice(choice.index, Delta(role="assistant", content="")))
            for choice in self._generation.choices
        ]

    def chunks(self, piece: Piece) -> list[msgspec.Struct]:
        """The text, then the reason of the end."""
        logprobs = chat_logprobs(self._service.tokenizer, piece) if piece.logprobs else None
        chunks = []
        if piece.text or logprobs is not None:
            chunks.append(
                self._chunk(ChatChunkChoice(piece.index, Delta(content=piece.text), logprobs=logprobs))
            )
        if piece.finish_reason is not None:
            last = ChatChunkChoice(piece.index, Delta(), piece.finish_reason, piece.stop_reason)
            chunks.append(self._chunk(last))
        return chunks

    def closing(self) -> list[msgspec.Struct]:
        """The usage, in a chunk without choices."""
        return [self._chunk(None, self._generation.usage())] if self._wants_usage else []

    def _chunk(self, choice: ChatChunkChoice | None, usage: Usage | None = None) -> msgspec.Struct:
        shown: Usage | UnsetType | None = usage
        if usage is None and self._continuous:
            shown = self._generation.usage()
        elif usage is None and not self._wants_usage:
            shown = UNSET
        return ChatChunk(
            self._id,
            self._created,
            self._service.settings.model_name,
            [] if choice is None else [choice],
            self._service.fingerprint,
            shown,
        )


def _completion_id(generation: Generation) -> str:
    return f"chatcmpl-{generation.job.label}"
