"""/v1/messages with a scheduler that is a script: blocks, events, counts, errors in Anthropic's form."""

import json
from typing import Any

import pytest
from falcon import testing
from frontend_kit import Kit

from shoal.messages import Finished, Progress

TOOL = {
    "name": "f",
    "description": "d",
    "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}},
}


def ask(kit: Kit, content: Any = "hi", **fields: Any) -> testing.Result:
    body = {"model": "served/model", "max_tokens": 20, "messages": [{"role": "user", "content": content}]}
    return kit.post("/v1/messages", body | fields)


def events(result: testing.Result) -> list[dict[str, Any]]:
    assert result.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in result.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


def test_an_answer() -> None:
    kit = Kit()
    kit.scheduler.cached_tokens = 3
    answer = ask(kit, system="Be brief.").json
    assert answer["id"].startswith("msg_")
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", "served/model")
    assert answer["content"] == [{"type": "text", "text": "ok", "citations": None}]
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("max_tokens", None)
    prompt = "<system>Be brief.<user>hi<assistant>"
    assert kit.prompt() == prompt
    assert answer["usage"] == {
        "input_tokens": len(prompt) - 3,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 3,
        "output_tokens": 2,
    }


def test_a_stream() -> None:
    kit = Kit()
    found = events(ask(kit, stream=True, stop_sequences=["zz"]))
    assert [event["type"] for event in found if event["type"] != "ping"] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    texts = [event["delta"]["text"] for event in found if event["type"] == "content_block_delta"]
    assert "".join(texts) == "ok"
    assert found[-2]["usage"]["output_tokens"] == 2


def test_a_stop_sequence_is_named() -> None:
    kit = Kit()
    kit.scheduler.answer = lambda _: kit.ids("abcXYdef")
    answer = ask(kit, stop_sequences=["XY"]).json
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "XY")
    assert answer["content"][0]["text"] == "abc"


def test_the_last_message_of_the_assistant_is_continued() -> None:
    kit = Kit()
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The answer is"}]
    assert ask(kit, messages=messages).status_code == 200
    assert kit.prompt().endswith("<assistant>The answer is")


def test_blocks_become_messages() -> None:
    kit = Kit()
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": 1}}],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "one"}]},
                {"type": "text", "text": "and?"},
            ],
        },
    ]
    assert ask(kit, messages=messages).status_code == 200
    prompt = kit.prompt()
    assert prompt.startswith("<user>a\nb<assistant>")
    assert prompt.endswith("<user><tool_response>\none\n</tool_response><user>and?<assistant>")


def test_tokens_are_counted_without_generating() -> None:
    kit = Kit()
    body = {"model": "served/model", "messages": [{"role": "user", "content": "hi"}]}
    answer = kit.post("/v1/messages/count_tokens", body)
    assert answer.json == {"input_tokens": len("<user>hi<assistant>")}
    assert kit.scheduler.submits == []


@pytest.mark.parametrize(
    ("fields", "status", "kind", "named"),
    [
        ({"model": "claude"}, 404, "not_found_error", "served/model"),
        ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens"),
        ({"max_tokens": 5000}, 400, "invalid_request_error", "context length"),
        ({"temperature": 3}, 400, "invalid_request_error", "temperature"),
        ({"messages": []}, 400, "invalid_request_error", "messages"),
        ({"container": "c"}, 400, "invalid_request_error", "container"),
        ({"colour": 1}, 400, "invalid_request_error", "colour"),
        ({"tools": [{"type": "web_search_20250305", "name": "w", "input_schema": {}}]}, 400, "invalid_request_error",
         "tools[0].type"),
        ({"tools": [TOOL | {"name": "a b"}]}, 400, "invalid_request_error", "tools[0].name:"),
        ({"tools": [TOOL | {"input_schema": {"properties": {"a": {"type": "strin"}}}}], "tool_choice": {"type": "any"}},
         400, "invalid_request_error", "tools[0].input_schema.properties.a: Invalid type"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, 400, "invalid_request_error",
         "tool_choice.name:"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "objekt"}}}}, 400,
         "invalid_request_error", "output_config.format.schema: Invalid type"),
        ({"stop_sequences": ["x" * 2000]}, 400, "invalid_request_error", "stop_sequences"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, 400, "invalid_request_error",
         "thinking.budget_tokens: "),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, 400, "invalid_request_error", "tool_choice.name"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, 400,
         "invalid_request_error", "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}]},
         400, "invalid_request_error", "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, 400, "invalid_request_error", "type"),
    ],
)  # fmt: skip
def test_refusals(fields: dict[str, Any], status: int, kind: str, named: str) -> None:
    result = ask(Kit(), **fields)
    assert (result.status_code, result.json["type"]) == (status, "error")
    assert result.json["error"]["type"] == kind
    assert named in result.json["error"]["message"]
    assert result.json["request_id"] == result.headers["X-Request-Id"]


def test_a_failure_before_the_stream_is_a_status() -> None:
    kit = Kit()
    kit.scheduler.answer = lambda _: Progress(1, finished=(Finished(0, "failed", detail="it broke"),))
    result = ask(kit, stream=True)
    assert (result.status_code, result.json["error"]) == (500, {"type": "api_error", "message": "it broke"})
