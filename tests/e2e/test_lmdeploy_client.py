"""LMDeploy's own client file against a real server. Needs the package lmdeploy, of which nothing else is loaded, or
$SHOAL_TEST_LMDEPLOY_CLIENT: the path of its ``serve/openai/api_client.py``."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server import Server, running_server

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def client_file() -> Path | None:
    if named := os.environ.get("SHOAL_TEST_LMDEPLOY_CLIENT"):
        return Path(named)
    package = importlib.util.find_spec("lmdeploy")
    if package is None or package.origin is None:
        return None
    return Path(package.origin).parent / "serve" / "openai" / "api_client.py"


@pytest.fixture(scope="module")
def theirs() -> Any:
    path = client_file()
    if path is None:
        pytest.skip("needs lmdeploy's client: set SHOAL_TEST_LMDEPLOY_CLIENT")
    spec = importlib.util.spec_from_file_location("lmdeploy_client", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def server(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(f"--data_dir={tmp_path_factory.mktemp('data')}") as running:
        yield running


@pytest.fixture
def api_client(theirs: Any, server: Server) -> Any:
    return theirs.APIClient(server.url)


def test_models_and_tokens(theirs: Any, api_client: Any, server: Server) -> None:
    assert theirs.get_model_list(f"{server.url}/v1/models") == api_client.available_models
    ids, length = api_client.encode("Hello, world")
    assert len(ids) == length
    assert api_client.encode(["Hello, world", "a"])[0][0] == ids


def test_chat_completions(api_client: Any) -> None:
    model = api_client.available_models[0]
    ask = {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": 20}
    (whole,) = api_client.chat_completions_v1(**ask)
    text = whole["choices"][0]["message"]["content"]
    assert "Paris" in text
    chunks = list(api_client.chat_completions_v1(**ask, stream=True))
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == text


def test_completions(api_client: Any) -> None:
    (item,) = api_client.completions_v1(api_client.available_models[0], "hi", max_tokens=5)
    assert item["usage"]["completion_tokens"] <= 5


def test_a_conversation(theirs: Any, api_client: Any, server: Server) -> None:
    ask = {"session_id": 31, "request_output_len": 12, "temperature": 0}
    ((_, tokens, reason),) = api_client.chat("My name is Ann.", **ask)
    assert (tokens, reason) == (12, "length")
    events = list(api_client.chat_interactive_v1("And mine?", interactive_mode=True, stream=True, **ask))
    assert events[-1]["history_tokens"] > 12
    url = f"{server.url}/v1/chat/interactive"
    streamed = list(theirs.get_streaming_response("Again.", url, 31, 8, True, interactive_mode=True))
    assert streamed[-1][1:] == (8, "length")
    api_client.end_session(31)
    assert server.get("/v1/sessions/31")[0] == 404
