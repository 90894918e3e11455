"""Answers of the real model while ranks and schedulers are killed: to the last digit those of a server left alone."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from server import Server, eventually, metrics, running_server

FORM = {
    "type": "json_schema",
    "json_schema": {
        "name": "town",
        "schema": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 60}, "people": {"type": "integer"}},
            "required": ["name", "people"],
            "additionalProperties": False,
        },
    },
}
STORY = "Write a long story about a lamp and a river."
REQUESTS: list[dict[str, Any]] = [
    {"temperature": 0, "max_tokens": 120},
    {"temperature": 1, "seed": 1, "max_tokens": 120, "logprobs": True, "top_logprobs": 3},
    {"temperature": 0.8, "seed": 2, "max_tokens": 120, "n": 3},
    {"temperature": 1, "seed": 3, "max_tokens": 120, "frequency_penalty": 0.7, "repetition_penalty": 1.2},
    {"temperature": 1, "seed": 4, "max_tokens": 120, "response_format": FORM},
    {"temperature": 1, "seed": 5, "max_tokens": 120, "stop": ["\n\n", "river and"]},
    {"temperature": 1, "seed": 6, "max_tokens": 120, "min_tokens": 100},
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server("--instance_num", "8", "--session_len", "512", ready_timeout_s=120) as running:
        yield running


def choices(server: Server, number: int) -> Any:
    body = {"messages": [{"role": "user", "content": f"{STORY} ({number})"}], **REQUESTS[number]}
    status, answer = server.post("/v1/chat/completions", body)
    assert status == 200, answer
    return answer["choices"]


def streamed(server: Server) -> str:
    """A stream's text."""
    body = {"prompt": STORY, "max_tokens": 150, "temperature": 0, "ignore_eos": True, "stream": True}
    return "".join(event["choices"][0]["text"] for event in server.stream("/v1/completions", body))


@pytest.fixture(scope="module")
def alone(server: Server) -> list[Any]:
    return [choices(server, number) for number in range(len(REQUESTS))]


@pytest.mark.parametrize("victims", [("rank",), ("scheduler",), ("rank", "scheduler", "rank")], ids="-".join)
def test_no_client_notices_more_than_a_pause(
    server: Server, alone: list[Any], victims: tuple[str, ...]
) -> None:
    text = streamed(server)
    with ThreadPoolExecutor(len(REQUESTS) + 1) as pool:
        together = [pool.submit(choices, server, number) for number in range(len(REQUESTS))]
        stream = pool.submit(streamed, server)
        for victim in victims:
            wait_until_it_generates(server)
            os.kill(server.children()[victim][0], signal.SIGKILL)
        assert [one.result() for one in together] == alone
        assert stream.result() == text
    assert "Traceback" not in server.log()


def wait_until_it_generates(server: Server) -> None:
    """Some tokens more than now."""
    before = generated(server)
    eventually(lambda: generated(server) >= before + 10, timeout_s=60)


def generated(server: Server) -> float:
    return metrics(server).get("shoal:generation_tokens_total", 0.0)
