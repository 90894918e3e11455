"""The grammars that requests ask for: what they let through, what is refused, and how long that takes."""

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from frontend_kit import EOS, Kit, limits
from llguidance import LLTokenizer

from shoal.errors import ModelError
from shoal.frontend.grammar import Grammars
from shoal.grammar_tokens import open_matcher
from shoal.messages import Availability, Grammar

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
DRAFT = "http://json-schema.org/draft-07/schema#"
SPECIALS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>")
THINKING = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>{# </think> #}"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "$defs": {"unit": {"enum": ["c", "f"]}},
                "type": "object",
                "properties": {"city": {"type": "string"}, "unit": {"$ref": "#/$defs/unit"}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


def grammar_of(kit: Kit, **fields: Any) -> Grammar:
    kit.scheduler.switchboard.accept(Availability(True, limits(4000)))
    result = kit.chat("hi", **fields)
    assert result.status_code == 200, result.text
    grammar = kit.scheduler.submits[-1].sampling.grammar
    assert grammar is not None
    return grammar


def outcome(kit: Kit, grammar: Grammar, text: str) -> str:
    """``whole``: the text is an answer; ``begins``: it can become one; else what of it is taken."""
    tokens = kit.service.grammars._tokens
    assert tokens is not None
    matcher = open_matcher(tokens, grammar.source)
    ids = kit.ids(text)
    taken = matcher.try_consume_tokens(ids)
    if taken < len(ids):
        return kit.tokenizer.decode(ids[:taken], skip_special=False)
    return "whole" if matcher.is_accepting() else "begins"


def passes(kit: Kit, grammar: Grammar, *texts: str) -> None:
    assert {text: outcome(kit, grammar, text) for text in texts} == dict.fromkeys(texts, "whole")


JSON_FIELDS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}},
    {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"schema": {"$schema": DRAFT, **PERSON}, "strict": True},
        }
    },
    {"response_format": {"type": "json_object", "schema": PERSON}},
    {"guided_json": PERSON},
    {"guided_json": json.dumps(PERSON)},
    {"structured_outputs": {"json": PERSON}},
    {"structured_outputs": {"json": json.dumps(PERSON), "disable_any_whitespace": True}},
]


@pytest.mark.parametrize("fields", JSON_FIELDS)
def test_a_schema_is_held_with_bounded_white_space(fields: dict[str, Any]) -> None:
    kit = Kit()
    grammar = grammar_of(kit, **fields)
    assert grammar.after == ()
    passes(kit, grammar, '{"name":"Ann","age":3}', '{"name": "Ann", "age": -3}')
    for text, taken in [
        ('{"name":  "', '{"name": '),
        ('{ "', "{"),
        ("\n", ""),
        ('{"age"', '{"'),
        ('{"name": "Ann", "age": 3}\n', '{"name": "Ann", "age": 3}'),
    ]:
        assert outcome(kit, grammar, text) == taken
    assert outcome(kit, grammar, '{"name": "Ann"') == "begins"


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "p"}}},
        {"structured_outputs": {"json_object": True}},
    ],
)
def test_any_object(fields: dict[str, Any]) -> None:
    kit = Kit()
    grammar = grammar_of(kit, **fields)
    passes(kit, grammar, "{}", '{"a": [1, {"b": null}]}')
    assert outcome(kit, grammar, "[") == ""


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "regex_schema", "regex_schema": "a[0-9]{2}/b?"}},
        {"guided_regex": "^a[0-9]{2}/b?$"},
        {"structured_outputs": {"regex": "a\\d\\d/b?"}},
    ],
)
def test_a_regular_expression_matches_the_whole_answer(fields: dict[str, Any]) -> None:
    kit = Kit()
    grammar = grammar_of(kit, **fields)
    passes(kit, grammar, "a12/", "a99/b")
    assert outcome(kit, grammar, "a12/bb") == "a12/b"


@pytest.mark.parametrize("name", ["guided_choice", "structured_outputs"])
def test_one_of_several_texts(name: str) -> None:
    kit = Kit()
    choices = ["yes", "yes, but", 'a "quote"\n\\ and é', "yes"]
    grammar = grammar_of(kit, **{name: choices if name == "guided_choice" else {"choice": choices}})
    passes(kit, grammar, *choices)
    assert outcome(kit, grammar, "yes, ") == "begins"
    assert outcome(kit, grammar, "no") == ""


@pytest.mark.parametrize(
    "source",
    ['start: "a" INT "z"?\nINT: /[0-9]+/', 'root ::= "a" digits "z"?\ndigits ::= [0-9]+ # GBNF'],
)
def test_a_grammar_in_either_syntax(source: str) -> None:
    kit = Kit()
    for fields in ({"guided_grammar": source}, {"structured_outputs": {"grammar": source}}):
        grammar = grammar_of(kit, **fields)
        passes(kit, grammar, "a1", "a123z")
        assert outcome(kit, grammar, "az") == "a"


def test_completions_are_held_too() -> None:
    kit = Kit()
    assert kit.complete("hi", guided_choice=["yes"]).status_code == 200
    grammar = kit.scheduler.submits[-1].sampling.grammar
    assert grammar is not None
    passes(kit, grammar, "yes")


def test_every_choice_is_held() -> None:
    kit = Kit()
    grammar_of(kit, guided_choice=["yes"], n=3, stop=["x"], logprobs=True)
    assert len({submit.sampling.grammar for submit in kit.scheduler.submits}) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": None, "structured_outputs": None, "guided_json": None},
        {"response_format": {"type": "text"}},
        {"guided_regex": "", "guided_choice": [], "guided_grammar": ""},
    ],
)
def test_what_asks_for_nothing_is_accepted(fields: dict[str, Any]) -> None:
    kit = Kit()
    assert kit.chat("hi", **fields).status_code == 200
    assert kit.scheduler.submits[-1].sampling.grammar is None


def schema(inner: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": inner}}}


PLACE = "response_format.json_schema.schema"
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    (schema({"type": "strange"}), PLACE, "Invalid type: strange"),
    (schema({"properties": {"a": {"items": {"type": "strange"}}}}), f"{PLACE}.properties.a.items", "strange"),
    (
        schema({"$defs": {"x": {"anyOf": [{}, {"format": "zork"}]}}, "$ref": "#/$defs/x"}),
        f"{PLACE}.$defs.x.anyOf[1]",
        "zork",
    ),
    (schema({"$schema": "https://example.com/mine"}), f"{PLACE}.$schema", "not known"),
    (schema({"properties": {"a": {"$ref": "#/$defs/none"}}}), f"{PLACE}.properties.a", "/$defs/none"),
    (schema({"$ref": "https://example.com/schema"}), PLACE, "example.com"),
    (schema({"type": "object", "unevaluatedProperties": False}), PLACE, "unevaluatedProperties"),
    (schema({"minLength": 5, "maxLength": 2, "type": "string"}), PLACE, "minLength"),
    (schema({"type": "string", "pattern": "(?=a)b"}), PLACE, "look-around"),
    (schema({"type": "object", "x-guidance": {"lenient": True}}), f"{PLACE}.x-guidance", "not taken"),
    (schema({"properties": {"a": False}, "required": ["a"], "type": "object"}), PLACE, "'a'"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "must be given"),
    ({"response_format": {"type": "regex_schema"}}, "response_format.regex_schema", "must be given"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "'xml'"),
    ({"guided_json": "{nonsense"}, "guided_json", "is not JSON"),
    ({"guided_json": "[1]"}, "guided_json", "must be a JSON object"),
    ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
    ({"guided_regex": "a\\b"}, "guided_regex", "lookarounds"),
    ({"guided_choice": ["a", ""]}, "guided_choice", "none of them empty"),
    ({"guided_grammar": "start: nothing"}, "guided_grammar", "nothing"),
    ({"guided_grammar": 'root ::= "a'}, "guided_grammar", "GBNF"),
    ({"guided_grammar": "root ::= " + "(" * 5000}, "guided_grammar", "GBNF"),
    ({"guided_grammar": "start: @other"}, "guided_grammar", "other"),
    ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern", ""),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "beside guided_regex"),
    ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex", "response_format"),
    ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "guided_regex"),
    ({"guided_regex": "a", "min_tokens": 3}, "min_tokens", "guided_regex"),
    ({"guided_regex": "a", "allowed_token_ids": [5]}, "allowed_token_ids", "guided_regex"),
    ({"guided_regex": "a" * 300_000}, "guided_regex", "262144"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED)
def test_what_cannot_be_held_is_refused_by_its_place(fields: dict[str, Any], param: str, words: str) -> None:
    kit = Kit()
    result = kit.chat("hi", **fields)
    assert result.status_code == 400, result.text
    error = result.json["error"]
    assert error["param"] == param
    assert words in error["message"]
    assert error["message"].startswith(param)
    assert kit.scheduler.submits == []


def nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        inner = {"type": "object", "properties": {"a": inner}, "required": ["a"]}
    return inner


def chain(rules: int, follows: str) -> str:
    """Rules that refer to the next one, ``follows`` says how."""
    links = (f"r{n}: {follows.replace('next', f'r{n + 1}')}" for n in range(rules))
    return "\n".join(["start: r0", *links, f'r{rules}: "a"'])


def doubling(levels: int) -> dict[str, Any]:
    """References of which each stands for two."""
    definitions: dict[str, Any] = {"d0": {"type": "string"}}
    for n in range(1, levels):
        inner = {"$ref": f"#/$defs/d{n - 1}"}
        definitions[f"d{n}"] = {"type": "object", "properties": {"a": inner, "b": inner}}
    return {"$defs": definitions, "$ref": f"#/$defs/d{levels - 1}"}


HOSTILE: dict[str, Callable[[], dict[str, Any]]] = {
    "repeated repeats": lambda: {"guided_regex": "((a{1,1000}){1,1000}){1,1000}"},
    "alternatives within repeats": lambda: {"guided_regex": "((a|aa|aaa)*b|(a|b)*a(a|b){25}){200}"},
    "a long expression": lambda: {"guided_regex": "(" + "|".join(f"w{n}x" for n in range(30_000)) + ")"},
    "many choices": lambda: {"guided_choice": [f"{n}" * 10 for n in range(4000)]},
    "deep": lambda: {"guided_json": nested(60)},
    "wide": lambda: {"guided_json": {"properties": {f"p{n}": {"type": "string"} for n in range(2000)}}},
    "large bounds": lambda: {"guided_json": {"type": "string", "minLength": 10**6, "maxLength": 10**9}},
    "many items": lambda: {"guided_json": {"type": "array", "minItems": 10**7, "items": {"type": "string"}}},
    "references that double": lambda: {"guided_json": doubling(40)},
    "intersections that double": lambda: {
        "guided_json": {
            "allOf": [{"anyOf": [{"properties": {f"p{n}": {"const": k}}} for k in range(4)]} for n in range(12)]
        }
    },
    "a chain of rules": lambda: {"guided_grammar": chain(15_000, "next")},
    "an endless rule": lambda: {"guided_grammar": 'start: start start | "a"'},
    "rules that double": lambda: {"guided_grammar": chain(60, "next next")},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_end_soon(name: str) -> None:
    kit = Kit()
    started = time.monotonic()
    result = kit.chat("hi", **HOSTILE[name]())
    assert result.status_code in (200, 400), result.text
    assert time.monotonic() - started < 10


def test_a_grammar_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kit = Kit()
    compiled: list[str] = []

    def count(tokens: LLTokenizer, source: str) -> object:
        compiled.append(source)
        return open_matcher(tokens, source)

    monkeypatch.setattr("shoal.frontend.grammar.open_matcher", count)
    for _ in range(3):
        grammar_of(kit, guided_json=PERSON)
        assert kit.chat("hi", guided_regex="(").status_code == 400
    assert len(compiled) == 2
    assert kit.chat("hi", response_format={"type": "regex_schema", "regex_schema": "("}).json["error"][
        "param"
    ] == ("response_format.regex_schema")


def test_a_model_without_an_end_says_so() -> None:
    def none() -> LLTokenizer:
        raise ModelError("the model has no end-of-sequence token")

    kit = Kit()
    kit.service.grammars = Grammars(none)
    error = kit.chat("hi", guided_choice=["a"])
    assert error.status_code == 400
    assert "no end-of-sequence" in error.json["error"]["message"]
    assert kit.chat("hi").status_code == 200


# --- tools ---

F = '{"city": "Rome"}'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
CALL = f'<tool_call>\n{{"name": "f", "arguments": {F}}}\n</tool_call>'
HERMES = "{{ tools }}{% for message in messages %}{{ message.content }}{% endfor %}{# <tool_call> #}"


@pytest.mark.parametrize("specials", [(), SPECIALS])
def test_a_required_call_is_held(specials: tuple[str, ...]) -> None:
    kit = Kit(template=HERMES, specials=specials)
    grammar = grammar_of(kit, tools=TOOLS, tool_choice="required")
    passes(kit, grammar, CALL, NOW, f"{CALL}\n{NOW}")
    for text, taken in [
        ("Hello", ""),
        (CALL.replace("Rome", 'Rome", "unit": "x'), CALL[: CALL.index('"}}')] + '", "unit": "'),
        (CALL.replace('"city"', '"town"'), CALL[: CALL.index("city")]),
        (CALL.replace('"f"', '"g"'), CALL[: CALL.index('f"')]),
        (CALL.replace('Rome"', 'Rome", "more": 1'), CALL[: CALL.index('"}}')] + '", "'),
        (NOW.replace("{}", '{"a": 1}'), NOW[: NOW.index("}}")]),
    ]:
        assert outcome(kit, grammar, text) == taken
    one = grammar_of(kit, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    passes(kit, one, CALL, NOW)
    assert outcome(kit, one, f"{CALL}\n") == CALL


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "function", "function": {"name": "now"}},
        {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "now"}}]},
        },
    ],
)
def test_a_named_call_is_held(choice: dict[str, Any]) -> None:
    kit = Kit(template=HERMES)
    grammar = grammar_of(kit, tools=TOOLS, tool_choice=choice)
    passes(kit, grammar, NOW)
    assert outcome(kit, grammar, CALL) == CALL[: CALL.index('f"')]
    assert outcome(kit, grammar, f"{NOW}\n<") == ("begins" if choice["type"] == "allowed_tools" else NOW)


LLAMA3 = "{{ tools }}{{ messages[0].content }}{# <|python_tag|> #}"
MISTRAL = "{{ tools }}{{ messages[0].content }}{# [TOOL_CALLS] #}"
FAMILIES: list[tuple[str, tuple[str, ...], str, str]] = [
    (LLAMA3, (), f'{{"name": "f", "parameters": {F}}}', '; {"name": "now", "parameters": {}}'),
    (LLAMA3, SPECIALS, f'{{"name": "f", "parameters": {F}}}', '; {"name": "now", "parameters": {}}'),
    (MISTRAL, (), f'[TOOL_CALLS] [{{"name": "f", "arguments": {F}}}]', ""),
    (
        MISTRAL,
        SPECIALS,
        f'[TOOL_CALLS][{{"name": "f", "arguments": {F}}}, {{"name": "now", "arguments": {{}}}}]',
        "",
    ),
    (MISTRAL + "{# [ARGS] #}", SPECIALS, f"[TOOL_CALLS]f[ARGS]{F}", "[TOOL_CALLS]now[ARGS]{}"),
    (MISTRAL + "{# [ARGS] #}", (), f"[TOOL_CALLS]f[ARGS]{F}", "[TOOL_CALLS]now[ARGS]{}"),
    (HERMES, SPECIALS, CALL, f"\n{NOW}"),
    (
        "{{ messages[0].content }}",
        ("<|action_start|>", "<|plugin|>", "<|action_end|>"),
        f'<|action_start|><|plugin|>\n{{"name": "f", "parameters": {F}}}<|action_end|>',
        '\n<|action_start|><|plugin|>\n{"name": "now", "parameters": {}}<|action_end|>',
    ),
]


@pytest.mark.parametrize(("template", "specials", "call", "next_call"), FAMILIES)
def test_every_family_is_held_in_its_own_form(
    template: str, specials: tuple[str, ...], call: str, next_call: str
) -> None:
    kit = Kit(template=template, specials=specials)
    grammar = grammar_of(kit, tools=TOOLS, tool_choice="required")
    passes(kit, grammar, call, call + next_call)
    assert outcome(kit, grammar, "Hello") == ""
    kit.says(call + next_call)
    message = kit.chat("hi", tools=TOOLS, tool_choice="required").json["choices"][0]["message"]
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"city": "Rome"}


@pytest.mark.parametrize(("template", "specials", "call", "next_call"), FAMILIES)
def test_strict_tools_hold_the_calls_within_free_text(
    template: str, specials: tuple[str, ...], call: str, next_call: str
) -> None:
    strict = [{"type": "function", "function": {**tool["function"], "strict": True}} for tool in TOOLS]  # type: ignore[dict-item]
    kit = Kit(template=template, specials=specials)
    grammar = grammar_of(kit, tools=strict)
    passes(kit, grammar, "Hello {you} [x]\n", "", call, call + next_call)
    if template != LLAMA3:
        passes(kit, grammar, f"Let me see. {call}")
    wrong = call.replace("city", "town")
    assert outcome(kit, grammar, wrong) == wrong[: wrong.index("town")]
    single = grammar_of(kit, tools=strict, parallel_tool_calls=False)
    passes(kit, single, "Hello")
    if next_call:
        passes(kit, single, call)
        assert outcome(kit, single, call + next_call) == call


def test_an_answer_of_a_form_or_a_call() -> None:
    kit = Kit(template=HERMES)
    grammar = grammar_of(kit, tools=TOOLS, guided_json=PERSON)
    passes(kit, grammar, '{"name": "Ann", "age": 3}', CALL)
    assert outcome(kit, grammar, "Hello") == ""


# --- thinking ---


@pytest.mark.parametrize("specials", [(), SPECIALS])
def test_thinking_may_come_before_a_form(specials: tuple[str, ...]) -> None:
    kit = Kit(template=THINKING, specials=specials)
    grammar = grammar_of(kit, guided_json=PERSON)
    answer = '{"name": "Ann", "age": 3}'
    passes(kit, grammar, answer, f"<think>\nHm { {} } <\n</think>\n\n{answer}", f"<think></think>{answer}")
    assert outcome(kit, grammar, "<think>Hm</think>\n\n\n") == "<think>Hm</think>\n\n"
    assert outcome(kit, grammar, "Hm") == ""


@pytest.mark.parametrize(("specials", "after"), [((), ()), (SPECIALS, (259,))])
def test_thinking_that_the_prompt_begins(specials: tuple[str, ...], after: tuple[int, ...]) -> None:
    kit = Kit(template=THINKING + "<think>\n", specials=specials)
    grammar = grammar_of(kit, guided_choice=["yes"])
    assert grammar.after == after
    thought = "" if after else "Hm </think"
    passes(kit, grammar, *([f"\n\n{'yes'}", "yes"] if after else [f"{thought}>\n\nyes", "</think>yes"]))


def test_thinking_before_a_required_call() -> None:
    kit = Kit(template=THINKING + HERMES, specials=SPECIALS)
    grammar = grammar_of(kit, tools=TOOLS, tool_choice="required")
    passes(kit, grammar, CALL, f"<think>Hm</think>\n\n{CALL}")
    strict = [{"type": "function", "function": {**tool["function"], "strict": True}} for tool in TOOLS]  # type: ignore[dict-item]
    grammar = grammar_of(kit, tools=strict)
    passes(kit, grammar, "Hi", f"<think>Hm</think>\n\nHi {CALL}", "<think></think>Hi")


def test_no_thinking_before_a_form_where_it_is_over() -> None:
    kit = Kit(template=THINKING, specials=SPECIALS)
    grammar = grammar_of(kit, guided_choice=["yes"], reasoning_effort="none")
    passes(kit, grammar, "yes")
    assert outcome(kit, grammar, "<think>") == ""
    assert EOS not in kit.ids("yes")
