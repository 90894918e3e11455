"""Answers are read alike however their text is cut into pieces, and nothing of them is lost."""

import itertools
import json
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.frontend.reasoning import THINK, State, ThoughtSplitter
from shoal.frontend.tools.events import Argued, Began, Event, Said
from shoal.frontend.tools.format import ToolFormat
from shoal.frontend.tools.hermes import Hermes
from shoal.frontend.tools.internlm import InternLM
from shoal.frontend.tools.json_reader import JsonValue, Verdict
from shoal.frontend.tools.llama3 import Llama3
from shoal.frontend.tools.mistral import Mistral

NAMES = frozenset({"f", "g"})
FORMATS = (Hermes(), InternLM(), Llama3(), Mistral(named=True), Mistral(named=False))
FRAGMENTS = (
    "<tool_call>", "</tool_call>", "<tool_", "<|action_start|>", "<|plugin|>", "<|action_end|>", "<|python_tag|>",
    "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<think>", "</think>", "</th", "{", "}", "[", "]", '"', "\\", ",", ":", ";",
    '{"name": "f", "arguments": {}}', '{"name": "g", "parameters": {"a": [1, "]}"]}}', '"name"', '"arguments"', '"f"',
    " ", "\n", "text", "é", "1", "null", "f",
)  # fmt: skip
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.text(), JSON, max_size=4)


@st.composite
def cut_texts(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A text, and the same in pieces."""
    text = draw(TEXTS)
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return text, [text[a:b] for a, b in itertools.pairwise([0, *places, len(text)])]


def read(
    form: ToolFormat, pieces: Sequence[str], patient: bool, cut: bool
) -> tuple[str, list[tuple[str, str]]]:
    """The text, and the calls with their arguments."""
    parser = form.parser(NAMES, patient=patient, held=False)
    events: list[Event] = []
    for piece in pieces:
        events += parser.feed(piece)
    events += parser.finish(cut=cut)
    said = "".join(event.text for event in events if isinstance(event, Said))
    calls: list[tuple[str, str]] = []
    for event in events:
        if isinstance(event, Began):
            calls.append((event.name, ""))
        elif isinstance(event, Argued):
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    return said, calls


@settings(max_examples=600, deadline=None)
@given(cut_texts(), st.sampled_from(FORMATS), st.booleans(), st.booleans())
def test_cuts_change_nothing(
    cut_text: tuple[str, list[str]], form: ToolFormat, patient: bool, cut: bool
) -> None:
    text, pieces = cut_text
    assert read(form, pieces, patient, cut) == read(form, [text], patient, cut)
    assert read(form, list(text), patient, cut) == read(form, [text], patient, cut)


@settings(max_examples=400, deadline=None)
@given(TEXTS, st.sampled_from(FORMATS), st.booleans())
def test_without_a_call_every_character_is_text(text: str, form: ToolFormat, patient: bool) -> None:
    said, calls = read(form, [text], patient, cut=False)
    assert calls or said == text
    assert all(name in NAMES for name, _ in calls)
    if patient:
        assert all(isinstance(json.loads(arguments), dict) for _, arguments in calls)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(NAMES)), OBJECTS), min_size=1, max_size=4),
    st.sampled_from(FORMATS),
    st.booleans(),
)
def test_calls_that_a_format_spells_are_read_back(
    calls: list[tuple[str, object]], form: ToolFormat, patient: bool
) -> None:
    text = form.spelled([{"name": name, "arguments": arguments} for name, arguments in calls])
    said, found = read(form, [text], patient, cut=False)
    assert said == ""
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


@settings(max_examples=300, deadline=None)
@given(JSON, st.booleans())
def test_json_is_read_to_its_end(value: object, pretty: bool) -> None:
    text = json.dumps(value, indent=2 if pretty else None)
    reader = JsonValue()
    verdicts = [reader.feed(each) for each in text]
    assert set(verdicts[:-1]) <= {Verdict.MORE}
    assert verdicts[-1] is Verdict.LAST or reader.feed(" ") is Verdict.PAST


@settings(max_examples=600, deadline=None)
@given(TEXTS)
def test_what_is_read_as_json_is_json(text: str) -> None:
    reader = JsonValue()
    taken = ""
    for character in text:
        verdict = reader.feed(character)
        if verdict in (Verdict.BROKEN, Verdict.PAST):
            break
        taken += character
        if verdict is Verdict.LAST:
            json.loads(taken)
            break
    if verdict_of_whole(text):
        assert taken.strip() == text.strip()


def verdict_of_whole(text: str) -> bool:
    """Whether all of ``text`` is one JSON value."""
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


@settings(max_examples=600, deadline=None)
@given(cut_texts(), st.sampled_from(["before", "within", "after"]))
def test_thinking_is_split_alike_however_it_is_cut(cut_text: tuple[str, list[str]], state: State) -> None:
    text, pieces = cut_text
    whole = split([text], state)
    assert split(pieces, state) == whole
    assert split(list(text), state) == whole
    if state == "after":
        assert whole == ("", text)
        return
    begun = "<think>" + text if state == "within" else text.lstrip()
    thought, _, rest = begun.removeprefix("<think>").partition("</think>")
    if begun.startswith("<think>"):
        assert whole == (thought.strip(" \t\n\r"), rest.lstrip(" \t\n\r"))
    elif state == "before":
        assert whole == ("", text)


def split(pieces: Sequence[str], state: State) -> tuple[str, str]:
    """The thinking and the rest."""
    splitter = ThoughtSplitter(THINK, state)
    parts = [splitter.feed(piece) for piece in pieces] + [splitter.finish()]
    return "".join(thought for thought, _ in parts), "".join(rest for _, rest in parts)
