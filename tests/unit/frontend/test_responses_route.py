"""/v1/responses with a scheduler that is a script: items, events, what is kept and continued."""

import json
from typing import Any

import pytest
from falcon import testing
from frontend_kit import Kit, limits

from shoal.messages import Availability


def ask(kit: Kit, given: Any = "hi", **fields: Any) -> testing.Result:
    return kit.post("/v1/responses", {"input": given, **fields})


def events(result: testing.Result) -> list[dict[str, Any]]:
    found = []
    for block in result.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def test_an_answer() -> None:
    kit = Kit()
    kit.says("ok")
    answer = ask(kit, instructions="Be brief.", metadata={"a": "b"}, temperature=0.5).json
    assert (answer["object"], answer["status"], answer["temperature"]) == ("response", "completed", 0.5)
    (message,) = answer["output"]
    assert (message["type"], message["role"], message["status"]) == ("message", "assistant", "completed")
    assert message["content"] == [{"type": "output_text", "text": "ok", "annotations": [], "logprobs": []}]
    assert answer["metadata"] == {"a": "b"}
    assert answer["usage"]["output_tokens"] == 3
    assert kit.prompt() == "<system>Be brief.<user>hi<assistant>"
    assert kit.get(f"/v1/responses/{answer['id']}").json == answer


def test_a_stream_tells_what_the_whole_answer_says() -> None:
    kit = Kit()
    kit.says("hello", "hello")
    whole = ask(kit, store=False).json
    found = events(ask(kit, stream=True))
    assert [event["type"] for event in found[:4]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert [event["type"] for event in found[-4:]] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    deltas = [event["delta"] for event in found if event["type"] == "response.output_text.delta"]
    assert "".join(deltas) == found[-4]["text"] == "hello"
    last = found[-1]["response"]
    assert last["output"][0]["content"] == whole["output"][0]["content"]
    assert last["usage"] == whole["usage"]
    assert kit.get(f"/v1/responses/{last['id']}").json == last
    assert kit.get(f"/v1/responses/{whole['id']}").status_code == 404


def test_a_response_goes_on_after_another() -> None:
    kit = Kit()
    kit.says("one", "two", "three")
    first = ask(kit, "a", instructions="S").json
    second = ask(kit, "b", previous_response_id=first["id"]).json
    assert kit.prompt() == "<user>a<assistant>one<user>b<assistant>"
    ask(kit, "c", previous_response_id=second["id"])
    assert kit.prompt() == "<user>a<assistant>one<user>b<assistant>two<user>c<assistant>"
    assert second["previous_response_id"] == first["id"]


def test_deleting_breaks_the_chain() -> None:
    kit = Kit()
    first = ask(kit).json
    assert kit.request("DELETE", f"/v1/responses/{first['id']}").json["deleted"] is True
    result = ask(kit, previous_response_id=first["id"])
    assert (result.status_code, result.json["error"]["param"]) == (404, "previous_response_id")


def test_a_request_id_that_comes_again_replaces_no_response() -> None:
    kit = Kit()
    kit.says("one", "two")
    first, second = (kit.post("/v1/responses", {"input": "hi"}, X_Request_Id="same").json for _ in range(2))
    for answer, text in ((first, "one"), (second, "two")):
        kept = kit.get(f"/v1/responses/{answer['id']}").json
        assert kept["output"][0]["content"][0]["text"] == text


def test_a_gap_in_the_chain_is_named() -> None:
    kit = Kit()
    first = ask(kit).json
    second = ask(kit, previous_response_id=first["id"]).json
    kit.request("DELETE", f"/v1/responses/{first['id']}")
    result = ask(kit, previous_response_id=second["id"])
    assert (result.status_code, result.json["error"]["param"]) == (404, "previous_response_id")
    assert f"{first['id']}', on which that response goes on, was deleted" in result.json["error"]["message"]


def test_its_items_are_listed() -> None:
    kit = Kit()
    items = [{"role": "user", "content": [{"type": "input_text", "text": f"{n}"}]} for n in range(3)]
    answer = ask(kit, items).json
    assert kit.prompt() == "<user>0<user>1<user>2<assistant>"
    path = f"/v1/responses/{answer['id']}/input_items"
    first = kit.request("GET", f"{path}?limit=2&order=asc").json
    assert [item["content"][0]["text"] for item in first["data"]] == ["0", "1"]
    rest = kit.request("GET", f"{path}?order=asc&after={first['last_id']}").json
    assert ([item["content"][0]["text"] for item in rest["data"]], rest["has_more"]) == (["2"], False)


def test_a_call_and_its_output_become_messages() -> None:
    kit = Kit()
    items = [
        {"role": "user", "content": "u"},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "t"}],
        },
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "one"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "two"}]},
    ]
    kit.scheduler.switchboard.accept(Availability(True, limits(2000)))
    assert ask(kit, items).status_code == 200
    prompt = kit.prompt()
    assert prompt.startswith("<user>u<assistant>")
    results = "<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response>"
    assert prompt.endswith(f"<user>{results}<assistant>")
    assert prompt.count("<assistant>") == 2


def test_cut_off_is_incomplete() -> None:
    kit = Kit()
    kit.says("a long answer")
    answer = ask(kit, max_output_tokens=4).json
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert answer["output"][0]["status"] == "incomplete"


def test_logprobs_where_they_are_included() -> None:
    kit = Kit()
    kit.says("ok")
    answer = ask(kit, include=["message.output_text.logprobs"], top_logprobs=2).json
    logprobs = answer["output"][0]["content"][0]["logprobs"]
    assert [entry["token"] for entry in logprobs][:2] == ["o", "k"]
    assert len(logprobs[0]["top_logprobs"]) == 2


def test_tokens_are_counted_with_what_came_before() -> None:
    kit = Kit()
    kit.says("one")
    first = ask(kit, "a").json
    answer = kit.post("/v1/responses/input_tokens", {"input": "b", "previous_response_id": first["id"]})
    assert answer.json["input_tokens"] == len("<user>a<assistant>one<user>b<assistant>")


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"input": []}, 400, "input"),
        ({"input": [{"role": "judge", "content": "x"}]}, 400, "input[0].role"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, 400, "input[0].type"),
        ({"input": [{"type": "function_call", "name": "f"}]}, 400, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, 400,
         "input[0].content[0]"),
        ({"input": [{"type": "reasoning", "encrypted_content": "gAAA"}]}, 400, "input[0].encrypted_content"),
        ({"previous_response_id": "resp_none"}, 404, "previous_response_id"),
        ({"conversation": "conv_1"}, 400, "conversation"),
        ({"truncation": "auto"}, 400, "truncation"),
        ({"reasoning": {"summary": "detailed"}}, 400, "reasoning.summary"),
        ({"tools": [{"type": "web_search"}]}, 400, "tools[0].type"),
        ({"include": ["everything"]}, 400, "include"),
        ({"background": True, "store": False}, 400, "background"),
        ({"metadata": {"k": "v" * 600}}, 400, "metadata.k"),
        ({"model": "gpt"}, 404, "model"),
        ({"max_output_tokens": 0}, 400, "max_output_tokens"),
        ({"input": "x" * 500}, 400, "input"),
        ({"reasoning": {"effort": "huge"}}, 400, "reasoning.effort"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "objekt"}}}}, 400,
         "text.format.schema"),
        ({"tools": [{"type": "function", "name": "a b"}]}, 400, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {"properties": {"a": {"type": "strin"}}}}],
          "tool_choice": "required"}, 400, "tools[0].parameters.properties.a"),
        ({"tools": [{"type": "function", "name": "f"}], "tool_choice": {"type": "function", "name": "g"}}, 400,
         "tool_choice.name"),
        ({"colour": 1}, 400, "colour"),
    ],
)  # fmt: skip
def test_refusals(fields: dict[str, Any], status: int, param: str) -> None:
    result = ask(Kit(), **({"given": fields.pop("input")} if "input" in fields else {}), **fields)
    assert (result.status_code, result.json["error"]["param"]) == (status, param)


def test_what_is_wrong_with_a_background_response_is_told_at_once() -> None:
    result = ask(Kit(), background=True, max_output_tokens=5000)
    assert (result.status_code, result.json["error"]["code"]) == (400, "context_length_exceeded")
    result = ask(Kit(), background=True, temperature=9)
    assert (result.status_code, result.json["error"]["param"]) == (400, "temperature")


def test_only_background_responses_are_cancelled() -> None:
    kit = Kit()
    answer = ask(kit).json
    assert kit.post(f"/v1/responses/{answer['id']}/cancel", {}).status_code == 400
    assert kit.post("/v1/responses/resp_none/cancel", {}).status_code == 404
