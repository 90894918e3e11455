"""Every example of LMDeploy's RESTful API document, typed as a newcomer would, and its four frequent questions."""

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server import API_SERVER, ROOT, Server, free_port, metrics, needed_program, running_server

from shoal.client import APIClient, get_model_list

SHOAL = (str(Path(sys.executable).parent / "shoal"), "serve")
JSON_HEADER = "Content-Type: application/json"
PROMPT = "\x1b[?2004h"
"""What a line editor sends when it begins to read: bracketed paste on."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """As the document starts it, but for the address that nobody else is to reach."""
    data_dir = tmp_path_factory.mktemp("data")
    command = (*SHOAL, "api_server")
    with running_server(
        "--instance_num", "64", "--tp", "1", f"--data_dir={data_dir}", command=command
    ) as running:
        yield running


@pytest.fixture(scope="module")
def api_client(server: Server) -> APIClient:
    return APIClient(server.url)


def curl(*args: str) -> Any:
    done = subprocess.run(
        [needed_program("curl"), "-sS", "-m", "60", *args], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


# --- the server and its page -----------------------------------------------------------------------------


def test_the_old_second_positional_is_the_address(tmp_path: Path) -> None:
    port = free_port()
    command = [*API_SERVER, "--help"]
    assert "MODEL" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    model = subprocess.run(
        [sys.executable, "-c", "import models; print(models.default_model_path())"],
        cwd=ROOT / "tests", capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    args = [
        model,
        "127.0.0.1",
        f"--server_port={port}",
        "--instance_num",
        "4",
        "--tp",
        "1",
        f"--data_dir={tmp_path}",
    ]
    process = subprocess.Popen(
        [*SHOAL, "api_server", *args], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        printed = next(line for line in process.stdout if "http://" in line)
        url = re.search(r"http://[\w.:]+", printed)
        assert url is not None
        assert url[0] == f"http://127.0.0.1:{port}"
        assert curl(f"{url[0]}/v1/models")["data"]
    finally:
        process.terminate()
        process.wait(60)


def test_the_printed_url_shows_every_api(server: Server) -> None:
    done = subprocess.run(
        [needed_program("curl"), "-sS", "-m", "20", "-H", "Accept: text/html", f"{server.url}/"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "swagger" in done.stdout.lower()
    paths = curl(f"{server.url}/openapi.json")["paths"]
    for path in ("/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/chat/interactive", "/v1/encode"):
        assert path in paths


# --- Python ----------------------------------------------------------------------------------------------


def test_chat_completions_in_python(api_client: APIClient) -> None:
    model_name = api_client.available_models[0]
    messages = [{"role": "user", "content": "Say this is a test!"}]
    items = list(api_client.chat_completions_v1(model=model_name, messages=messages))
    assert [item["object"] for item in items] == ["chat.completion"]
    assert items[0]["choices"][0]["message"]["content"]


def test_completions_in_python(api_client: APIClient) -> None:
    model_name = api_client.available_models[0]
    (item,) = api_client.completions_v1(model=model_name, prompt="hi")
    assert item["usage"]["completion_tokens"] <= 16
    assert isinstance(item["choices"][0]["text"], str)


def test_interactive_in_python(api_client: APIClient) -> None:
    (item,) = api_client.chat_interactive_v1(prompt="hi")
    assert item["finish_reason"] in ("stop", "length")
    assert item["tokens"] > 0


def test_several_turns_in_python(api_client: APIClient) -> None:
    history = 0
    for prompt in ("My name is Ann.", "What is my name?", "Spell it."):
        ask = {"prompt": prompt, "session_id": 11, "interactive_mode": True, "request_output_len": 24}
        (item,) = api_client.chat_interactive_v1(**ask)
        assert item["history_tokens"] == history
        history += item["input_tokens"] + item["tokens"]
    streamed = list(api_client.chat_interactive_v1("Bye.", session_id=11, interactive_mode=True, stream=True))
    assert len(streamed) > 1
    assert streamed[-1]["finish_reason"] in ("stop", "length")
    assert all(item["finish_reason"] is None for item in streamed[:-1])


def test_the_list_of_models(server: Server, api_client: APIClient) -> None:
    assert get_model_list(f"{server.url}/v1/models") == api_client.available_models


# --- generated clients: tests/e2e/test_generated_clients.py ----------------------------------------------


def test_schema_names_of_generated_code(server: Server) -> None:
    document = curl(f"{server.url}/openapi.json")
    assert {
        "ChatCompletionRequest",
        "CompletionRequest",
        "EmbeddingsRequest",
        "GenerateRequest",
        "HTTPValidationError",
        "ValidationError",
    } <= set(document["components"]["schemas"])
    assert not any("tags" in operation for path in document["paths"].values() for operation in path.values())


# --- curl ------------------------------------------------------------------------------------------------


def test_curl_models(server: Server) -> None:
    assert curl(f"{server.url}/v1/models")["data"][0]["object"] == "model"


def test_curl_interactive(server: Server) -> None:
    body = {"prompt": "Hello! How are you?", "session_id": 1, "interactive_mode": True}
    answer = curl(f"{server.url}/v1/chat/interactive", "-H", JSON_HEADER, "-d", json.dumps(body))
    assert answer["text"]
    assert answer["history_tokens"] == 0


def test_curl_chat_names_the_served_models(server: Server) -> None:
    messages = [{"role": "user", "content": "Hello! How are you?"}]
    body = {"model": "internlm-chat-7b", "messages": messages}
    path = f"{server.url}/v1/chat/completions"
    refused = curl(path, "-H", JSON_HEADER, "-d", json.dumps(body))
    served = curl(f"{server.url}/v1/models")["data"][0]["id"]
    assert served in refused["error"]["message"]
    assert (refused["object"], refused["code"]) == ("error", 404), "as LMDeploy's clients read it"
    answer = curl(path, "-H", JSON_HEADER, "-d", json.dumps(body | {"model": served}))
    assert answer["choices"][0]["message"]["content"]


def test_curl_completions(server: Server) -> None:
    body = {"model": "llama", "prompt": "two steps to build a house:"}
    path = f"{server.url}/v1/completions"
    assert "SmolLM2" in curl(path, "-H", JSON_HEADER, "-d", json.dumps(body))["error"]["message"]
    body["model"] = curl(f"{server.url}/v1/models")["data"][0]["id"]
    assert curl(path, "-H", JSON_HEADER, "-d", json.dumps(body))["choices"][0]["text"]


# --- terminal and page -----------------------------------------------------------------------------------


def test_the_terminal_client(server: Server) -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [*SHOAL, "api_client", server.url], stdin=follower, stdout=follower, stderr=follower, close_fds=True
    )
    os.close(follower)
    try:
        _read_until(leader, lambda text: PROMPT in text)
        os.write(leader, b"What is the capital of France?\r")
        _read_until(leader, lambda text: "Paris" in text.partition("France?")[2])
        os.write(leader, b"exit\r")
        assert process.wait(20) == 0
    finally:
        process.kill()
        os.close(leader)


def _read_until(descriptor: int, holds: Any, patience_s: float = 60) -> str:
    text, deadline_s = "", time.monotonic() + patience_s
    while not holds(text):
        left = deadline_s - time.monotonic()
        assert left > 0, text
        if select.select([descriptor], [], [], left)[0]:
            text += os.read(descriptor, 65536).decode(errors="replace")
    return text


def test_the_page_command_says_what_it_needs_or_serves(server: Server) -> None:
    port = free_port()
    command = [*SHOAL, "gradio", server.url, "--server_name", "localhost", "--server_port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        text = ""
        for line in process.stdout:
            text += line
            if str(port) in line or "shoal[webui]" in line:
                break
        if "shoal[webui]" in text:
            assert process.wait(20) == 2
        else:
            page = subprocess.run(
                [needed_program("curl"), "-sS", "-m", "20", f"http://localhost:{port}/"],
                capture_output=True,
                text=True,
            )
            assert "gradio" in page.stdout
    finally:
        process.kill()
        process.wait()


# --- frequent questions ----------------------------------------------------------------------------------


def test_a_conversation_longer_than_allowed_ends_with_length(tmp_path: Path) -> None:
    with running_server("--session_len", "128", f"--data_dir={tmp_path}") as small:
        client = APIClient(small.url)
        ask = {"session_id": 5, "interactive_mode": True, "request_output_len": 40}
        reasons = []
        for _ in range(8):
            (item,) = client.chat_interactive_v1("Tell me a long story about the sea.", **ask)
            reasons.append(item["finish_reason"])
            if item["tokens"] == 0:
                break
        assert reasons[-1] == "length"
        assert item["text"] == ""


def test_fewer_instances_take_less_memory(tmp_path: Path) -> None:
    blocks = []
    for instances in ("2", "8"):
        with running_server(
            "--instance_num", instances, "--session_len", "512", f"--data_dir={tmp_path}"
        ) as each:
            blocks.append(next(v for k, v in metrics(each).items() if "blocks_total" in k or "num_blocks" in k))
    assert 3 < blocks[1] / blocks[0] < 5


def test_interactive_mode_off_and_on_again_restarts_a_session(api_client: APIClient) -> None:
    ask = {"session_id": 21, "request_output_len": 16}
    (first,) = api_client.chat_interactive_v1("One.", interactive_mode=True, **ask)
    assert first["tokens"] > 0
    (second,) = api_client.chat_interactive_v1("Two.", interactive_mode=False, **ask)
    assert second["history_tokens"] == first["input_tokens"] + first["tokens"]
    (third,) = api_client.chat_interactive_v1("Three.", interactive_mode=True, **ask)
    assert third["history_tokens"] == 0
    api_client.end_session(21)


@pytest.mark.parametrize("prompt", ["hi", [{"role": "user", "content": "hi"}]])
def test_prompts_and_messages_are_texts_or_histories(
    server: Server, api_client: APIClient, prompt: Any
) -> None:
    (item,) = api_client.chat_interactive_v1(prompt, request_output_len=8)
    assert item["tokens"] > 0
    model_name = api_client.available_models[0]
    (chat,) = api_client.chat_completions_v1(model=model_name, messages=prompt, max_tokens=8)
    assert chat["choices"][0]["message"]["role"] == "assistant"
