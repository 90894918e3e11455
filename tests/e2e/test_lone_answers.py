"""What a busy server answers is what an idle one answers, to the bit.

Two hundred mixed requests go, many at a time, to a server that is short of everything: blocks, so that it preempts, the
more as urgent requests keep coming; tokens a step, so that prompts are cut into chunks; and prompts begin alike, so
that they are found in its prefix cache; and tokens are guessed. Each goes again, alone, to a server with room for
everything, no such cache and no guesses.
"""

import asyncio
import random
import time
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx
import pytest
from server import metrics, running_server

REQUESTS = 200
OPEN = 48
SESSION_TOKENS = 256
STEP_TOKENS = 64
BLOCK_TOKENS = 8
BLOCKS = 48
POSITION_BYTES = {"bfloat16": 2 * 30 * 3 * 64 * 2, "int8": 2 * 30 * 3 * (64 + 8)}
"""Of the default model: keys and values in 30 layers of 3 heads, 64 elements each; an int8 head has two scales."""
WORDS = ["river", "stone", "lamp", "seven", "quiet", "engine", "paper", "north", "glass", "apple", "winter"]


@dataclass(frozen=True)
class Answer:
    """The part of an answer that must not depend on the company, and the prompt tokens that were computed for it."""

    choices: list[dict[str, Any]]
    computed: int


def words(rng: random.Random, fewest: int, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(fewest, most)))


def mixed_requests(seed: int) -> list[dict[str, Any]]:
    """Short prompts with long answers, which outgrow the blocks, short and long ones with short answers, which may have
    one of a few beginnings; every kind of sampling, each with a seed."""
    rng = random.Random(seed)
    openings = [words(rng, 30, 70) for _ in range(6)]
    return [mixed_request(rng, openings) for _ in range(REQUESTS)]


def mixed_request(rng: random.Random, openings: list[str]) -> dict[str, Any]:
    kind = rng.random()
    if kind < 0.22:
        text, most = words(rng, 1, 5), rng.randint(30, 40)
    elif kind < 0.9:
        text, most = words(rng, 1, 12), rng.randint(1, 8)
    else:
        text, most = words(rng, 80, 130), rng.randint(1, 16)
    if kind >= 0.22 and rng.random() < 0.6:
        text = f"{rng.choice(openings)} {text}"
    request: dict[str, Any] = {
        "prompt": text,
        "max_tokens": most,
        "ignore_eos": rng.random() < 0.8,
        "return_token_ids": True,
        "logprobs": rng.choice([0, 1, 5, 20]),
        "repetition_penalty": rng.choice([1, 1, 1.3]),
        "presence_penalty": rng.choice([0, 0, 0.7]),
        "frequency_penalty": rng.choice([0, 0, 0.4]),
        "temperature": 0,
        "priority": rng.randint(0, 9),
    }
    if rng.random() < 0.6:
        request |= {
            "temperature": rng.choice([0.6, 1.0, 1.4]),
            "top_k": rng.choice([0, 5, 40]),
            "top_p": rng.choice([1, 0.9, 0.5]),
            "min_p": rng.choice([0, 0, 0.05]),
            "seed": rng.randrange(1 << 31),
            "n": rng.choice([1, 1, 1, 1, 1, 2, 3]),
        }
    if rng.random() < 0.1:
        request["prompt_logprobs"] = 2
    return request


async def ask(client: httpx.AsyncClient, request: dict[str, Any]) -> Answer:
    answer = await client.post("/v1/completions", json=request)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    usage = body["usage"]
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return Answer(body["choices"], usage["prompt_tokens"] - cached)


async def ask_together(url: str, requests: list[dict[str, Any]]) -> list[Answer]:
    """``OPEN`` of them at any time, so that urgent ones keep coming while others run."""
    doors = asyncio.Semaphore(OPEN)

    async def enter(request: dict[str, Any]) -> Answer:
        async with doors:
            return await ask(client, request)

    async with httpx.AsyncClient(
        base_url=url, timeout=300, limits=httpx.Limits(max_connections=OPEN)
    ) as client:
        return await asyncio.gather(*map(enter, requests))


async def ask_one_by_one(url: str, requests: list[dict[str, Any]]) -> list[Answer]:
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        return [await ask(client, request) for request in requests]


@pytest.mark.parametrize("cache_dtype", POSITION_BYTES)
def test_200_requests_in_a_crowd_get_their_lone_answers(cache_dtype: str) -> None:
    seed = time.time_ns()
    requests = mixed_requests(seed)
    kept = ("--kv_cache_dtype", cache_dtype)
    short = ("--session_len", str(SESSION_TOKENS), "--max_prefill_token_num", str(STEP_TOKENS))
    cache_bytes = BLOCKS * BLOCK_TOKENS * POSITION_BYTES[cache_dtype]
    memory = ("--cache_bytes", str(cache_bytes), "--cache_block_seq_len", str(BLOCK_TOKENS))
    with running_server(*kept, *short, *memory) as busy:
        together = asyncio.run(ask_together(busy.url, requests))
        counted = metrics(busy)
    with running_server(*kept, "--no_prefix_caching", "--speculative_num_draft_tokens", "0") as idle:
        alone = asyncio.run(ask_one_by_one(idle.url, requests))
    for request, crowded, lone in zip(requests, together, alone, strict=True):
        assert crowded.choices == lone.choices, (seed, request)
    check_that_it_was_hard(counted, together)


def check_that_it_was_hard(counted: dict[str, float], together: list[Answer]) -> None:
    """Whether everything happened that must not show."""
    steps = counted["shoal:iteration_tokens_total_count"]
    assert counted["shoal:kv_blocks_total"] == BLOCKS
    assert counted["shoal:num_preemptions_total"] > 20
    assert counted["shoal:prefix_cache_hits_total"] > 1000
    assert counted["shoal:spec_decode_num_accepted_tokens_total"] > 0
    assert counted["shoal:step_rows_total"] / steps > 4, "the requests did not run together"
    assert counted[f'shoal:iteration_tokens_total_bucket{{le="{float(STEP_TOKENS)}"}}'] == steps
    chunked = [answer for answer in together if answer.computed > STEP_TOKENS]
    assert len(chunked) > 10, "no step may hold such prompts, so each came in chunks"
