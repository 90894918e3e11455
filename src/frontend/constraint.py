"""The one grammar that an answer is held to: its form, its tool calls and, around them, the model's thinking."""

import json
from typing import Any, Final

from msgspec import Struct

from shoal.frontend.answer_form import AnswerForm, check_schema
from shoal.frontend.grammar import Grammars, json_source
from shoal.frontend.lark import TEXT, Lark, literal, special_id
from shoal.frontend.reasoning import Markers, State
from shoal.frontend.schemas.base import GenerationRequest
from shoal.frontend.schemas.tools import FunctionDefinition
from shoal.frontend.service import Service
from shoal.frontend.tools.format import HeldFunction, ToolFormat
from shoal.frontend.tools.wish import ToolWish
from shoal.frontend.values import invalid
from shoal.messages import Grammar
from shoal.tokenizer import Tokenizer

_AFTER_THINKING: Final = r"/\n{0,2}/"
_CONTRADICTING: Final = ("ignore_eos", "min_tokens", "min_new_tokens", "allowed_token_ids")
_NO_ARGUMENTS: Final[dict[str, Any]] = {"type": "object", "properties": {}, "additionalProperties": False}
_COMBINING: Final = (
    "additionalProperties", "unevaluatedProperties", "patternProperties", "allOf", "anyOf", "oneOf", "not", "$ref",
    "if", "dependentSchemas", "dependentRequired", "minProperties",
)  # fmt: skip


class Held(Struct, frozen=True, kw_only=True):
    """What of an answer is held."""

    form: AnswerForm | None
    wish: ToolWish | None
    tool_format: ToolFormat | None
    """Where there is a wish."""
    markers: Markers | None
    """Of models that think."""
    state: State = "before"
    """Where the thinking stands at the end of the prompt."""
    closing_ids: tuple[int, ...] = ()
    """The tokens that end it."""


async def grammar_of(service: Service, request: GenerationRequest, held: Held) -> Grammar | None:
    """The grammar of an answer, None where it needs none. Raises RequestError where it cannot be held, or contradicts
    what else ``request`` wants."""
    grammar = await _grammar_of(service.grammars, service.tokenizer, held)
    if grammar is not None:
        for name in _CONTRADICTING:
            if getattr(request, name):
                what = held.form.field if held.form is not None else "tools"
                raise invalid(name, f"contradicts {what}, whose grammar says what may follow: leave one out")
    return grammar


async def _grammar_of(grammars: Grammars, tokenizer: Tokenizer, held: Held) -> Grammar | None:
    """Every part is checked by itself first, so that an error can say where it is."""
    form, wish = held.form, held.wish
    if form is not None:
        alone = json.dumps({"grammars": [form.grammar]})
        await grammars.check(alone, form.field, form.schema)
        if wish is None and held.markers is None:
            return Grammar(alone)
    lark = Lark(tokenizer)
    if wish is not None and wish.functions and (wish.is_held or form is not None):
        for number, function in enumerate(wish.functions):
            if function.name in wish.allowed:
                await _check_arguments(grammars, wish, number, function)
        field, answer = wish.field, _calls(lark, held, wish)
    elif form is not None:
        field, answer = form.field, lark.part(form.grammar)
    else:
        return None
    after = _around_thinking(lark, held, answer, tokenizer)
    await grammars.check(lark.source(), field)
    return Grammar(lark.source(), after)


async def _check_arguments(
    grammars: Grammars, wish: ToolWish, number: int, function: FunctionDefinition
) -> None:
    inner = ".function" if wish.field == "tools" else ""
    field = f"{wish.field}[{number}]{inner}.parameters"
    check_schema(field, function.parameters or {})
    try:
        source = json_source(_arguments(function))
    except RecursionError as error:
        raise invalid(field, "is nested too deeply") from error
    await grammars.check(source, field, function.parameters)


def _calls(lark: Lark, held: Held, wish: ToolWish) -> str:
    """The rule of an answer that may have calls."""
    tool_format = held.tool_format
    assert tool_format is not None
    functions = [
        HeldFunction(function.name, lark.json(f"arguments_{number}", _arguments(function)))
        for number, function in enumerate(wish.callable)
    ]
    if wish.is_forced:
        body = tool_format.calls(lark, functions, several=wish.parallel)
    elif held.form is not None:
        calls = tool_format.calls(lark, functions, several=wish.parallel)
        body = f"{lark.part(held.form.grammar)} | {calls}"
    else:
        body = tool_format.text_or_calls(lark, functions, several=wish.parallel)
    return lark.rule("body", body)


def _around_thinking(lark: Lark, held: Held, answer: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Adds the start rule; ``Grammar.after``."""
    if held.markers is None or held.state == "after":
        lark.rule("start", answer)
        return ()
    opening, closing = held.markers.opening, held.markers.closing
    if held.state == "before":
        if special_id(tokenizer, opening) is None:
            thought = lark.rule("thought", f"{literal(opening)} {TEXT} {literal(closing)}", "[lazy]")
        else:
            thought = lark.rule("thought", f"{lark.markers(opening)} {TEXT} {lark.markers(closing)}")
        lark.rule("start", f"({thought} {_AFTER_THINKING})? {answer}")
        return ()
    if len(held.closing_ids) != 1:
        lark.rule("start", f"{lark.behind_text('thought', closing)} {_AFTER_THINKING} {answer}")
        return ()
    lark.rule("start", f"{_AFTER_THINKING} {answer}")
    return held.closing_ids


def _arguments(function: FunctionDefinition) -> dict[str, Any]:
    """The schema of a call's arguments. Without a word on other properties than its own it is taken to have none: so
    a call is valid all the same, and a model does not invent arguments."""
    given = function.parameters
    if not given:
        return _NO_ARGUMENTS
    schema = {"type": "object", **given}
    named = isinstance(schema.get("properties"), dict) and bool(schema["properties"])
    if named and not any(key in schema for key in _COMBINING):
        schema["additionalProperties"] = False
    return schema
