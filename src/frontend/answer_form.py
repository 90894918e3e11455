"""The form that a request wants of its answer (``response_format``, ``structured_outputs``, ``guided_…``)."""

import json
import re
from collections.abc import Iterator
from typing import Any, Final

import msgspec
from llguidance import LLMatcher
from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark
from msgspec import Struct

from shoal.errors import RequestError
from shoal.frontend.lark import SEPARATORS, literal
from shoal.frontend.schemas.base import GenerationRequest
from shoal.frontend.schemas.formats import ResponseFormat, StructuredOutputs
from shoal.frontend.unavailable import refuse_unavailable
from shoal.frontend.values import invalid

ANSWER: Final = "answer"
LONGEST_SOURCE: Final = 256 << 10
"""Characters of a schema or grammar."""
_MOST_CHOICES: Final = 4096
_DIALECT: Final = re.compile(r"https?://json-schema\.org/draft[-/]")
_GBNF: Final = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)
_ANY_OBJECT: Final[dict[str, Any]] = {"type": "object"}
_EITHER: Final = "give only one of them"


class AnswerForm(Struct, frozen=True):
    """The form that an answer must have."""

    field: str
    """Where the request asks for it."""
    grammar: dict[str, Any]
    """One of llguidance's, with the name ``ANSWER``."""
    schema: dict[str, Any] | None = None
    """Where it is JSON, so that a mistake in it can be found."""


def answer_form(request: GenerationRequest) -> AnswerForm | None:
    """The form that ``request`` asks for; None for any. Raises RequestError."""
    forms = list(_forms(request))
    if len(forms) > 1:
        raise invalid(forms[1].field, f"stands beside {forms[0].field}: {_EITHER}")
    return forms[0] if forms else None


def _forms(request: GenerationRequest) -> Iterator[AnswerForm]:
    if request.response_format is not None and request.response_format.type != "text":
        yield _of_response_format(request.response_format)
    if request.structured_outputs is not None:
        yield _of_structured_outputs(request.structured_outputs)
    if request.guided_json is not None:
        yield _of_json("guided_json", request.guided_json)
    if request.guided_regex:
        yield _of_regex("guided_regex", request.guided_regex)
    if request.guided_choice:
        yield _of_choice("guided_choice", request.guided_choice)
    if request.guided_grammar:
        yield _of_grammar("guided_grammar", request.guided_grammar)


def _of_response_format(wanted: ResponseFormat) -> AnswerForm:
    match wanted.type:
        case "json_object":
            given = wanted.schema
            return _of_json(
                "response_format" if given is None else "response_format.schema", given or _ANY_OBJECT
            )
        case "json_schema":
            if wanted.json_schema is None:
                raise invalid("response_format.json_schema", "must be given for the type json_schema")
            given = wanted.json_schema.schema
            return _of_json("response_format.json_schema.schema", _ANY_OBJECT if given is None else given)
        case "regex_schema":
            if not wanted.regex_schema:
                raise invalid("response_format.regex_schema", "must be given for the type regex_schema")
            return _of_regex("response_format.regex_schema", wanted.regex_schema)
    raise invalid(
        "response_format.type",
        f"must be text, json_object, json_schema or regex_schema, not {wanted.type[:40]!r}",
    )


def _of_structured_outputs(wanted: StructuredOutputs) -> AnswerForm:
    refuse_unavailable(wanted, "structured_outputs.")
    given = {
        "json": wanted.json,
        "regex": wanted.regex,
        "choice": wanted.choice,
        "grammar": wanted.grammar,
        "json_object": wanted.json_object or None,
    }
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise invalid("structured_outputs", f"needs exactly one of {', '.join(given)}")
    field = f"structured_outputs.{named[0]}"
    if wanted.json is not None:
        return _of_json(field, wanted.json)
    if wanted.regex is not None:
        return _of_regex(field, wanted.regex)
    if wanted.choice is not None:
        return _of_choice(field, wanted.choice)
    return _of_json(field, _ANY_OBJECT) if wanted.grammar is None else _of_grammar(field, wanted.grammar)


def _of_json(field: str, schema: str | dict[str, Any]) -> AnswerForm:
    if isinstance(schema, str):
        schema = _decoded(field, schema)
    check_schema(field, schema)
    try:
        _check_length(field, json.dumps(schema))
    except RecursionError as error:
        raise invalid(field, "is nested too deeply") from error
    return AnswerForm(field, {"name": ANSWER, "json_schema": {**schema, "x-guidance": SEPARATORS}}, schema)


def check_schema(field: str, schema: dict[str, Any]) -> None:
    """Refuses what a schema must not say here: llguidance's own options, and a dialect that nobody knows."""
    if "x-guidance" in schema:
        raise invalid(f"{field}.x-guidance", "is not taken; leave it out")
    dialect = schema.get("$schema")
    if dialect is not None and not (isinstance(dialect, str) and _DIALECT.match(dialect)):
        raise invalid(f"{field}.$schema", "is not known here: name a draft of https://json-schema.org or none")


def _decoded(field: str, text: str) -> dict[str, Any]:
    _check_length(field, text)
    try:
        schema = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise invalid(field, f"is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise invalid(field, "must be a JSON object: a schema")
    return schema


def _of_regex(field: str, regex: str) -> AnswerForm:
    _check_length(field, regex)
    grammar = json.loads(LLMatcher.grammar_from_regex(regex))["grammars"][0]["lark_grammar"]
    return AnswerForm(field, {"name": ANSWER, "lark_grammar": grammar})


def _of_choice(field: str, choices: list[str]) -> AnswerForm:
    if not 0 < len(choices) <= _MOST_CHOICES or not all(choices):
        raise invalid(field, f"must be 1 to {_MOST_CHOICES} texts, none of them empty")
    _check_length(field, "".join(choices))
    alternatives = " | ".join(map(literal, dict.fromkeys(choices)))
    return AnswerForm(field, {"name": ANSWER, "lark_grammar": f"start: {alternatives}"})


def _of_grammar(field: str, grammar: str) -> AnswerForm:
    _check_length(field, grammar)
    if _GBNF.search(grammar):
        try:
            grammar = gbnf_to_lark(grammar)
        except (GbnfToLarkError, IndexError, KeyError, RecursionError) as error:
            raise invalid(field, f"is not a grammar in GBNF: {error}") from error
    return AnswerForm(field, {"name": ANSWER, "lark_grammar": grammar})


def _check_length(field: str, text: str) -> None:
    if len(text) > LONGEST_SOURCE:
        raise RequestError(
            400,
            f"{field}: has {len(text)} characters; at most {LONGEST_SOURCE} are taken",
            param=field,
            code="invalid_value",
        )
