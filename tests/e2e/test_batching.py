"""Continuous batching in a running server: sameness, fairness to short requests, many streams, gone clients."""

import asyncio
import json
import random
import time
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
from server import Server, metrics, running_server

WORDS = ["river", "stone", "lamp", "seven", "quiet", "engine", "paper", "north", "glass", "apple", "winter"]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server("--instance_num", "64") as running:
        yield running


def mixed_requests(count: int, seed: int) -> list[dict[str, Any]]:
    """Different prompts, lengths and samplings; each with a seed of its own."""
    rng = random.Random(seed)
    requests = []
    for number in range(count):
        prompt = " ".join(rng.choices(WORDS, k=rng.randrange(3, 90)))
        greedy = number % 2 == 0
        requests.append(
            {
                "prompt": f"Story {number}: {prompt}",
                "max_tokens": rng.randrange(8, 40),
                "seed": rng.randrange(1 << 31),
                "temperature": 0 if greedy else rng.choice([0.7, 1.0, 1.3]),
                "top_p": rng.choice([1, 0.9]),
                "top_k": rng.choice([0, 20]),
                "repetition_penalty": rng.choice([1, 1.2]),
                "logprobs": 5,
                "ignore_eos": True,
            }
        )
    return requests


async def complete(url: str, body: dict[str, Any]) -> dict[str, Any]:
    async with httpx.AsyncClient(timeout=300) as client:
        answer = await client.post(f"{url}/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def test_a_batch_of_32_gives_each_its_lone_answer(server: Server) -> None:
    requests = mixed_requests(32, seed=time.time_ns())

    async def all_at_once() -> list[dict[str, Any]]:
        return await asyncio.gather(*(complete(server.url, body) for body in requests))

    before = metrics(server)
    batched = asyncio.run(all_at_once())
    after = metrics(server)
    rows = after["shoal:step_rows_total"] - before["shoal:step_rows_total"]
    steps = after["shoal:steps_total"] - before["shoal:steps_total"]
    assert rows / steps > 8, "the requests did not run together"
    for body, together in zip(requests, batched, strict=True):
        assert asyncio.run(complete(server.url, body)) == together, body


def test_a_late_short_request_finishes_before_an_early_long_one(server: Server) -> None:
    async def race() -> tuple[float, float]:
        long = {"prompt": "word " * 3000, "max_tokens": 200, "ignore_eos": True, "temperature": 0}
        short = {"prompt": "Hi", "max_tokens": 5, "ignore_eos": True, "temperature": 0}

        async def timed(body: dict[str, Any]) -> float:
            await complete(server.url, body)
            return time.monotonic()

        early = asyncio.create_task(timed(long))
        await asyncio.sleep(0.3)
        late = asyncio.create_task(timed(short))
        return await early, await late

    long_end, short_end = asyncio.run(race())
    assert short_end < long_end


async def stream_events(url: str, body: dict[str, Any], read_events: int | None = None) -> list[dict[str, Any]]:
    """The events of one stream; with ``read_events`` the client leaves after that many."""
    events: list[dict[str, Any]] = []
    async with httpx.AsyncClient(timeout=300) as client, client.stream("POST", url, json=body) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                return events
            events.append(json.loads(line[6:]))
            if read_events is not None and len(events) >= read_events:
                return events
    raise AssertionError("the stream ended without [DONE]")


def chat(number: int, max_tokens: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"Tell me {number + 1} things about {WORDS[number % len(WORDS)]}."}
        ],
        "model": "SmolLM2-135M-Instruct",
        "max_tokens": max_tokens,
        "stream": True,
        "seed": number,
    }


def test_64_streaming_chats_each_end_once(server: Server) -> None:
    async def all_at_once() -> list[list[dict[str, Any]]]:
        url = f"{server.url}/v1/chat/completions"
        return await asyncio.gather(*(stream_events(url, chat(n, 5 + 7 * n % 60)) for n in range(64)))

    for events in asyncio.run(all_at_once()):
        reasons = [e["choices"][0]["finish_reason"] for e in events if e["choices"][0]["finish_reason"]]
        assert len(reasons) == 1
        assert reasons[0] in ("stop", "length")
        assert events[-1]["choices"][0]["finish_reason"] == reasons[0]


def test_gone_clients_leave_no_block(server: Server) -> None:
    async def leave_midway() -> None:
        url = f"{server.url}/v1/chat/completions"
        await asyncio.gather(*(stream_events(url, chat(n, 400), read_events=3) for n in range(16)))

    async def give_up_waiting() -> None:
        body = {"prompt": "word " * 500, "max_tokens": 2000, "ignore_eos": True}
        async with httpx.AsyncClient(timeout=1.0) as client:
            with pytest.raises(httpx.TimeoutException):
                await client.post(f"{server.url}/v1/completions", json=body)

    asyncio.run(leave_midway())
    asyncio.run(give_up_waiting())
    deadline_s = time.monotonic() + 5
    while metrics(server)["shoal:kv_blocks_used"] or metrics(server)["shoal:num_requests_running"]:
        assert time.monotonic() < deadline_s, "blocks are still held for clients that are gone"
        time.sleep(0.1)
    assert metrics(server)["shoal:num_requests_waiting"] == 0


def test_a_queued_client_that_leaves_is_forgotten() -> None:
    async def queue_and_leave(url: str) -> None:
        body = {"prompt": "Hello", "max_tokens": 900, "ignore_eos": True, "temperature": 2.0}
        busy = asyncio.create_task(complete(url, body))
        await asyncio.sleep(0.5)
        async with httpx.AsyncClient(timeout=0.7) as client:
            with pytest.raises(httpx.TimeoutException):
                await client.post(f"{url}/v1/completions", json=body)
        await asyncio.sleep(0.3)
        waiting.append(metrics(server)["shoal:num_requests_waiting"])
        running.append(metrics(server)["shoal:num_requests_running"])
        assert (await busy)["finish_reason"] == "length"

    waiting: list[float] = []
    running: list[float] = []
    with running_server("--instance_num", "1") as server:
        asyncio.run(queue_and_leave(server.url))
    assert waiting == [0]
    assert running == [1]
