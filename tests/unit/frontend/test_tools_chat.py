"""Tools in chat completions over a scripted scheduler: what the model is told, and what its calls become."""

import json
import re
from typing import Any

import pytest
from frontend_kit import Kit, events, limits

from shoal.messages import Availability

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {"name": "get_weather", "description": "It rains", "parameters": PARAMETERS},
    },
    {"type": "function", "function": {"name": "now"}},
]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
TWO = f'Let me see.\n{CALL}\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>'
HERMES = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.name }}:"
    "{{ call.function.arguments.city }}</tool_call>{% endfor %}{% endfor %}<assistant>"
)
LLAMA3 = HERMES.replace("<tool_call>", "<|python_tag|>").replace("</tool_call>", "")
MISTRAL = HERMES.replace("<tool_call>", "[TOOL_CALLS]").replace("</tool_call>", "")
INTERNLM = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"
WRITTEN: list[tuple[str, tuple[str, ...], str]] = [
    (HERMES, (), CALL),
    (HERMES, ("<tool_call>", "</tool_call>"), CALL),
    (LLAMA3, (), '{"name": "get_weather", "parameters": {"city": "Rome"}}'),
    (LLAMA3, ("<|python_tag|>",), '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Rome"}}'),
    (MISTRAL, ("[TOOL_CALLS]",), '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Rome"}}]'),
    (
        MISTRAL + "{# [ARGS] #}",
        ("[TOOL_CALLS]", "[ARGS]"),
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Rome"}',
    ),
    (
        INTERNLM,
        ("<|action_start|>", "<|action_end|>", "<|plugin|>"),
        '<|action_start|><|plugin|>\n{"name": "get_weather", "parameters": {"city": "Rome"}}<|action_end|>',
    ),
]


def roomy(**settings: Any) -> Kit:
    """A kit with room for prompts that tell of tools."""
    kit = Kit(**settings)
    kit.scheduler.switchboard.accept(Availability(True, limits(4000)))
    return kit


def choice(result: Any) -> dict[str, Any]:
    assert result.status_code == 200, result.text
    found: dict[str, Any] = result.json["choices"][0]
    return found


@pytest.mark.parametrize(("template", "specials", "answer"), WRITTEN)
def test_calls_of_every_family_are_read(template: str, specials: tuple[str, ...], answer: str) -> None:
    kit = roomy(template=template, specials=specials)
    kit.says(answer)
    found = choice(kit.chat("hi", tools=TOOLS))
    (call,) = found["message"]["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Rome"}'}
    assert call["type"] == "function"
    assert re.fullmatch(r"call_[0-9a-f]{24}|[A-Za-z0-9]{9}", call["id"])
    assert ("[TOOL_CALLS]" in template) == (len(call["id"]) == 9)
    assert found["message"]["content"] is None
    assert found["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(("template", "specials", "answer"), WRITTEN)
@pytest.mark.parametrize("run_length", [1, 7, 1000])
def test_streamed_calls_of_every_family(
    template: str, specials: tuple[str, ...], answer: str, run_length: int
) -> None:
    kit = roomy(template=template, specials=specials)
    kit.says(answer)
    kit.scheduler.run_length = run_length
    chunks = events(kit.chat("hi", tools=TOOLS, stream=True))[:-1]
    deltas = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert deltas[0]["function"] == {"name": "get_weather", "arguments": ""}
    assert deltas[0]["id"]
    assert deltas[0]["type"] == "function"
    assert all(
        set(delta) == {"index", "function"} and set(delta["function"]) == {"arguments"} for delta in deltas[1:]
    )
    assert "".join(delta["function"]["arguments"] for delta in deltas) == '{"city": "Rome"}'
    assert {delta["index"] for delta in deltas} == {0}
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == ""
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_text_and_several_calls() -> None:
    kit = roomy(template=HERMES)
    kit.says(TWO)
    message = choice(kit.chat("hi", tools=TOOLS))["message"]
    assert message["content"] == "Let me see."
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["get_weather", "now"]
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    chunks = events(kit.chat("hi", tools=TOOLS, stream=True))[:-1]
    indexes = [call["index"] for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert sorted(set(indexes)) == [0, 1]


def test_every_choice_has_calls_of_its_own() -> None:
    kit = roomy(template=HERMES)
    kit.says("No.", CALL, TWO)
    for stream in (False, True):
        result = kit.chat("hi", tools=TOOLS, n=3, stream=stream)
        if stream:
            reasons = {
                each["index"]: each["finish_reason"]
                for chunk in events(result)[:-1]
                for each in chunk["choices"]
                if each["finish_reason"]
            }
        else:
            reasons = {each["index"]: each["finish_reason"] for each in result.json["choices"]}
        assert reasons == {0: "stop", 1: "tool_calls", 2: "tool_calls"}
        kit.says("No.", CALL, TWO)


def test_a_malformed_call_is_text() -> None:
    kit = roomy(template=HERMES)
    text = '<tool_call>\n{"name": "get_weather", "arguments": {"city": Rome}}\n</tool_call>'
    kit.says(text)
    found = choice(kit.chat("hi", tools=TOOLS))
    assert found["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert found["finish_reason"] == "stop"


def test_nothing_is_read_where_there_are_no_tools() -> None:
    kit = roomy(template=HERMES)
    kit.says(CALL)
    assert choice(kit.chat("hi"))["message"]["content"] == CALL
    assert choice(kit.chat("hi", tools=TOOLS, tool_choice="none"))["message"]["content"] == CALL
    assert "<tools>" not in kit.prompt()


def test_a_stop_string_ends_a_call_early() -> None:
    kit = roomy(template=HERMES)
    kit.says(CALL)
    found = choice(kit.chat("hi", tools=TOOLS, stop=["Ro"]))
    assert found["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "'
    assert found["stop_reason"] == "Ro"


# --- the prompt ---


def test_a_template_that_knows_tools_is_given_them() -> None:
    kit = roomy(template=HERMES)
    choice(kit.chat("hi", tools=TOOLS))
    told = re.findall(r"<tools>(.*)</tools>", kit.prompt())
    assert json.loads("[" + told[0].replace("}{", "},{") + "]") == [
        TOOLS[0],
        {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
    ]


HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "c1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "18 degrees"},
]


def test_arguments_of_the_history_are_objects_for_templates() -> None:
    kit = roomy(template=HERMES)
    choice(kit.post("/v1/chat/completions", {"messages": HISTORY, "tools": TOOLS}))
    assert "<assistant><tool_call>get_weather:Rome</tool_call><tool>18 degrees" in kit.prompt()


def test_or_strings_where_a_template_wants_them() -> None:
    kit = roomy(template=HERMES.replace("call.function.arguments.city", "'(' + call.function.arguments + ')'"))
    choice(kit.post("/v1/chat/completions", {"messages": HISTORY, "tools": TOOLS}))
    assert '<tool_call>get_weather:({"city": "Rome"})</tool_call>' in kit.prompt()


def test_a_template_without_tools_is_told_in_a_message_of_the_system() -> None:
    kit = roomy()
    messages = [{"role": "system", "content": "Be kind."}, *HISTORY, {"role": "tool", "content": "windy"}]
    choice(kit.post("/v1/chat/completions", {"messages": messages, "tools": TOOLS}))
    prompt = kit.prompt()
    system, _, rest = prompt.partition("<user>")
    assert system.startswith("<system>Be kind.\n\n")
    assert f"<tools>\n{json.dumps(TOOLS[0])}\n" in system
    assert rest == (
        f"Weather?<assistant>{CALL}"
        "<user><tool_response>\n18 degrees\n</tool_response>\n<tool_response>\nwindy\n</tool_response><assistant>"
    )


def test_internlm_is_told_as_it_was_trained() -> None:
    kit = roomy(template=INTERNLM, specials=("<|action_start|>", "<|action_end|>", "<|plugin|>"))
    choice(kit.post("/v1/chat/completions", {"messages": HISTORY, "tools": TOOLS}))
    told = json.dumps(
        [TOOLS[0]["function"], {"name": "now", "parameters": {"type": "object", "properties": {}}}]
    )
    call = '{"name": "get_weather", "parameters": {"city": "Rome"}}'
    assert kit.prompt() == (
        f"<system name=<|plugin|>>{told}<user>Weather?<assistant><|action_start|><|plugin|>\n{call}<|action_end|>\n"
        "<environment name=<|plugin|>>18 degrees<assistant>"
    )


def test_the_flag_overrules_the_template() -> None:
    kit = roomy(template=HERMES, tool_call_parser="llama3")
    kit.says('{"name": "now", "parameters": {}}')
    assert choice(kit.chat("hi", tools=TOOLS))["finish_reason"] == "tool_calls"
    assert "<tools>" in kit.prompt()
    error = roomy(template=HERMES, tool_call_parser="none").chat("hi", tools=TOOLS)
    assert error.status_code == 400
    assert "--tool_call_parser none" in error.json["error"]["message"]


# --- functions, as they were before tools ---


def test_functions_are_answered_in_their_own_form() -> None:
    kit = roomy(template=HERMES)
    kit.says(CALL)
    functions = [tool["function"] for tool in TOOLS]
    found = choice(kit.chat("hi", functions=functions, function_call="auto"))
    assert found["message"]["function_call"] == {"name": "get_weather", "arguments": '{"city": "Rome"}'}
    assert "tool_calls" not in found["message"]
    assert found["finish_reason"] == "function_call"
    chunks = events(kit.chat("hi", functions=functions, stream=True))[:-1]
    deltas = [chunk["choices"][0]["delta"].get("function_call") for chunk in chunks]
    calls = [delta for delta in deltas if delta]
    assert calls[0] == {"name": "get_weather", "arguments": ""}
    assert "".join(call["arguments"] for call in calls) == '{"city": "Rome"}'
    assert chunks[-1]["choices"][0]["finish_reason"] == "function_call"


def test_functions_in_the_history() -> None:
    kit = roomy()
    messages = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "function_call": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
        },
        {"role": "function", "name": "get_weather", "content": "18 degrees"},
    ]
    choice(kit.post("/v1/chat/completions", {"messages": messages}))
    answered = "<tool_response>\n18 degrees\n</tool_response>"
    assert kit.prompt() == f"<user>Weather?<assistant>{CALL}<user>{answered}<assistant>"


# --- what is refused ---

NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": NAMED}, "tool_choice"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].custom"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": [{**TOOLS[0], "function": {"name": f"f{n}"}} for n in range(129)]}, "tools"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice.function.name",
        ),
        (
            {
                "tools": TOOLS,
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "x", "tools": [NAMED]}},
            },
            "tool_choice.allowed_tools.mode",
        ),
        (
            {
                "tools": TOOLS,
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
            },
            "tool_choice.allowed_tools.tools",
        ),
        ({"tools": TOOLS, "functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"functions": [{"name": "f"}], "function_call": "required"}, "function_call"),
        ({"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call.name"),
        ({"tools": TOOLS, "do_preprocess": False}, "tools"),
        ({"tools": TOOLS, "tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
        ({"tools": TOOLS, "tool_choice": "required", "min_tokens": 4}, "min_tokens"),
        (
            {
                "tool_choice": "required",
                "tools": [
                    TOOLS[1],
                    {
                        "type": "function",
                        "function": {
                            "name": "f",
                            "parameters": {"type": "object", "properties": {"a": {"type": "strange"}}},
                        },
                    },
                ],
            },
            "tools[1].function.parameters.properties.a",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any], param: str) -> None:
    kit = roomy()
    result = kit.chat("hi", **fields)
    assert result.status_code == 400, result.text
    assert result.json["error"]["param"] == param
    assert kit.scheduler.submits == []


def test_a_text_cannot_have_tools() -> None:
    result = roomy().post("/v1/chat/completions", {"messages": "hi", "tools": TOOLS})
    assert (result.status_code, result.json["error"]["param"]) == (400, "tools")


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []},
        {
            "tools": None,
            "tool_choice": None,
            "parallel_tool_calls": None,
            "functions": None,
            "function_call": None,
        },
        {"tool_choice": "none"},
        {"tool_choice": "auto", "parallel_tool_calls": True},
        {"functions": [], "function_call": "none"},
    ],
)
def test_what_asks_for_nothing_is_accepted(fields: dict[str, Any]) -> None:
    kit = roomy()
    assert kit.chat("hi", **fields).status_code == 200
    assert kit.scheduler.submits[0].sampling.grammar is None
    assert kit.prompt() == "<user>hi<assistant>"
