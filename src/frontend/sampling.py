"""How tokens are drawn: a request's fields to a complete ``Sampling``. What it leaves unset comes from the model's
generation defaults, and then from OpenAI's."""

import secrets
from collections.abc import Iterator
from typing import Final

from shoal.frontend.prompts import continuation_ids
from shoal.frontend.schemas.base import GenerationRequest, Whole
from shoal.frontend.service import Service
from shoal.frontend.values import agreeing, invalid, number, token_ids, whole
from shoal.messages import Grammar, Sampling, ThinkingBudget

MOST_TOP_LOGPROBS: Final = 20
_MOST_BIASES: Final = 4096
_MOST_BAD_WORDS: Final = 256
_MOST_BAD_WORD_CHARACTERS: Final = 256
_SEED_MASK: Final = (1 << 64) - 1


def sampling_of(
    service: Service,
    request: GenerationRequest,
    *,
    logprobs: int,
    stop_ids: tuple[int, ...],
    grammar: Grammar | None = None,
    thinking: ThinkingBudget | None = None,
) -> Sampling:
    """All of it; ``stop_ids`` are held back until ``min_tokens`` were generated."""
    defaults = service.defaults
    top_k = whole("top_k", request.top_k, defaults.top_k, -1, 1 << 30)
    min_tokens = least_tokens(request)
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
        min_tokens=min_tokens,
        held_back=stop_ids if min_tokens else (),
        allowed_ids=token_ids(service, "allowed_token_ids", request.allowed_token_ids, service.vocab_size),
        bad_words=_bad_words(service, request.bad_words or []),
        grammar=grammar,
        thinking=thinking,
    )


def least_tokens(request: GenerationRequest) -> int:
    """``min_tokens``, which LMDeploy calls ``min_new_tokens``."""
    least = agreeing("min_tokens", request.min_tokens, "min_new_tokens", request.min_new_tokens)
    return whole("min_tokens", least, 0, 0, 1 << 31)


def seed_of_choice(seed: int, choice: int) -> int:
    """The first choice has the request's own seed, so that n=1 repeats it; the others are mixed (splitmix64)."""
    if choice == 0:
        return seed
    mixed = (seed + choice * 0x9E3779B97F4A7C15) & _SEED_MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _SEED_MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _SEED_MASK
    return mixed ^ (mixed >> 31)


def _seed(seed: Whole | None) -> int:
    if seed is None:
        return secrets.randbits(64)
    return whole("seed", seed, 0, -(1 << 63), (1 << 63) - 1) & _SEED_MASK


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


def _bad_words(service: Service, words: list[str]) -> tuple[tuple[int, ...], ...]:
    """Each word as it is spelled at the beginning of a text, behind a space and within a word."""
    if len(words) > _MOST_BAD_WORDS:
        raise invalid("bad_words", f"has {len(words)} words; at most {_MOST_BAD_WORDS} are taken")
    for word in words:
        if not 0 < len(word.strip()) <= _MOST_BAD_WORD_CHARACTERS:
            raise invalid(
                "bad_words",
                f"each must have between 1 and {_MOST_BAD_WORD_CHARACTERS} characters besides spaces",
            )
    runs = dict.fromkeys(run for word in words for run in _spellings(service, word))
    return tuple(run for run in runs if run and max(run) < service.vocab_size)


def _spellings(service: Service, word: str) -> Iterator[tuple[int, ...]]:
    bare = word.strip(" ")
    yield tuple(service.tokenizer.encode(bare, add_special=False))
    yield tuple(continuation_ids(service.tokenizer, bare))
    yield tuple(continuation_ids(service.tokenizer, f" {bare}"))
