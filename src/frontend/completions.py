"""POST /v1/completions: raw prompts as text or ids, one or many, answers in OpenAI's completions form."""

from typing import Final, cast

import falcon
import falcon.asgi
import msgspec
from msgspec import UNSET, UnsetType

from shoal.frontend import body, checks, stream
from shoal.frontend.api_types import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    Usage,
)
from shoal.frontend.exchange import exchange_of
from shoal.frontend.generation import Generation, Piece
from shoal.frontend.logprobs import CompletionLogprobWriter
from shoal.frontend.prompts import text_ids
from shoal.frontend.service import Service, now, off_loop
from shoal.messages import Limits

_ENCODER: Final = msgspec.json.Encoder()


class Completions:
    """The route."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Answers every prompt, whole or as a stream; choices are numbered prompt by prompt."""
        exchange = exchange_of(req)
        request = await body.read(req, CompletionRequest)
        self._service.check_model(request.model)
        checks.check_available(request)
        checks.check_best_of(request)
        exchange.user = request.user or ""
        logprobs = checks.completion_logprobs(request)
        limits = await self._service.switchboard.wait_ready()
        prompts = await off_loop(
            _characters(request.prompt), lambda: _prompts(self._service, limits, request.prompt)
        )
        job = checks.make_job(
            self._service, request, prompts,
            label=exchange.request_id, logprobs=logprobs, header_timeout=req.get_header("X-Request-Timeout"),
        )  # fmt: skip
        generation = Generation(self._service, job)
        exchange.open(generation)
        writer = _CompletionWriter(self._service, generation, request)
        if request.stream:
            await stream.begin(req, resp, exchange, generation, writer)
        else:
            resp.content_type = falcon.MEDIA_JSON
            resp.data = _ENCODER.encode(await _collect(generation, writer))


def _prompts(service: Service, limits: Limits, prompt: str | list[str | int | list[int]]) -> list[list[int]]:
    """The token ids of each prompt. Texts get what the model wants around a raw prompt, ids are taken as they are."""
    if isinstance(prompt, str):
        return [_text_ids(service, limits, prompt, "prompt")]
    if not prompt:
        raise checks.invalid("prompt", "must not be empty")
    if all(isinstance(item, str) for item in prompt):
        _check_many(len(prompt))
        return [
            _text_ids(service, limits, text, f"prompt[{n}]") for n, text in enumerate(cast("list[str]", prompt))
        ]
    if all(isinstance(item, int) for item in prompt):
        ids = cast("list[int]", prompt)
        checks.check_ids(service, ids, "prompt")
        return [ids]
    if all(isinstance(item, list) for item in prompt):
        _check_many(len(prompt))
        lists = cast("list[list[int]]", prompt)
        for number, ids in enumerate(lists):
            checks.check_ids(service, ids, f"prompt[{number}]")
        return lists
    raise checks.invalid(
        "prompt", "must be a string, a list of strings, a list of ids, or a list of lists of ids"
    )


def _text_ids(service: Service, limits: Limits, text: str, name: str) -> list[int]:
    ids = text_ids(service, limits, text, add_special=True, field=name)
    if ids:
        return ids
    bos_id = service.tokenizer.bos_id
    if bos_id is None or bos_id >= service.vocab_size:
        raise checks.invalid(name, "must not be empty: this model has no token for the beginning of a text")
    return [bos_id]


def _check_many(prompts: int) -> None:
    if prompts > checks.MOST_SEQUENCES:
        raise checks.invalid(
            "prompt", f"has {prompts} prompts; at most {checks.MOST_SEQUENCES} are taken at once"
        )


def _characters(prompt: str | list[str | int | list[int]]) -> int:
    if isinstance(prompt, str):
        return len(prompt)
    return sum(1 if isinstance(item, int) else len(item) for item in prompt)


async def _collect(generation: Generation, writer: "_CompletionWriter") -> Completion:
    """Waits for every choice."""
    pieces: list[list[Piece]] = [[] for _ in generation.choices]
    while not generation.done:
        for piece in await generation.advance():
            pieces[piece.index].append(piece)
    await generation.settle()
    choices = [writer.whole_choice(index, parts) for index, parts in enumerate(pieces)]
    return writer.completion(choices, generation.usage())


class _CompletionWriter:
    """Answers and chunks in the completions form."""

    def __init__(self, service: Service, generation: Generation, request: CompletionRequest) -> None:
        options = request.stream_options
        self._generation = generation
        self._model = service.settings.model_name
        self._fingerprint = service.fingerprint
        self._created = now()
        self._wants_usage = options is not None and bool(options.include_usage)
        self._continuous = options is not None and bool(options.continuous_usage_stats)
        self._logprobs = [CompletionLogprobWriter(service.tokenizer) for _ in generation.choices]
        self._wants_logprobs = generation.job.sampling.logprobs >= 0

    def opening(self) -> list[msgspec.Struct]:
        """Nothing: this form has no roles."""
        return []

    def chunks(self, piece: Piece) -> list[msgspec.Struct]:
        """One chunk with the text and, in the last, the reason of the end."""
        if not (piece.text or piece.logprobs or piece.finish_reason):
            return []
        logprobs = self._logprobs[piece.index].write(piece) if piece.logprobs else None
        choice = CompletionChoice(piece.index, piece.text, piece.finish_reason, piece.stop_reason, logprobs)
        shown: Usage | UnsetType | None = None if self._wants_usage else UNSET
        return [self.completion([choice], self._generation.usage() if self._continuous else shown)]

    def closing(self) -> list[msgspec.Struct]:
        """The usage, in a chunk without choices."""
        return [self.completion([], self._generation.usage())] if self._wants_usage else []

    def whole_choice(self, index: int, pieces: list[Piece]) -> CompletionChoice:
        """A complete answer."""
        return CompletionChoice(
            index,
            "".join([piece.text for piece in pieces]),
            pieces[-1].finish_reason,
            pieces[-1].stop_reason,
            self._joined_logprobs(index, pieces) if self._wants_logprobs else None,
        )

    def completion(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
        """The frame around choices."""
        return Completion(
            f"cmpl-{self._generation.job.label}", self._created, self._model, choices, self._fingerprint, usage
        )

    def _joined_logprobs(self, index: int, pieces: list[Piece]) -> CompletionLogprobs:
        whole = CompletionLogprobs([], [], [], [])
        for piece in pieces:
            if piece.logprobs:
                part = self._logprobs[index].write(piece)
                whole.tokens += part.tokens
                whole.token_logprobs += part.token_logprobs
                whole.top_logprobs += part.top_logprobs
                whole.text_offset += part.text_offset
        return whole
