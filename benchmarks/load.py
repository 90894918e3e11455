"""A closed-loop streaming load on an OpenAI completions route; what ``serve.py`` and ``vs_peers.py`` stand on.

Asyncio and raw sockets, one connection a client, and events decoded for what is asked of them alone, so that the
client takes little of the cores it shares with the server. Times are those of the client: TTFT from the request's
last byte to the first text, inter-token latency between the following events.
"""

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec


class _Choice(msgspec.Struct):
    text: str = ""
    finish_reason: str | None = None

    def is_token(self, *, first: bool) -> bool:
        """Some servers end with an event of its own, others say in the last token's event that they finish."""
        return first or bool(self.text) or not self.finish_reason


class _Usage(msgspec.Struct):
    completion_tokens: int = 0
    prompt_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_EVENTS = msgspec.json.Decoder(_Event)
_CHUNK_BYTES = 1 << 16


@dataclass(slots=True)
class Answer:
    """What one client saw of one request; times in seconds."""

    ttft_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    completion_tokens: int = 0
    prompt_tokens: int = 0

    @property
    def tpot_s(self) -> float:
        """Time a token after the first, whatever number of tokens an event carried."""
        return sum(self.gaps_s) / max(1, self.completion_tokens - 1)


@dataclass(slots=True)
class Report:
    """One load level."""

    concurrency: int
    seconds: float
    answers: list[Answer]

    @property
    def tokens_per_s(self) -> float:
        return sum(answer.completion_tokens for answer in self.answers) / self.seconds

    def ttft_ms(self, share: float) -> float:
        return 1000 * quantile([answer.ttft_s for answer in self.answers], share)

    def gap_ms(self, share: float) -> float:
        return 1000 * quantile([gap for answer in self.answers for gap in answer.gaps_s], share)

    def tpot_ms(self, share: float) -> float:
        return 1000 * quantile([answer.tpot_s for answer in self.answers], share)


def quantile(values: list[float], share: float) -> float:
    """The value below which ``share`` of the values lie (nearest rank); 0 for none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def distinct_prompts(count: int, prompt_tokens: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Random token ids, so that no prefix is shared."""
    rng = random.Random(seed)
    return [[rng.randrange(300, vocab_size) for _ in range(prompt_tokens)] for _ in range(count)]


async def measure(
    url: str, model: str, prompts: list[list[int]], concurrency: int, output_tokens: int | list[int]
) -> Report:
    """Sends every prompt once, ``concurrency`` at a time; ``output_tokens`` for all, or one number a prompt."""
    lengths = [output_tokens] * len(prompts) if isinstance(output_tokens, int) else output_tokens
    waiting = list(zip(reversed(prompts), reversed(lengths), strict=True))
    answers: list[Answer] = []

    async def client() -> None:
        while waiting:
            prompt, length = waiting.pop()
            body = {
                "model": model,
                "prompt": prompt,
                "max_tokens": length,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            answers.append(await stream_completion(url, body))

    began_s = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    return Report(concurrency, time.perf_counter() - began_s, answers)


async def stream_completion(url: str, body: dict[str, object]) -> Answer:
    """One request on a connection of its own. Raises RuntimeError on anything but a whole 200 answer."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=1 << 22)
    payload = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    )
    writer.write(head.encode() + payload)
    await writer.drain()
    sent_s = time.perf_counter()
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"{status.decode().strip()}: {(await reader.read()).decode()[-500:]}")
    answer = Answer()
    last_s, done, rest = 0.0, False, b""
    while not done and (chunk := await reader.read(_CHUNK_BYTES)):
        now_s = time.perf_counter()
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                done = True
                break
            event = _EVENTS.decode(line[6:])
            if event.error is not None:
                raise RuntimeError(f"the stream ended in an error: {event.error}")
            if event.choices and event.choices[0].is_token(first=not last_s):
                if last_s:
                    answer.gaps_s.append(now_s - last_s)
                else:
                    answer.ttft_s = now_s - sent_s
                last_s = now_s
            if event.usage is not None:
                answer.completion_tokens = event.usage.completion_tokens
                answer.prompt_tokens = event.usage.prompt_tokens
    writer.close()
    if not done:
        raise RuntimeError("the stream ended without [DONE]")
    return answer
