"""Reading tool calls out of answers, format by format."""

import itertools
import json
from collections.abc import Sequence

import pytest

from shoal.frontend.tools.events import Argued, Began, Ended, Event, Said
from shoal.frontend.tools.format import ToolFormat
from shoal.frontend.tools.hermes import Hermes
from shoal.frontend.tools.internlm import InternLM
from shoal.frontend.tools.json_reader import JsonValue, Verdict
from shoal.frontend.tools.llama3 import Llama3
from shoal.frontend.tools.mistral import Mistral

NAMES = frozenset({"f", "get_weather"})
CITY = '{"city": "Köln {\\"x\\"} </tool_call> [1, 2]"}'
Read = tuple[str, list[tuple[str, str, bool]]]


def summary(events: Sequence[Event]) -> Read:
    """The text, and for each call its name, its arguments and whether it ended."""
    text, calls = "", list[tuple[str, str, bool]]()
    for event in events:
        match event:
            case Said(text=said):
                text += said
            case Began(name=name):
                calls.append((name, "", False))
            case Argued(text=more):
                calls[-1] = (calls[-1][0], calls[-1][1] + more, False)
            case Ended():
                calls[-1] = (*calls[-1][:2], True)
    return text, calls


def read(
    form: ToolFormat, pieces: Sequence[str], *, patient: bool = True, held: bool = False, cut: bool = False
) -> Read:
    parser = form.parser(NAMES, patient=patient, held=held)
    events = list(itertools.chain.from_iterable([parser.feed(piece) for piece in pieces]))
    return summary(events + parser.finish(cut=cut))


def call(name: str = "f", arguments: str = "{}") -> tuple[str, str, bool]:
    return name, arguments, True


WELL_FORMED: list[tuple[ToolFormat, str, Read]] = [
    (Hermes(), "no call", ("no call", [])),
    (Hermes(), "  spaces \n", ("  spaces \n", [])),
    (Hermes(), "", ("", [])),
    (Hermes(), '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', ("", [call()])),
    (Hermes(), '<tool_call>{"name":"f"}</tool_call>', ("", [call()])),
    (Hermes(), '<tool_call>{"name":"f","arguments":null}</tool_call>', ("", [call()])),
    (Hermes(), f'<tool_call>{{"arguments": {CITY}, "name": "f"}}</tool_call>', ("", [call("f", CITY)])),
    (
        Hermes(),
        '<tool_call>{"name":"f","arguments":"{\\"a\\": 1}"}</tool_call>',
        ("", [call("f", '{"a": 1}')]),
    ),
    (
        Hermes(),
        f'Let me see.\n\n<tool_call>\n{{"id": "x", "name": "get_weather", "arguments": {CITY}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "f", "arguments": {"a":[1,-2.5e3,true,null,{}]}}\n</tool_call>\n',
        ("Let me see.", [call("get_weather", CITY), call("f", '{"a":[1,-2.5e3,true,null,{}]}')]),
    ),
    (Hermes(), '<tool_call>{"name": "f", "arguments": {}}', ("", [call()])),
    (Hermes(), '<tool_call>{"name": "f"}</tool_call> Done.', (" Done.", [call()])),
    (Hermes(), '<tool_call>{"name": "f"} and more', (" and more", [call()])),
    (
        InternLM(),
        f'Ok.<|action_start|><|plugin|>\n{{"name": "f", "parameters": {CITY}}}<|action_end|>\n',
        ("Ok.", [call("f", CITY)]),
    ),
    (Llama3(), f'{{"name": "f", "parameters": {CITY}}}', ("", [call("f", CITY)])),
    (
        Llama3(),
        '\n<|python_tag|>{"type": "function", "name": "f", "parameters": {}}; {"name": "get_weather"}',
        ("", [call(), call("get_weather")]),
    ),
    (Llama3(), 'Say {"name": "f", "parameters": {}}', ('Say {"name": "f", "parameters": {}}', [])),
    (Llama3(), '{"name": "f", "parameters": {}} is it', (" is it", [call()])),
    (Mistral(named=False), f'[TOOL_CALLS] [{{"name": "f", "arguments": {CITY}}}]', ("", [call("f", CITY)])),
    (
        Mistral(named=False),
        '[TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": "get_weather", "arguments": {}}]',
        ("", [call(), call("get_weather")]),
    ),
    (
        Mistral(named=True),
        f"Well.[TOOL_CALLS]f[ARGS]{{}}[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{CITY}",
        ("Well.", [call(), call("get_weather", CITY)]),
    ),
    (Mistral(named=True), '[TOOL_CALLS]f {"a": 1}', ("", [call("f", '{"a": 1}')])),
]

MALFORMED: list[tuple[ToolFormat, str]] = [
    (Hermes(), "<tool_call>"),
    (Hermes(), "<tool_call>\nnothing\n</tool_call>"),
    (Hermes(), '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'),
    (Hermes(), '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>'),
    (Hermes(), '<tool_call>\n{"name": "f", "arguments": {"a": 01}}\n</tool_call>'),
    (Hermes(), '<tool_call>\n{"name": "f", "arguments": {"a": "b\nc"}}\n</tool_call>'),
    (Hermes(), '<tool_call>\n{"name": "f", "arguments": {"a": 1,}}\n</tool_call>'),
    (Hermes(), '<tool_call>\n{"name": "f", "arguments": "nothing"}\n</tool_call>'),
    (Hermes(), '<tool_call>\n{"name": "f", "arguments": "{\\"a\\": \\"\\\\ud800\\ud800\\"}"}\n</tool_call>'),
    (Hermes(), '<tool_call>\n{"arguments": {}}\n</tool_call>'),
    (Hermes(), '<tool_call>\n{"name": "f", "name": "f"}\n</tool_call>'),
    (Hermes(), '<tool_call>\n{"name": "f", "arguments": {}, "arguments": {}}\n</tool_call>'),
    (Hermes(), '<tool_call>\n{"name": 1}\n</tool_call>'),
    (Hermes(), '<tool_call>\n{"surprise": 1, "name": "f"}\n</tool_call>'),
    (Hermes(), '<tool_call>\n{"name": "f", "arguments": ' + "[" * 300),
    (Hermes(), '<tool_call>\n{"name": "f", "arguments": {"a": ' + "[" * 300 + "</tool_call>"),
    (Hermes(), '<tool_call>\n{"name": "f", "arguments": {"a": 1'),
    (Hermes(), "a </tool_call> b"),
    (InternLM(), "<|action_start|><|interpreter|>\nprint(1)<|action_end|>"),
    (Llama3(), '{"answer": 42}'),
    (Llama3(), "{not json}"),
    (Llama3(), '<|python_tag|>brave_search.call(query="x")'),
    (Mistral(named=False), "[TOOL_CALLS] []"),
    (Mistral(named=False), "[TOOL_CALLS] [1]"),
    (Mistral(named=True), "[TOOL_CALLS]g[ARGS]{}"),
    (Mistral(named=True), "[TOOL_CALLS]" + "f" * 400),
]


@pytest.mark.parametrize("patient", [True, False])
@pytest.mark.parametrize(("form", "text", "expected"), WELL_FORMED)
def test_calls_are_read(form: ToolFormat, text: str, expected: Read, patient: bool) -> None:
    assert read(form, [text], patient=patient) == expected
    assert read(form, list(text), patient=patient) == expected


@pytest.mark.parametrize(("form", "text"), MALFORMED)
def test_what_is_no_call_stays_text(form: ToolFormat, text: str) -> None:
    assert read(form, [text]) == (text, [])
    assert read(form, list(text)) == (text, [])


def test_a_broken_call_does_not_hide_the_next() -> None:
    good = '<tool_call>{"name": "f"}</tool_call>'
    assert read(Hermes(), ["<tool_call>oops " + good]) == ("<tool_call>oops", [call()])
    assert read(Hermes(), ["<tool_call>\n" + good]) == ("<tool_call>\n", [call()])


def test_arguments_are_passed_on_as_they_come() -> None:
    parser = Hermes().parser(NAMES, patient=False, held=False)
    assert parser.feed('Hm.\n<tool_call>\n{"name": "get_weather", "arguments": ') == [Said("Hm.")]
    assert parser.feed('{"ci') == [Began("get_weather"), *map(Argued, '{"ci')]
    assert parser.feed('ty": "Ro') == [*map(Argued, 'ty": "Ro')]
    assert parser.feed('me"}}')[-1] == Ended()
    assert parser.feed("\n</tool_call>\n") == []
    assert parser.finish(cut=False) == []


def test_arguments_that_break_off_leave_their_beginning() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": oops}}</tool_call>'
    assert read(Hermes(), [text], patient=False) == ("oops}}</tool_call>", [("f", '{"a": ', False)])


@pytest.mark.parametrize("patient", [True, False])
def test_a_call_that_is_cut_off_keeps_what_there_is(patient: bool) -> None:
    text = 'Hm <tool_call>{"name": "f", "arguments": {"a": 1'
    assert read(Hermes(), [text], patient=patient, cut=True) == ("Hm", [("f", '{"a": 1', False)])
    assert read(Hermes(), ['<tool_call>{"na'], patient=patient, cut=True) == ('<tool_call>{"na', [])
    assert read(Hermes(), ['<tool_call>{"na'], patient=patient, cut=True, held=True) == ("", [])
    assert read(Hermes(), ['<tool_call>{"name": "f"}\n</tool'], patient=patient, cut=True) == ("", [call()])


@pytest.mark.parametrize("form", [Hermes(), InternLM(), Llama3(), Mistral(named=True), Mistral(named=False)])
def test_calls_of_the_history_read_back(form: ToolFormat) -> None:
    calls = [{"name": "f", "arguments": {"a": 'é"\n'}}, {"name": "get_weather", "arguments": {}}]
    text, found = read(form, [form.spelled(calls)])
    assert text == ""
    assert [{"name": name, "arguments": json.loads(arguments)} for name, arguments, _ in found] == calls


@pytest.mark.parametrize(
    "text",
    ["0", "-1.5E+3", '"\\u00e9\\n"', "true", "null", '{"a":{"b":[ ]} , "c" : [1 ,2]}', "[[],{}]", " 1"],
)
def test_json_values_are_taken_whole(text: str) -> None:
    reader = JsonValue()
    verdicts = [reader.feed(each) for each in text]
    assert set(verdicts[:-1]) <= {Verdict.MORE}
    if verdicts[-1] is not Verdict.LAST:
        assert reader.feed(",") is Verdict.PAST


@pytest.mark.parametrize(
    "text",
    [
        "-,",
        "01",
        "1.,",
        "tru,",
        "nul]",
        '"\\x"',
        '"\\u00g"',
        '{"a" 1',
        '{"a":1,}',
        "[1,]",
        "[,",
        "{1",
        "NaN",
        "+1",
    ],
)
def test_what_is_not_json_is_broken(text: str) -> None:
    reader = JsonValue()
    assert Verdict.BROKEN in [reader.feed(each) for each in text]
