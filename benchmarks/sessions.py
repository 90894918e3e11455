"""Turn 10 of a conversation, three ways: interactive, chat with the whole history, and that with the prefix cache off.

    python benchmarks/sessions.py [--conversations 5] [--question 60] [--answer 64]

Starts ``bin/api_server`` with the default model on a free port, twice: with and without the cache. Every conversation
has words of its own, so that none finds another's blocks. Greedy; every answer has its full length.
"""

import argparse
import contextlib
import http.client
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from serve import own_server, processor

TURNS = 10
WORDS = (
    "river",
    "stone",
    "lamp",
    "engine",
    "paper",
    "glass",
    "winter",
    "letter",
    "market",
    "bridge",
    "forest",
    "clock",
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One turn as its client saw it."""

    ttft_ms: float
    total_ms: float
    prompt_tokens: int
    cached_tokens: int


Turn = Callable[[http.client.HTTPConnection, int, list[dict[str, str]]], tuple[str, Measured]]


def main() -> None:
    """Prints one Markdown table."""
    arguments = parse()
    print(
        f"{processor()}; turn {TURNS}, questions of {arguments.question} words, answers of {arguments.answer} tokens, "
        f"median of {arguments.conversations} conversations\n"
    )
    print("| how | prompt tokens | of them cached | TTFT ms | whole turn ms |")
    print("| --- | --- | --- | --- | --- |")
    turns: dict[str, Turn] = {
        "interactive": lambda *call: interactive(*call, arguments.answer),
        "chat, whole history": lambda *call: chat(*call, arguments.answer),
    }
    for flags, names in (([], list(turns)), (["--no-enable_prefix_caching"], ["chat, whole history"])):
        with (
            TemporaryDirectory() as folder,
            own_server(arguments.model, [*flags, "--data_dir", folder]) as (url, _),
        ):
            for name in names:
                rows = [
                    converse(url, turns[name], number, arguments)
                    for number in range(arguments.conversations + 1)
                ]
                print_row(name + (", no prefix cache" if flags else ""), rows[1:])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=5, help="measured ones; one more warms up")
    parser.add_argument("--question", type=int, default=60, help="words of each question")
    parser.add_argument("--answer", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--model", default="", help="instead of the default model")
    return parser.parse_args()


def converse(url: str, turn: Turn, number: int, arguments: argparse.Namespace) -> Measured:
    """Ten turns, of which the last is returned."""
    rng = random.Random(f"{time.time_ns()}-{number}")
    history: list[dict[str, str]] = []
    with contextlib.closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=600)) as connection:
        for _ in range(TURNS):
            question = " ".join(rng.choices(WORDS, k=arguments.question))
            history.append({"role": "user", "content": f"Write about {question}."})
            text, measured = turn(connection, number + 1, history)
            history.append({"role": "assistant", "content": text})
        connection.request("DELETE", "/v1/sessions")
        connection.getresponse().read()
    return measured


def interactive(
    connection: http.client.HTTPConnection, session: int, history: list[dict[str, str]], answer_tokens: int
) -> tuple[str, Measured]:
    """The server has the history; only the new question travels."""
    body = {
        "prompt": history[-1]["content"],
        "session_id": session,
        "interactive_mode": True,
        "request_output_len": answer_tokens,
    }
    text, last, ttft_ms, total_ms = stream(connection, "/v1/chat/interactive", body, lambda line: line["text"])
    prompt = last["history_tokens"] + last["input_tokens"]
    return text, Measured(ttft_ms, total_ms, prompt, last["cached_tokens"])


def chat(
    connection: http.client.HTTPConnection, _session: int, history: list[dict[str, str]], answer_tokens: int
) -> tuple[str, Measured]:
    """All that was said travels, and is rendered and tokenised again."""
    body = {"messages": history, "max_tokens": answer_tokens, "stream_options": {"include_usage": True}}

    def text_of(event: Any) -> str:
        return str(event["choices"][0]["delta"].get("content") or "") if event["choices"] else ""

    text, last, ttft_ms, total_ms = stream(connection, "/v1/chat/completions", body, text_of)
    usage = last["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return text, Measured(ttft_ms, total_ms, usage["prompt_tokens"], cached)


def stream(
    connection: http.client.HTTPConnection, path: str, body: dict[str, Any], text_of: Callable[[Any], str]
) -> tuple[str, Any, float, float]:
    """The text, the last event, and the times to the first text and to the end, in ms."""
    raw = json.dumps({**body, "stream": True, "temperature": 0, "ignore_eos": True})
    began_s, ttft_ms = time.perf_counter(), 0.0
    connection.request("POST", path, raw, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise SystemExit(f"{path}: {answer.status} {answer.read().decode()}")
    pieces: list[str] = []
    last: Any = None
    for line in answer:
        payload = line.decode().removeprefix("data: ").strip()
        if not payload.startswith("{"):
            continue
        last = json.loads(payload)
        pieces.append(text_of(last))
        if pieces[-1] and not ttft_ms:
            ttft_ms = 1000 * (time.perf_counter() - began_s)
    return "".join(pieces), last, ttft_ms, 1000 * (time.perf_counter() - began_s)


def print_row(name: str, rows: list[Measured]) -> None:
    def median(value: Callable[[Measured], float]) -> float:
        return statistics.median(map(value, rows))

    print(
        f"| {name} | {median(lambda row: row.prompt_tokens):.0f} | {median(lambda row: row.cached_tokens):.0f} "
        f"| {median(lambda row: row.ttft_ms):.0f} | {median(lambda row: row.total_ms):.0f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
