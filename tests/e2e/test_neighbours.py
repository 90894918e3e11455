"""The official anthropic and openai packages against /v1/messages, /v1/responses and /v1/batches of a real server."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from server import Server, metrics, running_server

QUESTION = "What is the capital of France?"
TOOL_SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
PATIENCE_S = 90.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(f"--data_dir={tmp_path_factory.mktemp('data')}") as running:
        yield running


@pytest.fixture(scope="module")
def claude(server: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def test_messages(claude: anthropic.Anthropic, model: str) -> None:
    ask: dict[str, Any] = {
        "model": model,
        "max_tokens": 40,
        "extra_body": {"temperature": 0},
        "messages": [{"role": "user", "content": QUESTION}],
    }
    answer = claude.messages.create(**ask)
    assert "Paris" in answer.content[0].text
    assert answer.stop_reason == "end_turn"
    with claude.messages.stream(**ask) as stream:
        streamed = stream.get_final_message()
    assert streamed.content[0].text == answer.content[0].text
    assert streamed.stop_reason == answer.stop_reason
    assert streamed.usage.output_tokens == answer.usage.output_tokens
    counted = claude.messages.count_tokens(model=model, messages=ask["messages"])
    assert counted.input_tokens == answer.usage.input_tokens + answer.usage.cache_read_input_tokens


def test_messages_with_a_tool(claude: anthropic.Anthropic, model: str) -> None:
    ask: dict[str, Any] = {
        "model": model,
        "max_tokens": 120,
        "extra_body": {"temperature": 0},
        "tools": [
            {"name": "get_weather", "description": "The weather in a city.", "input_schema": TOOL_SCHEMA}
        ],
        "tool_choice": {"type": "tool", "name": "get_weather"},
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
    }
    answer = claude.messages.create(**ask)
    (call,) = [block for block in answer.content if block.type == "tool_use"]
    assert (call.name, answer.stop_reason) == ("get_weather", "tool_use")
    assert isinstance(call.input["city"], str)
    with claude.messages.stream(**ask) as stream:
        (streamed,) = [block for block in stream.get_final_message().content if block.type == "tool_use"]
    assert streamed.input == call.input
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "18 degrees"}
    ask["messages"] += [
        {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in answer.content]},
        {"role": "user", "content": [result]},
    ]
    del ask["tool_choice"]
    assert claude.messages.create(**ask).content


def test_errors_are_the_packages_own(claude: anthropic.Anthropic, model: str) -> None:
    with pytest.raises(anthropic.NotFoundError, match=model):
        claude.messages.create(model="claude", max_tokens=5, messages=[{"role": "user", "content": "x"}])
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        claude.messages.create(
            model=model,
            max_tokens=5,
            extra_body={"temperature": 9},
            messages=[{"role": "user", "content": "x"}],
        )


def test_responses(client: openai.OpenAI, model: str) -> None:
    ask: dict[str, Any] = {"model": model, "temperature": 0, "max_output_tokens": 40}
    first = client.responses.create(input=QUESTION, **ask)
    assert "Paris" in first.output_text
    assert client.responses.retrieve(first.id).output_text == first.output_text
    with client.responses.stream(input=QUESTION, **ask) as stream:
        streamed = stream.get_final_response()
    assert streamed.output_text == first.output_text
    second = client.responses.create(input="And of Spain?", previous_response_id=first.id, **ask)
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens - 3
    assert second.usage.input_tokens_details.cached_tokens > 0
    assert [item.content[0].text for item in client.responses.input_items.list(second.id)] == ["And of Spain?"]
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_a_response_with_a_function(client: openai.OpenAI, model: str) -> None:
    tools: Any = [
        {
            "type": "function",
            "name": "get_weather",
            "description": "Weather",
            "parameters": TOOL_SCHEMA,
            "strict": True,
        }
    ]
    ask: dict[str, Any] = {"model": model, "temperature": 0, "max_output_tokens": 120, "tools": tools}
    answer = client.responses.create(
        input="The weather in Paris?", tool_choice="required", parallel_tool_calls=False, **ask
    )
    assert len(answer.output) == 1
    call, *_ = [item for item in answer.output if item.type == "function_call"]
    assert call.name == "get_weather"
    assert isinstance(json.loads(call.arguments)["city"], str)
    output: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "18 degrees"}]
    again = client.responses.create(input=output, previous_response_id=answer.id, **ask)
    assert again.status in ("completed", "incomplete")


def test_a_response_in_the_background(client: openai.OpenAI, model: str) -> None:
    ask: dict[str, Any] = {"model": model, "temperature": 0, "max_output_tokens": 20, "background": True}
    begun = client.responses.create(input=QUESTION, **ask)
    assert begun.status == "queued"
    assert "Paris" in wait_for(client, begun.id).output_text


def test_a_response_in_the_background_is_cancelled(client: openai.OpenAI, model: str) -> None:
    extra = {"ignore_eos": True}
    begun = client.responses.create(
        model=model, input="Count.", max_output_tokens=7000, background=True, extra_body=extra
    )
    assert client.responses.cancel(begun.id).status == "cancelled"
    assert wait_for(client, begun.id).status == "cancelled"


def test_a_response_that_was_deleted_is_given_up(server: Server, client: openai.OpenAI, model: str) -> None:
    begun = client.responses.create(
        model=model,
        input="Count.",
        max_output_tokens=7000,
        background=True,
        extra_body={"ignore_eos": True},
    )
    until(lambda: client.responses.retrieve(begun.id).status == "in_progress")
    client.responses.delete(begun.id)
    until(lambda: not metrics(server)["shoal:num_requests_running"])
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(begun.id)


def until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def wait_for(client: openai.OpenAI, response_id: str) -> Any:
    deadline_s = time.monotonic() + PATIENCE_S
    while (response := client.responses.retrieve(response_id)).status in ("queued", "in_progress"):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    return response


def test_a_batch_of_every_endpoint_that_chats(client: openai.OpenAI, model: str, tmp_path: Path) -> None:
    bodies = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 20},
        "/v1/responses": {"input": QUESTION, "max_output_tokens": 20},
    }
    for endpoint, body in bodies.items():
        line = {
            "custom_id": "a",
            "method": "POST",
            "url": endpoint,
            "body": {"model": model, "temperature": 0} | body,
        }
        path = tmp_path / "input.jsonl"
        path.write_text(json.dumps(line))
        file = client.files.create(file=path, purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")  # type: ignore[arg-type]
        deadline_s = time.monotonic() + PATIENCE_S
        while (batch := client.batches.retrieve(batch.id)).status not in ("completed", "failed"):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        assert batch.output_file_id, batch
        assert "Paris" in client.files.content(batch.output_file_id).text
