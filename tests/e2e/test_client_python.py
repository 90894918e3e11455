"""``APIClient`` and the terminal client against a real server, as scripts for LMDeploy use them."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import server
from terminal_kit import Terminal

from shoal.client import (
    APIClient,
    AuthenticationError,
    BadRequestError,
    ConflictError,
    ContextLengthError,
    NotFoundError,
    get_model_list,
    get_streaming_response,
)

API_CLIENT = str(server.ROOT / "bin" / "api_client")
KEY = "sk-a-key-for-the-client"
LONG = "Write a very long and detailed story about a lighthouse keeper, at least 2000 words."


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[server.Server]:
    data = tmp_path_factory.mktemp("data")
    with server.running_server(f"--data_dir={data}", env={"SHOAL_API_KEYS": KEY}) as started:
        yield started


@pytest.fixture
def api(running: server.Server) -> Iterator[APIClient]:
    with APIClient(running.url, api_key=KEY, timeout=120) as client:
        yield client


def test_models_and_health(api: APIClient, running: server.Server) -> None:
    assert api.available_models == ["SmolLM2-135M-Instruct"]
    headers = {"Authorization": f"Bearer {KEY}"}
    assert get_model_list(f"{running.url}/v1/models", headers=headers) == api.available_models
    assert api.health_check()
    assert api.is_ready()


def test_chat_completions(api: APIClient) -> None:
    model_name = api.available_models[0]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    (whole,) = api.chat_completions_v1(model=model_name, messages=messages, temperature=0, seed=1)
    assert "Paris" in whole["choices"][0]["message"]["content"]
    chunks = list(api.chat_completions_v1(model_name, messages, temperature=0, stream=True))
    said = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert said == whole["choices"][0]["message"]["content"]
    (raw,) = api.chat_completions_v1(model_name, "The capital of France is", max_tokens=4, temperature=0)
    assert "Paris" in raw["choices"][0]["message"]["content"]


def test_completions_end_cleanly(api: APIClient) -> None:
    model_name = api.available_models[0]
    (whole,) = api.completions_v1(
        model=model_name, prompt="The capital of France is", temperature=0, max_tokens=8
    )
    chunks = list(api.completions_v1(model_name, "The capital of France is", None, 0, 1, 8, True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_encode(api: APIClient) -> None:
    input_ids, length = api.encode("Hello, world")
    assert length == len(input_ids) > 0
    lists, lengths = api.encode(["Hello, world", "a"])
    assert lists[0] == input_ids
    assert lengths == [len(ids) for ids in lists]
    assert api.encode("Hello, world", do_preprocess=True)[1] > length


def test_a_conversation_over_turns(api: APIClient, running: server.Server) -> None:
    session = 1001
    ((_, tokens, _),) = api.chat("My name is Ada.", session, request_output_len=16, temperature=0)
    assert tokens > 0
    (turn,) = api.chat_interactive_v1(
        "What did I say?", session_id=session, interactive_mode=True, request_output_len=16, temperature=0
    )
    assert turn["history_tokens"] > 0
    url = f"{running.url}/v1/chat/interactive"
    streamed = list(get_streaming_response("And now?", url, session, 8, interactive_mode=True, api_key=KEY))
    assert streamed[-1][2] in ("stop", "length")
    assert [one["id"] for one in api.sessions()] == [session]
    assert [message["role"] for message in api.session(session)["messages"]] == ["user", "assistant"] * 3
    api.end_session(session)
    api.end_session(session)
    assert api.sessions() == []
    with pytest.raises(NotFoundError):
        api.session(session)


def test_one_turn_at_a_time_and_a_cancel(api: APIClient) -> None:
    session = 1002
    answer = api.chat(LONG, session, request_output_len=2000, stream=True, ignore_eos=True)
    first = next(answer)
    with pytest.raises(ConflictError) as caught:
        list(api.chat("Meanwhile", session))
    assert caught.value.retry_after is not None
    api.cancel(session)
    rest = list(answer)
    assert rest[-1][2] == "cancelled"
    said = first[0] + "".join(text for text, _, _ in rest)
    assert api.session(session)["messages"][-1]["content"] == said, "what was said stays"
    api.end_session(session)


def test_leaving_a_stream_frees_the_server(api: APIClient, running: server.Server) -> None:
    model_name = api.available_models[0]
    answer = api.chat_completions_v1(model_name, LONG, max_tokens=4000, stream=True, ignore_eos=True)
    next(answer)
    answer.close()  # type: ignore[attr-defined]
    deadline_s = time.monotonic() + 10
    with APIClient(running.url, api_key=KEY) as other:
        assert other.health_check()
    while "shoal:num_requests_running 0.0" not in metrics(running):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def metrics(running: server.Server) -> str:
    import urllib.request

    request = urllib.request.Request(f"{running.url}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        text: str = answer.read().decode()
    return text


def test_errors_say_what_the_server_says(api: APIClient, running: server.Server) -> None:
    with pytest.raises(NotFoundError, match="SmolLM2-135M-Instruct"):
        list(api.chat_completions_v1("internlm-chat-7b", [{"role": "user", "content": "hi"}]))
    with pytest.raises(BadRequestError) as caught:
        list(api.chat_completions_v1(api.available_models[0], "hi", tempreature=1))
    assert caught.value.param == "tempreature"
    with pytest.raises(ContextLengthError, match="tokens"):
        list(api.completions_v1(api.available_models[0], "word " * 20_000, stream=True))
    with APIClient(running.url, api_key="wrong", max_retries=0) as stranger, pytest.raises(AuthenticationError):
        list(stranger.chat_interactive_v1("hi"))


def test_threads_share_a_client(api: APIClient) -> None:
    model_name = api.available_models[0]
    said: dict[int, str] = {}

    def ask(number: int) -> None:
        events = api.completions_v1(
            model_name, f"{number} + {number} =", max_tokens=8, temperature=0, stream=True
        )
        said[number] = "".join(event["choices"][0]["text"] for event in events)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for number in range(6):
        (alone,) = api.completions_v1(model_name, f"{number} + {number} =", max_tokens=8, temperature=0)
        assert said[number] == alone["choices"][0]["text"]


def test_the_terminal_client(running: server.Server, api: APIClient, tmp_path: Path) -> None:
    command = ["-m", "shoal.cli", "serve", "api_client", running.url, "--api_key", KEY, "--session_id", "77"]
    with Terminal(*command, "--temperature", "0", "--max_tokens", "60", state=tmp_path) as terminal:
        terminal.say("What is the capital of France?")
        terminal.wait_for("capital of France is Paris")
        terminal.wait_prompt()
        assert len(api.session(77)["messages"]) == 2
        terminal.type("/stats\r")
        terminal.wait_for(r"tokens/s")
        terminal.wait_prompt()
        terminal.type("\x04")
        assert terminal.wait_end() == 0
    with Terminal(*command, "--temperature", "0", state=tmp_path) as terminal:
        terminal.wait_for(r"session 77 \(continued, 2 messages\)")
        terminal.say(LONG)
        terminal.wait_for("(?i)lighthouse(.|\n)*lighthouse")
        terminal.type("\x03")
        terminal.wait_for("stopped")
        terminal.say("exit")
        assert terminal.wait_end() == 0
    assert api.sessions() == []


def test_the_terminal_client_in_a_pipe(running: server.Server, api: APIClient) -> None:
    ended = subprocess.run(
        [sys.executable, API_CLIENT, running.url, "--api-key", KEY, "--temperature", "0", "--max-tokens", "20"],
        input="What is the capital of France?\nAnd of Italy?\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "Paris" in ended.stdout
    assert api.sessions() == []
