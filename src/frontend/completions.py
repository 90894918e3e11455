"""POST /v1/completions: raw prompts as text or ids, one or many, answers in OpenAI's completions form."""

from typing import Final, cast

import falcon
import falcon.asgi
import msgspec

from shoal.errors import RequestError
from shoal.frontend import body, checks, stream
from shoal.frontend.answer_form import answer_form
from shoal.frontend.completion_writer import CompletionWriter, Echo
from shoal.frontend.constraint import Held, grammar_of
from shoal.frontend.exchange import exchange_of
from shoal.frontend.generation import Generation, Piece
from shoal.frontend.infill import Infill, infill_of
from shoal.frontend.prompts import text_ids
from shoal.frontend.routes import Operation, Route
from shoal.frontend.schemas.completions import Completion, CompletionRequest
from shoal.frontend.schemas.errors import ErrorAnswer
from shoal.frontend.service import Service, off_loop
from shoal.frontend.values import invalid, prompt_ids
from shoal.messages import Limits

_ENCODER: Final = msgspec.json.Encoder()


def routes(service: Service) -> list[Route]:
    """The completions route."""
    return [
        Route(
            path="/v1/completions",
            resource=Completions(service),
            operations={
                "POST": Operation(
                    summary="Continue raw prompts",
                    body=CompletionRequest,
                    answer=Completion,
                    event=Completion,
                    event_error=ErrorAnswer,
                    event_end=stream.DONE,
                    errors=(404, 408, 413),
                )
            },
            stateless=True,
        )
    ]


class Completions:
    """The route."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._infill = infill_of(service.tokenizer)

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Answers every prompt, whole or as a stream; choices are numbered prompt by prompt."""
        exchange = exchange_of(req)
        request = await body.read(req, CompletionRequest)
        service = self._service
        checks.check_task(service)
        service.check_model(request.model)
        checks.check_available(request)
        exchange.note(request)
        logprobs = checks.completion_logprobs(request)
        infill = self._infill_for(request)
        limits = await service.switchboard.wait_ready()
        prompts = await off_loop(
            _characters(request.prompt) + len(request.suffix or ""),
            lambda: _Prompts(service, limits, request, infill).ids(),
        )
        form = answer_form(request)
        held = Held(form=form, wish=None, tool_format=None, markers=None)
        grammar = await grammar_of(service, request, held)
        job = checks.make_job(
            service, request, prompts, limits,
            label=exchange.request_id, logprobs=logprobs, header_timeout=req.get_header("X-Request-Timeout"),
            tenant=exchange.tenant, priority=exchange.priority, grammar=grammar,
            also_stop_ids=() if infill is None else infill.end_ids,
        )  # fmt: skip
        echoes = [_echo(service, request, prompt, number) for number, prompt in enumerate(prompts)]
        generation = Generation(service, job)
        exchange.open(generation)
        writer = CompletionWriter(service, generation, request, echoes)
        if request.stream:
            await stream.begin(req, resp, exchange, generation, writer)
        else:
            resp.content_type = falcon.MEDIA_JSON
            resp.data = _ENCODER.encode(await _collect(generation, writer))

    def _infill_for(self, request: CompletionRequest) -> Infill | None:
        """The model's tokens for a middle, where the request has a suffix."""
        if not request.suffix:
            return None
        if self._infill is None:
            message = (
                "suffix: this model was not trained to fill in the middle (its vocabulary has no tokens for it); "
                "leave suffix out, or serve a code model that was"
            )
            raise RequestError(400, message, param="suffix", code="not_available")
        if request.echo and checks.completion_logprobs(request) >= 0:
            raise invalid("suffix", "the prompt's tokens are not its text here: leave out echo or logprobs")
        return self._infill


class _Prompts:
    """The token ids of each prompt. Texts get what the model wants around a raw prompt, ids are taken as they are."""

    def __init__(
        self, service: Service, limits: Limits, request: CompletionRequest, infill: Infill | None
    ) -> None:
        self._service = service
        self._limits = limits
        self._prompt = request.prompt
        self._suffix = request.suffix or ""
        self._infill = infill
        self._add_special = request.add_special_tokens is not False and infill is None

    def ids(self) -> list[list[int]]:
        """All of them, in order."""
        prompt = self._prompt
        if isinstance(prompt, str):
            return [self._of_text(prompt, "prompt")]
        if not prompt:
            raise invalid("prompt", "must not be empty")
        if all(isinstance(item, str) for item in prompt):
            _check_many(len(prompt))
            return [self._of_text(text, f"prompt[{n}]") for n, text in enumerate(cast("list[str]", prompt))]
        if all(isinstance(item, int) for item in prompt):
            return [self._of_ids(cast("list[int]", prompt), "prompt")]
        if all(isinstance(item, list) for item in prompt):
            _check_many(len(prompt))
            lists = cast("list[list[int]]", prompt)
            return [self._of_ids(ids, f"prompt[{n}]") for n, ids in enumerate(lists)]
        raise invalid("prompt", "must be a string, a list of strings, a list of ids, or a list of lists of ids")

    def _of_ids(self, ids: list[int], name: str) -> list[int]:
        return self._with_suffix(prompt_ids(self._service, name, ids))

    def _of_text(self, text: str, name: str) -> list[int]:
        service = self._service
        ids = text_ids(service, self._limits, text, add_special=self._add_special, field=name)
        if ids or self._infill is not None:
            return self._with_suffix(ids)
        bos_id = service.tokenizer.bos_id
        if bos_id is None or bos_id >= service.vocab_size:
            raise invalid(name, "must not be empty: this model has no token for the beginning of a text")
        return [bos_id]

    def _with_suffix(self, ids: list[int]) -> list[int]:
        if self._infill is None:
            return ids
        text_ids(self._service, self._limits, self._suffix, add_special=False, field="suffix")
        return self._infill.prompt(self._service.tokenizer, ids, self._suffix)


def _echo(service: Service, request: CompletionRequest, ids: list[int], number: int) -> Echo | None:
    """What of the prompt stands before its answers."""
    if not request.echo:
        return None
    prompt = request.prompt
    given = prompt if isinstance(prompt, str) else prompt[number]
    if isinstance(given, str):
        opening = service.tokenizer.opening
        unseen = len(opening) if tuple(ids[: len(opening)]) == opening else 0
        return Echo(text=given, unseen=unseen if given else len(ids))
    own = given if isinstance(given, list) else cast("list[int]", prompt)
    return Echo(text=service.tokenizer.decode(own, skip_special=False))


def _check_many(prompts: int) -> None:
    if prompts > checks.MOST_SEQUENCES:
        raise invalid("prompt", f"has {prompts} prompts; at most {checks.MOST_SEQUENCES} are taken at once")


def _characters(prompt: str | list[str | int | list[int]]) -> int:
    if isinstance(prompt, str):
        return len(prompt)
    return sum(1 if isinstance(item, int) else len(item) for item in prompt)


async def _collect(generation: Generation, writer: CompletionWriter) -> Completion:
    """Waits for every choice."""
    pieces: list[list[Piece]] = [[] for _ in generation.choices]
    while not generation.done:
        for piece in await generation.advance():
            pieces[piece.index].append(piece)
    await generation.settle()
    return writer.whole(pieces)
