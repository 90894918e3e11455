"""From a decoded body to a ``Job``: every value checked, every default filled in, the rest refused by name.

Called by the routes before anything is sent to the scheduler.
"""

import math
import secrets
import time
from typing import Any, Final

from msgspec import Struct

from shoal.errors import RequestError
from shoal.frontend.api_types import (
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    GenerationRequest,
    RequestBody,
    StreamOptions,
    Whole,
    neutral_values,
)
from shoal.frontend.prompts import overflow
from shoal.frontend.service import Service
from shoal.messages import Limits, Sampling

MOST_CHOICES: Final = 16
MOST_SEQUENCES: Final = 256
"""Of one HTTP request: n times the prompts."""
_MOST_STOPS: Final = 16
_MOST_STOP_CHARACTERS: Final = 1024
_MOST_STOP_IDS: Final = 256
_MOST_BIASES: Final = 4096
_MOST_TOP_LOGPROBS: Final = 20
_LONGEST_TIMEOUT_S: Final = 86_400.0
_COMPLETION_DEFAULT_TOKENS: Final = 16
_SEED_MASK: Final = (1 << 64) - 1
_NEUTRAL: Final[dict[type[GenerationRequest], dict[str, tuple[Any, ...]]]] = {
    body: neutral_values(body) for body in (ChatCompletionRequest, CompletionRequest)
}
_MESSAGE_NEUTRAL: Final = neutral_values(ChatMessage)
_STREAM_NEUTRAL: Final = neutral_values(StreamOptions)


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
    deadline_ns: int


def check_available(request: GenerationRequest) -> None:
    """Refuses what the contract has and Shoal does not honour yet."""
    _refuse_unavailable(request, _NEUTRAL[type(request)], "")
    if isinstance(request, ChatCompletionRequest) and not isinstance(request.messages, str):
        for number, message in enumerate(request.messages):
            _refuse_unavailable(message, _MESSAGE_NEUTRAL, f"messages[{number}].")
    options = request.stream_options
    if options is not None:
        _refuse_unavailable(options, _STREAM_NEUTRAL, "stream_options.")
        if not request.stream and (options.include_usage or options.continuous_usage_stats):
            raise invalid("stream_options", "is only allowed with stream: true")


def make_job(
    service: Service,
    request: GenerationRequest,
    prompts: list[list[int]],
    *,
    label: str,
    logprobs: int,
    header_timeout: str | None,
) -> Job:
    """The job that ``request`` describes for ``prompts``, within the limits of the running model."""
    limits = service.switchboard.check_ready()
    choices = whole("n", request.n, 1, 1, MOST_CHOICES)
    if choices * len(prompts) > MOST_SEQUENCES:
        message = f"{len(prompts)} prompts with n={choices} are more than {MOST_SEQUENCES} answers; send fewer at once"
        raise RequestError(400, message, param="n", code="too_many_choices")
    wanted = _wanted_tokens(request)
    return Job(
        label=label,
        prompts=tuple(prompts),
        choices=choices,
        sampling=_sampling(service, request, logprobs),
        max_tokens=tuple(_fit(request, len(prompt), wanted, limits) for prompt in prompts),
        stop=_stop_strings(request),
        stop_ids=_stop_ids(service, request),
        skip_special=request.skip_special_tokens is not False,
        deadline_ns=_deadline_ns(request.timeout, header_timeout),
    )


def seed_of_choice(seed: int, choice: int) -> int:
    """The first choice has the request's own seed, so that n=1 repeats it; the others are mixed (splitmix64)."""
    if choice == 0:
        return seed
    mixed = (seed + choice * 0x9E3779B97F4A7C15) & _SEED_MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _SEED_MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _SEED_MASK
    return mixed ^ (mixed >> 31)


def chat_logprobs(request: ChatCompletionRequest) -> int:
    """``Sampling.logprobs`` for the chat form."""
    top = whole("top_logprobs", request.top_logprobs, 0, 0, _MOST_TOP_LOGPROBS)
    if top and not request.logprobs:
        raise invalid("top_logprobs", "needs logprobs: true")
    return top if request.logprobs else -1


def completion_logprobs(request: CompletionRequest) -> int:
    """``Sampling.logprobs`` for the completions form."""
    if request.logprobs is None or request.logprobs is False:
        return -1
    if request.logprobs is True:
        raise invalid("logprobs", "must be the number of candidates, for example 1")
    return whole("logprobs", request.logprobs, 0, 0, _MOST_TOP_LOGPROBS)


def check_best_of(request: CompletionRequest) -> None:
    """1, or as many as are returned, asks for nothing; more is not available yet."""
    if whole("best_of", request.best_of, 1, 1, MOST_CHOICES) not in (
        1,
        whole("n", request.n, 1, 1, MOST_CHOICES),
    ):
        raise _not_available("best_of")


def number(
    name: str, value: float | None, default: float, low: float, high: float, *, above: bool = False
) -> float:
    """``value`` within [low, high], or (low, high] with ``above``."""
    if value is None:
        return default
    if not (low < value if above else low <= value) or value > high:
        bounds = f"above {low:g} and at most {high:g}" if above else f"between {low:g} and {high:g}"
        raise invalid(name, f"must be {bounds}, not {value:g}")
    return float(value)


def whole(name: str, value: Whole | None, default: int, low: int, high: int) -> int:
    """``value`` as an integer within [low, high]; 64.0 is one."""
    if value is None:
        return default
    if value != math.floor(value):
        raise invalid(name, f"must be a whole number, not {value:g}")
    if not low <= value <= high:
        raise invalid(name, f"must be between {low} and {high}, not {str(value)[:40]}")
    return int(value)


def invalid(name: str, what: str) -> RequestError:
    """A value that cannot be honoured."""
    return RequestError(400, f"{name}: {what}", param=name, code="invalid_value")


def check_ids(service: Service, ids: list[int], name: str) -> None:
    """Every id must be one of the model's."""
    if not ids:
        raise invalid(name, "must not be empty")
    for wrong in (min(ids), max(ids)):
        if not 0 <= wrong < service.vocab_size:
            raise invalid(
                name, f"the token id {wrong} is not in the vocabulary (0 to {service.vocab_size - 1})"
            )


# --- inside ----------------------------------------------------------------------------------------------


def _refuse_unavailable(body: RequestBody, fields: dict[str, tuple[Any, ...]], where: str) -> None:
    for name, neutral in fields.items():
        value = getattr(body, name)
        if value is not None and value not in neutral:
            raise _not_available(where + name)


def _not_available(name: str) -> RequestError:
    return RequestError(400, f"{name}: not available yet; leave it out", param=name, code="not_available")


def _sampling(service: Service, request: GenerationRequest, logprobs: int) -> Sampling:
    defaults = service.defaults
    top_k = whole("top_k", request.top_k, defaults.top_k, -1, 1 << 30)
    return Sampling(
        seed=_seed(request.seed),
        temperature=number("temperature", request.temperature, defaults.temperature, 0, 2),
        top_p=number("top_p", request.top_p, defaults.top_p, 0, 1, above=True),
        top_k=max(top_k, 0),
        min_p=number("min_p", request.min_p, defaults.min_p, 0, 1),
        repetition_penalty=number(
            "repetition_penalty", request.repetition_penalty, defaults.repetition_penalty, 0.01, 10
        ),
        presence_penalty=number("presence_penalty", request.presence_penalty, 0.0, -2, 2),
        frequency_penalty=number("frequency_penalty", request.frequency_penalty, 0.0, -2, 2),
        logit_bias=_logit_bias(service, request.logit_bias),
        logprobs=logprobs,
    )


def _seed(seed: Whole | None) -> int:
    if seed is None:
        return secrets.randbits(64)
    return whole("seed", seed, 0, -(1 << 63), _SEED_MASK) & _SEED_MASK


def _logit_bias(service: Service, biases: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
    if not biases:
        return ()
    if len(biases) > _MOST_BIASES:
        raise invalid("logit_bias", f"has {len(biases)} entries; at most {_MOST_BIASES} are taken")
    return tuple(
        (_bias_id(service, key), number(f"logit_bias.{key}", bias, 0, -100, 100))
        for key, bias in biases.items()
    )


def _bias_id(service: Service, key: str) -> int:
    canonical = key.isascii() and key.isdecimal() and (key == "0" or not key.startswith("0"))
    if not (canonical and len(key) < 10 and int(key) < service.vocab_size):
        raise invalid("logit_bias", f"{key[:40]!r} is not a token id (0 to {service.vocab_size - 1})")
    return int(key)


def _stop_strings(request: GenerationRequest) -> tuple[str, ...]:
    stop = request.stop
    if stop is True:
        raise invalid("stop", "must be a string or a list of strings")
    if not stop:
        return ()
    strings = [stop] if isinstance(stop, str) else stop
    if len(strings) > _MOST_STOPS:
        raise invalid("stop", f"has {len(strings)} strings; at most {_MOST_STOPS} are taken")
    for string in strings:
        if not 0 < len(string) <= _MOST_STOP_CHARACTERS:
            raise invalid("stop", f"each string must have between 1 and {_MOST_STOP_CHARACTERS} characters")
    return tuple(dict.fromkeys(strings))


def _stop_ids(service: Service, request: GenerationRequest) -> tuple[int, ...]:
    named = request.stop_token_ids or []
    if len(named) > _MOST_STOP_IDS:
        raise invalid("stop_token_ids", f"has {len(named)} ids; at most {_MOST_STOP_IDS} are taken")
    ids = [whole("stop_token_ids", token_id, 0, 0, service.vocab_size - 1) for token_id in named]
    own = () if request.ignore_eos else service.eos_ids
    return tuple(dict.fromkeys([*ids, *own]))


def _wanted_tokens(request: GenerationRequest) -> int | None:
    most = 1 << 31
    wanted = None if request.max_tokens is None else whole("max_tokens", request.max_tokens, 0, 1, most)
    if not isinstance(request, ChatCompletionRequest) or request.max_completion_tokens is None:
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


def _deadline_ns(body_timeout: float | None, header_timeout: str | None) -> int:
    timeouts = []
    if body_timeout is not None:
        timeouts.append(number("timeout", body_timeout, 0, 0, _LONGEST_TIMEOUT_S, above=True))
    if header_timeout is not None:
        timeouts.append(
            number("X-Request-Timeout", _seconds(header_timeout), 0, 0, _LONGEST_TIMEOUT_S, above=True)
        )
    return time.time_ns() + int(min(timeouts) * 1e9) if timeouts else 0


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise invalid("X-Request-Timeout", f"must be a number of seconds, not {text[:40]!r}")
    return seconds
