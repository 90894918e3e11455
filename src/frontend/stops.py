"""What ends an answer before its last token: stop strings, stop ids, loops."""

from typing import Final

from shoal.frontend.schemas.base import GenerationRequest
from shoal.frontend.service import Service
from shoal.frontend.values import invalid, token_ids, whole
from shoal.messages import RepetitionLimit

_MOST_STOPS: Final = 16
_MOST_STOP_CHARACTERS: Final = 1024
_MOST_STOP_IDS: Final = 256
_LONGEST_PATTERN: Final = 256
_MOST_REPEATS: Final = 10_000


def stop_strings(request: GenerationRequest) -> tuple[str, ...]:
    """The request's own, each once."""
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


def stop_ids(service: Service, request: GenerationRequest, also: tuple[int, ...] = ()) -> tuple[int, ...]:
    """The request's own, the model's end-of-sequence ids and ``also``; the latter two unless ``ignore_eos``."""
    named = token_ids(service, "stop_token_ids", request.stop_token_ids, _MOST_STOP_IDS)
    own = () if request.ignore_eos else (*service.eos_ids, *also)
    return tuple(dict.fromkeys([*named, *own]))


def repetition_limit(request: GenerationRequest) -> RepetitionLimit | None:
    """When a sequence that goes in circles ends; None: never."""
    wish, name = request.repetition_detection, "repetition_detection"
    if not wish:
        return None
    if wish is True:
        raise invalid(name, "must be an object, for example {max_pattern_size: 20, min_count: 4}")
    longest = whole(f"{name}.max_pattern_size", wish.max_pattern_size, 0, 0, _LONGEST_PATTERN)
    if not longest:
        return None
    shortest = whole(f"{name}.min_pattern_size", wish.min_pattern_size, 0, 0, longest)
    return RepetitionLimit(
        min_pattern=max(shortest, 1),
        max_pattern=longest,
        min_count=whole(f"{name}.min_count", wish.min_count, 0, 2, _MOST_REPEATS),
    )
