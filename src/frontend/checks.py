"""From a decoded body to a ``Job``: every value checked, every default filled in, the rest refused by name.

Called by the routes before anything is sent to the scheduler. Single fields are looked at in ``sampling.py`` (how
tokens are drawn) and ``stops.py`` (what ends an answer); here is what concerns the request as a whole.
"""

import math
import time
from typing import Final

from msgspec import UNSET, Struct, UnsetType

from shoal.errors import RequestError
from shoal.frontend.prompts import overflow
from shoal.frontend.sampling import MOST_TOP_LOGPROBS, least_tokens, sampling_of
from shoal.frontend.schemas.base import GenerationRequest, Whole
from shoal.frontend.schemas.chat import ChatCompletionRequest
from shoal.frontend.schemas.completions import CompletionRequest
from shoal.frontend.service import Service
from shoal.frontend.stops import repetition_limit, stop_ids, stop_strings
from shoal.frontend.unavailable import refuse_unavailable
from shoal.frontend.values import invalid, number, whole
from shoal.messages import Grammar, Limits, Pooling, RepetitionLimit, Sampling, ThinkingBudget

MOST_CHOICES: Final = 16
MOST_SEQUENCES: Final = 256
"""Of one HTTP request: choices times the prompts."""
_LONGEST_TIMEOUT_S: Final = 86_400.0
_LONGEST_SALT: Final = 1024
_MOST_METADATA: Final = 16
_LONGEST_METADATA_KEY: Final = 64
_LONGEST_METADATA_VALUE: Final = 512
_LONGEST_NAME: Final = 100_000
_MOST_PRIORITY: Final = 1 << 31
_COMPLETION_DEFAULT_TOKENS: Final = 16


class Job(Struct, frozen=True, kw_only=True):
    """One HTTP request's generation, complete: ``choices`` answers to each prompt."""

    label: str
    prompts: tuple[list[int], ...]
    choices: int
    sampling: Sampling
    max_tokens: tuple[int, ...]
    """One a prompt."""
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    skip_special: bool
    """All but ``shown_ids``."""
    deadline_ns: int
    goes_on: bool = False
    """The answer stands within a text, right behind the prompt, so a space at its beginning is its own."""
    include_stop: bool = False
    """Whether what ended the answer is shown as a part of it."""
    shown_ids: frozenset[int] = frozenset()
    """Special tokens whose text is needed to read the answer."""
    reports_ids: bool = False
    """Whether every token is reported, also where it makes no text yet."""
    prompt_logprobs: int = -1
    """As in ``Submit``; of each prompt's first choice."""
    scores_every_choice: bool = False
    """Prompt log-probabilities of all choices: a stream cannot wait for the first one's."""
    prompt_only: bool = False
    """Nothing is generated for the client: the one token that a sequence must have is dropped."""
    pooling: Pooling = ""
    tenant: str = ""
    priority: int = 0
    cache_salt: str = ""
    repetition: RepetitionLimit | None = None


def check_task(service: Service) -> None:
    """Refuses to generate with a model that is served for its vectors."""
    if service.settings.task == "embed":
        message = (
            "this server was started with --task embed: it answers /v1/embeddings and /pooling and generates "
            "nothing; start it without --task embed to generate"
        )
        raise RequestError(400, message, param="model", code="wrong_task")


def check_available(request: GenerationRequest) -> None:
    """Refuses what the contract has and this server cannot honour, and hints that are malformed."""
    refuse_unavailable(request, "")
    options = request.stream_options
    if options is not None and not request.stream and (options.include_usage or options.continuous_usage_stats):
        raise invalid("stream_options", "is only allowed with stream: true")
    _check_hints(request)
    if request.adapter_name:
        refusal = f"the adapter {request.adapter_name[:100]!r} is not served here; served adapters: none"
        raise RequestError(404, refusal, param="adapter_name", code="adapter_not_found")


def make_job(
    service: Service,
    request: ChatCompletionRequest | CompletionRequest,
    prompts: list[list[int]],
    limits: Limits,
    *,
    label: str,
    logprobs: int,
    header_timeout: str | None,
    tenant: str = "",
    priority: int = 0,
    grammar: Grammar | None = None,
    thinking: ThinkingBudget | None = None,
    also_stop_ids: tuple[int, ...] = (),
) -> Job:
    """The job that ``request`` describes for ``prompts``, within the running model's ``limits``. ``priority`` is added
    to the request's own."""
    check_task(service)
    choices = _choices(request, len(prompts))
    ends = stop_ids(service, request, also_stop_ids)
    prompt_only = _is_prompt_only(request)
    wanted = 1 if prompt_only else _wanted_tokens(request)
    max_tokens = tuple(_fit(request, len(prompt), wanted, limits) for prompt in prompts)
    _check_least(request, min(max_tokens))
    return Job(
        label=label,
        prompts=tuple(prompts),
        choices=choices,
        sampling=sampling_of(
            service, request,
            logprobs=max(logprobs, 0) if _ranks_choices(request) else logprobs,
            stop_ids=ends, grammar=grammar, thinking=thinking,
        ),
        max_tokens=max_tokens,
        stop=stop_strings(request),
        stop_ids=ends,
        skip_special=request.skip_special_tokens is not False,
        deadline_ns=deadline_ns(request.timeout, header_timeout),
        goes_on=_goes_on(request),
        include_stop=bool(request.include_stop_str_in_output),
        reports_ids=bool(request.return_token_ids),
        prompt_logprobs=prompt_logprobs(request),
        scores_every_choice=bool(request.stream),
        prompt_only=prompt_only,
        tenant=tenant,
        priority=priority + own_priority(request.priority),
        cache_salt=_cache_salt(request),
        repetition=repetition_limit(request),
    )  # fmt: skip


def tier_of(request: GenerationRequest) -> str | UnsetType:
    """``service_tier`` of the answer: there is one tier, and it is named where the request named one."""
    return UNSET if request.service_tier is None else "default"


def chat_logprobs(request: ChatCompletionRequest) -> int:
    """``Sampling.logprobs`` for the chat form."""
    top = whole("top_logprobs", request.top_logprobs, 0, 0, MOST_TOP_LOGPROBS)
    if top and not request.logprobs:
        raise invalid("top_logprobs", "needs logprobs: true")
    return top if request.logprobs else -1


def completion_logprobs(request: CompletionRequest) -> int:
    """``Sampling.logprobs`` for the completions form."""
    if request.logprobs is None or request.logprobs is False:
        return -1
    if request.logprobs is True:
        raise invalid("logprobs", "must be the number of candidates, for example 1")
    return whole("logprobs", request.logprobs, 0, 0, MOST_TOP_LOGPROBS)


def prompt_logprobs(request: GenerationRequest) -> int:
    """``Submit.prompt_logprobs``: asked for by name, or by ``echo`` together with ``logprobs``."""
    named = -1
    if request.prompt_logprobs is not None:
        named = whole("prompt_logprobs", request.prompt_logprobs, 0, 0, MOST_TOP_LOGPROBS)
        if request.stream:
            raise invalid("prompt_logprobs", "are not part of a stream; leave out stream: true")
    if isinstance(request, CompletionRequest) and request.echo:
        return max(named, completion_logprobs(request))
    return named


def deadline_ns(body_timeout: float | None, header_timeout: str | None) -> int:
    """The earlier one of the body's and the header's deadlines, as ``Submit`` has it."""
    timeouts = []
    if body_timeout is not None:
        timeouts.append(number("timeout", body_timeout, 0, 0, _LONGEST_TIMEOUT_S, above=True))
    if header_timeout is not None:
        timeouts.append(
            number("X-Request-Timeout", _seconds(header_timeout), 0, 0, _LONGEST_TIMEOUT_S, above=True)
        )
    return time.time_ns() + int(min(timeouts) * 1e9) if timeouts else 0


def own_priority(priority: Whole | None) -> int:
    """What a request asks for; lower runs first."""
    return whole("priority", priority, 0, -_MOST_PRIORITY, _MOST_PRIORITY)


# --- inside ----------------------------------------------------------------------------------------------


def _check_hints(request: GenerationRequest) -> None:
    """OpenAI's hints change no token, but must be what OpenAI takes."""
    metadata = request.metadata or {}
    if len(metadata) > _MOST_METADATA:
        raise invalid("metadata", f"has {len(metadata)} keys; at most {_MOST_METADATA} are taken")
    for key, value in metadata.items():
        if len(key) > _LONGEST_METADATA_KEY or len(value) > _LONGEST_METADATA_VALUE:
            limits = f"{_LONGEST_METADATA_KEY} characters, values at most {_LONGEST_METADATA_VALUE}"
            raise invalid("metadata", f"keys have at most {limits}; see {key[:40]!r}")
    for name, text, most in (
        ("user", request.user, _LONGEST_NAME),
        ("safety_identifier", request.safety_identifier, 64),
        ("prompt_cache_key", request.prompt_cache_key, _LONGEST_NAME),
    ):
        if text is not None and len(text) > most:
            raise invalid(name, f"has {len(text)} characters; at most {most} are taken")
    if request.prompt_cache_retention not in (None, "in_memory", "in-memory", "24h"):
        raise invalid("prompt_cache_retention", "must be in_memory or 24h")


def _choices(request: GenerationRequest, prompts: int) -> int:
    """How many answers are generated to each prompt."""
    n = whole("n", request.n, 1, 1, MOST_CHOICES)
    if _ranks_choices(request):
        assert isinstance(request, CompletionRequest)
        best_of = whole("best_of", request.best_of, 1, 1, MOST_CHOICES)
        if best_of < n:
            raise invalid("best_of", f"must be at least n, which is {n}, not {best_of}")
        if request.stream:
            raise invalid("best_of", "needs every answer before it can choose; leave out stream: true")
        n = best_of
    if n * prompts > MOST_SEQUENCES:
        message = f"{prompts} prompts with n={n} are more than {MOST_SEQUENCES} answers; send fewer at once"
        raise RequestError(400, message, param="n", code="too_many_choices")
    return n


def _ranks_choices(request: GenerationRequest) -> bool:
    """Whether more answers are generated than are returned. ``best_of: 1`` asks for nothing, whatever ``n`` is."""
    return isinstance(request, CompletionRequest) and request.best_of not in (None, 1, request.n or 1)


def _goes_on(request: ChatCompletionRequest | CompletionRequest) -> bool:
    """Whether the answer stands right behind a text, and not at the beginning of a message."""
    if isinstance(request, CompletionRequest):
        return True
    raw = isinstance(request.messages, str) or request.do_preprocess is False or bool(request.input_ids)
    return raw or bool(request.continue_final_message)


def _is_prompt_only(request: GenerationRequest) -> bool:
    return isinstance(request, CompletionRequest) and bool(request.echo) and request.max_tokens == 0


def _wanted_tokens(request: GenerationRequest) -> int | None:
    most = 1 << 31
    wanted = None if request.max_tokens is None else whole("max_tokens", request.max_tokens, 0, 1, most)
    if request.max_completion_tokens is None:
        return wanted
    newer = whole("max_completion_tokens", request.max_completion_tokens, 0, 1, most)
    if wanted is not None and wanted != newer:
        raise invalid("max_tokens", f"{wanted} contradicts max_completion_tokens: {newer}; give one of them")
    return newer


def _fit(request: GenerationRequest, prompt_tokens: int, wanted: int | None, limits: Limits) -> int:
    """How many new tokens at most. Raises RequestError 400 where prompt and answer do not fit."""
    room = limits.session_len - prompt_tokens
    if wanted is None:
        is_chat = isinstance(request, ChatCompletionRequest)
        wanted = max(1, room if is_chat else min(_COMPLETION_DEFAULT_TOKENS, room))
    if wanted > room:
        field = "messages" if isinstance(request, ChatCompletionRequest) else "prompt"
        numbers = (
            f"{prompt_tokens + wanted} were asked for ({prompt_tokens} in the {field}, {wanted} in the answer)"
        )
        raise overflow(limits, field, numbers)
    return wanted


def _check_least(request: GenerationRequest, max_tokens: int) -> None:
    least = least_tokens(request)
    if least > max_tokens:
        raise invalid("min_tokens", f"{least} are more than the {max_tokens} that the answer may have")


def _cache_salt(request: GenerationRequest) -> str:
    salt = request.cache_salt or ""
    if len(salt) > _LONGEST_SALT:
        raise invalid("cache_salt", f"has {len(salt)} characters; at most {_LONGEST_SALT} are taken")
    return salt


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise invalid("X-Request-Timeout", f"must be a number of seconds, not {text[:40]!r}")
    return seconds
