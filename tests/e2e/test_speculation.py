"""Guessed tokens change when an answer comes and never what it is: with and without them, by one rank and by two."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from server import Server, metrics, running_server

GUESSED, RIGHT = "shoal:spec_decode_num_draft_tokens_total", "shoal:spec_decode_num_accepted_tokens_total"
LIST = "1. apple\n2. pear\n3. plum\n4. apple\n5. pear\n6. plum\n7. apple\n8."
BASE: dict[str, Any] = {
    "max_tokens": 60,
    "temperature": 0,
    "ignore_eos": True,
    "logprobs": 2,
    "return_token_ids": True,
}
REQUESTS: list[dict[str, Any]] = [
    BASE | {"prompt": LIST},
    BASE | {"prompt": "one two three one two three one two", "max_tokens": 33},
    BASE | {"prompt": LIST, "temperature": 0.7, "seed": 11, "n": 2},
    BASE | {"prompt": LIST, "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.1},
    BASE | {"prompt": LIST, "stop": ["12."], "ignore_eos": False},
    BASE | {"prompt": LIST, "min_tokens": 20, "ignore_eos": False},
    BASE | {"prompt": LIST, "max_tokens": 1},
    BASE | {"prompt": "red blue red blue red blue", "guided_regex": "(red |blue )+", "ignore_eos": False},
]


def answers(server: Server, at_once: int) -> list[Any]:
    def ask(body: dict[str, Any]) -> Any:
        status, answer = server.post("/v1/completions", body)
        assert status == 200, answer
        return answer["choices"], answer["usage"]["completion_tokens"]

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(ask, REQUESTS))


@pytest.mark.parametrize("tp", [1, 2])
def test_answers_are_the_same_with_guesses_and_without(tp: int) -> None:
    flags = ("--tp", str(tp), "--instance_num", "16", "--session_len", "512")
    with running_server(*flags, "--speculative_num_draft_tokens", "0") as plain:
        expected = answers(plain, 1)
        assert metrics(plain)[GUESSED] == 0
    with running_server(*flags) as guessing:
        assert answers(guessing, 1) == expected
        counted = metrics(guessing)
        assert answers(guessing, len(REQUESTS)) == expected
    assert 20 < counted[RIGHT] <= counted[GUESSED]
    assert counted["shoal:steps_total"] < counted["shoal:generation_tokens_total"] - 20


def test_a_stream_gives_the_tokens_of_a_step_in_one_event_and_all_of_them() -> None:
    with running_server("--instance_num", "4", "--session_len", "512") as server:
        whole = server.post("/v1/completions", REQUESTS[0])[1]["choices"][0]
        events = server.stream("/v1/completions", REQUESTS[0] | {"stream": True})
    choices = [event["choices"][0] for event in events if event["choices"]]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [value for part in parts for value in part[name]] == whole["logprobs"][name]
    counts = [len(part["tokens"]) for part in parts]
    assert sum(counts) == 60
    assert max(counts) > 1
