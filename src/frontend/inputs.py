"""Inputs that are read and not continued: a text, several, token ids, or several lists of them. Called by
/v1/embeddings, /pooling and /get_ppl."""

from collections.abc import Sequence
from typing import Final, cast

from shoal.errors import RequestError
from shoal.frontend.prompts import overflow, text_ids
from shoal.frontend.schemas.base import Whole
from shoal.frontend.service import Service
from shoal.frontend.values import invalid, prompt_ids
from shoal.messages import Limits

MOST_INPUTS: Final = 2048
"""As many as OpenAI takes."""

Input = str | list[str | Whole | list[Whole]]


def input_ids(service: Service, limits: Limits, given: Input, *, add_special: bool) -> list[list[int]]:
    """The token ids of each input. Raises RequestError where one is empty or does not fit the context."""
    inputs = _input_ids(service, limits, given, add_special)
    for number, ids in enumerate(inputs):
        name = "input" if is_single(given) else f"input[{number}]"
        if not ids:
            raise invalid(name, "must not be empty")
        if len(ids) > limits.session_len:
            raise overflow(limits, "input", f"{len(ids)} are in {name}")
    return inputs


def is_single(given: Input) -> bool:
    """Whether it is one input."""
    return isinstance(given, str) or (bool(given) and isinstance(given[0], int | float))


def characters(given: Input) -> int:
    """About how much there is to tokenise."""
    if isinstance(given, str):
        return len(given)
    return sum(1 if isinstance(item, int | float) else len(item) for item in given)


def _input_ids(service: Service, limits: Limits, given: Input, add_special: bool) -> list[list[int]]:
    if isinstance(given, str):
        return [text_ids(service, limits, given, add_special=add_special, field="input")]
    if not given:
        raise invalid("input", "must not be empty")
    if all(isinstance(item, int | float) for item in given):
        return [prompt_ids(service, "input", cast("Sequence[Whole]", given))]
    if len(given) > MOST_INPUTS:
        raise RequestError(
            400, f"input: has {len(given)} entries; at most {MOST_INPUTS} are taken at once",
            param="input", code="too_many_inputs",
        )  # fmt: skip
    if all(isinstance(item, str) for item in given):
        texts = cast("Sequence[str]", given)
        return [
            text_ids(service, limits, text, add_special=add_special, field=f"input[{number}]")
            for number, text in enumerate(texts)
        ]
    if all(isinstance(item, list) for item in given):
        lists = cast("Sequence[list[Whole]]", given)
        return [prompt_ids(service, f"input[{number}]", ids) for number, ids in enumerate(lists)]
    raise invalid("input", "must be a string, a list of strings, a list of ids, or a list of lists of ids")
