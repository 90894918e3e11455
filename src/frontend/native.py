"""POST /generate: raw prompts in, ``{text, output_ids, meta_info}`` out, as LMDeploy (0.10 and later) and SGLang have
it. A body in the form that LMDeploy's /generate had in 2023 is a turn of /v1/chat/interactive."""

from collections.abc import Sequence
from typing import Any, Final, cast

import falcon
import falcon.asgi
import msgspec
from msgspec import UNSET, Struct

from shoal.errors import RequestError
from shoal.frontend import body, checks, interactive, stream
from shoal.frontend.exchange import Exchange, exchange_of
from shoal.frontend.generation import Generation
from shoal.frontend.inputs import characters
from shoal.frontend.native_writer import NativeWriter
from shoal.frontend.prompts import text_ids
from shoal.frontend.routes import Operation, Route
from shoal.frontend.schemas.base import Whole
from shoal.frontend.schemas.completions import CompletionRequest
from shoal.frontend.schemas.errors import ErrorAnswer
from shoal.frontend.schemas.native import NativeAnswer, NativeRequest, SamplingFields
from shoal.frontend.service import Service, off_loop
from shoal.frontend.unavailable import refuse_unavailable
from shoal.frontend.values import invalid, prompt_ids, whole
from shoal.messages import Limits

_ENCODER: Final = msgspec.json.Encoder()
_DEFAULT_TOKENS: Final = 128
_MOST_TOP: Final = 20
_RENAMED: Final = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "sampling_seed": "seed",
    "no_stop_trim": "include_stop_str_in_output",
}
"""SGLang's names of fields, and those of /v1/completions."""
_BESIDE: Final = ("max_tokens", "seed", "include_stop_str_in_output")
"""What LMDeploy's form has beside ``SamplingFields``."""

Prompt = str | list[int]


class _Probe(Struct):
    """What tells a body of 2023."""

    interactive_mode: Any = UNSET
    request_output_len: Any = UNSET
    cancel: Any = UNSET
    messages: Any = UNSET
    prompt: Any = UNSET
    stop: Any = UNSET


def routes(service: Service) -> list[Route]:
    """The route."""
    return [
        Route(
            path="/generate",
            resource=Generate(service),
            operations={
                "POST": Operation(
                    summary="Continue raw prompts, in LMDeploy's and SGLang's native forms",
                    description=_DESCRIPTION,
                    body=NativeRequest,
                    answer=NativeAnswer,
                    event=NativeAnswer,
                    event_error=ErrorAnswer,
                    event_end=stream.DONE,
                    errors=(404, 408, 409, 413),
                )
            },
        )
    ]


_DESCRIPTION: Final = (
    "In LMDeploy's form (`prompt`, how to sample beside it) a stream's events hold what is new; in SGLang's (`text` "
    "or `sampling_params`) all there is so far. Several prompts, or `n`, are answered by a list of answers. A body "
    "with a field that only LMDeploy's route of 2023 had (`interactive_mode`, `request_output_len`, `cancel`, a "
    "boolean `stop`, a history as `prompt`) is taken as a call of `/v1/chat/interactive`."
)


class Generate:
    """The route."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Answers each prompt, whole or as a stream."""
        raw = await body.read_bytes(req)
        if is_of_2023(raw):
            await interactive.answer(self._service, req, resp, raw)
            return
        request = body.decode_for(req, raw, NativeRequest)
        checks.check_task(self._service)
        refuse_unavailable(request, "")
        self._service.check_model(request.model)
        exchange = exchange_of(req)
        _adopt_name(exchange, request.rid)
        completion = completion_of(request)
        generation = await self._open(req, exchange, request, completion)
        writer = NativeWriter(
            self._service,
            generation,
            request,
            several=_is_several(request, generation),
            scored_from=scored_from(request),
        )
        if request.stream:
            await stream.begin(req, resp, exchange, generation, writer)
        else:
            resp.content_type = falcon.MEDIA_JSON
            resp.data = _ENCODER.encode(await _collect(generation, writer))

    async def _open(
        self,
        req: falcon.asgi.Request,
        exchange: Exchange,
        request: NativeRequest,
        completion: CompletionRequest,
    ) -> Generation:
        service = self._service
        limits = await service.switchboard.wait_ready()
        prompts = await off_loop(_characters(request), lambda: _prompts(service, limits, request))
        job = checks.make_job(
            service, completion, prompts, limits,
            label=exchange.request_id,
            logprobs=_top(request) if request.return_logprob else -1,
            header_timeout=req.get_header("X-Request-Timeout"),
            tenant=exchange.tenant, priority=exchange.priority,
        )  # fmt: skip
        generation = Generation(service, job)
        exchange.open(generation)
        return generation


def _adopt_name(exchange: Exchange, rid: str | None) -> None:
    try:
        exchange.adopt_request_id(rid)
    except RequestError as error:
        raise invalid("rid", error.message.partition(": ")[2]) from error


def is_of_2023(raw: bytes) -> bool:
    """Whether a body is in the form that LMDeploy's /generate had in 2023. One that is no JSON object is not: the
    decoder says so better."""
    try:
        probe = msgspec.json.decode(raw, type=_Probe)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    named = (probe.interactive_mode, probe.request_output_len, probe.cancel, probe.messages)
    return (
        any(value is not UNSET for value in named)
        or isinstance(probe.stop, bool)
        or isinstance(probe.prompt, list)
    )


def completion_of(request: NativeRequest) -> CompletionRequest:
    """The same wishes as a body of /v1/completions, whose checks they then go through. Raises RequestError."""
    wishes: SamplingFields = request
    names = [*SamplingFields.__struct_fields__, *_BESIDE]
    if request.sampling_params is not None:
        wishes = request.sampling_params
        for name in names:
            if getattr(request, name) is not None:
                raise invalid(name, "belongs into sampling_params, where those are given")
        names = [*SamplingFields.__struct_fields__, "n", *_RENAMED]
    if request.stream and scored_from(request) >= 0:
        raise invalid(
            "logprob_start_len", "the prompt's log-probabilities are not part of a stream; leave out stream"
        )
    fields = {_RENAMED.get(name, name): getattr(wishes, name) for name in names}
    fields.pop("spaces_between_special_tokens")
    if fields["max_tokens"] is None:
        fields["max_tokens"] = _DEFAULT_TOKENS
    return CompletionRequest(
        prompt="",
        stream=request.stream,
        timeout=request.timeout,
        priority=request.priority,
        return_token_ids=True,
        prompt_logprobs=_top(request) if scored_from(request) >= 0 else None,
        **fields,
    )


def scored_from(request: NativeRequest) -> int:
    """From which prompt token on log-probabilities are told; -1: of none."""
    start = whole("logprob_start_len", request.logprob_start_len, -1, -1, 1 << 31)
    return start if request.return_logprob else -1


def _top(request: NativeRequest) -> int:
    return whole("top_logprobs_num", request.top_logprobs_num, 0, 0, _MOST_TOP)


def _prompts(service: Service, limits: Limits, request: NativeRequest) -> list[list[int]]:
    given = [name for name in ("prompt", "text", "input_ids") if getattr(request, name) is not None]
    if len(given) != 1:
        raise invalid(given[0] if given else "prompt", "give exactly one of prompt, text and input_ids")
    if request.input_ids is not None:
        return _id_prompts(service, request.input_ids)
    texts: str | list[str] = (request.prompt if request.text is None else request.text) or ""
    several = isinstance(texts, list)
    prompts = []
    for number, text in enumerate(texts if isinstance(texts, list) else [texts]):
        name = f"{given[0]}[{number}]" if several else given[0]
        ids = text_ids(service, limits, text, add_special=True, field=name)
        if not ids:
            raise invalid(name, "must not be empty")
        prompts.append(ids)
    return prompts


def _id_prompts(service: Service, given: Sequence[Whole | list[Whole]]) -> list[list[int]]:
    if given and all(isinstance(item, list) for item in given):
        lists = cast("Sequence[list[Whole]]", given)
        return [prompt_ids(service, f"input_ids[{number}]", ids) for number, ids in enumerate(lists)]
    if any(isinstance(item, list) for item in given):
        raise invalid("input_ids", "must be a list of ids, or a list of lists of ids")
    return [prompt_ids(service, "input_ids", cast("Sequence[Whole]", given))]


def _is_several(request: NativeRequest, generation: Generation) -> bool:
    """Whether a list is answered: for a list of one prompt, too."""
    listed = isinstance(request.text, list) or isinstance((request.input_ids or [0])[0], list)
    return listed or len(generation.choices) > 1


def _characters(request: NativeRequest) -> int:
    given = request.text if request.prompt is None else request.prompt
    return characters(cast("Any", given if given is not None else request.input_ids or []))


async def _collect(generation: Generation, writer: NativeWriter) -> NativeAnswer | list[NativeAnswer]:
    while not generation.done:
        for piece in await generation.advance():
            writer.add(piece)
    await generation.settle()
    answers = writer.whole()
    return answers if writer.several else answers[0]
