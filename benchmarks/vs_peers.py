"""Ours against llama.cpp's server and vLLM for CPUs: one model, the same requests, one server at a time over HTTP.

    python benchmarks/vs_peers.py [--model smollm2|gemma3-270m|tinyllama|all] [--vllm] [--prompts text] [--rounds 3]

The load is closed-loop: streamed greedy completions of prompts that share no prefix, at each number of streams, and
prompts alone, with one token out. After random ids small models repeat themselves, so guessing gains most; passages
of a novel show what it gains from prose. What the peers need is built or installed under --cache the first time.
Tables go to stdout, progress to stderr. Ratios of one run mean something, a shared machine's absolute rates do not.
"""

import argparse
import asyncio
import os
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import ceilings
import load
from forcing import text
from peers import llama_cpp, models, vllm_cpu
from peers.limits import limits_table
from peers.progress import say
from peers.results import OURS, PREFILL, READY, Measure, Results, throughput, tpot, ttft
from peers.serving import Running, Server, running
from serve import ROOT, processor

from shoal.tokenizer import load_tokenizer

# Prompts hold ids from 300 up to this: within every model's vocabulary, and none is a control token.
_VOCABULARY = 49000


def main() -> None:
    """Prints the machine's limits, and a table for each model."""
    arguments = parse()
    # So that the server of the moment is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    arguments.cache.mkdir(parents=True, exist_ok=True)
    print(f"{processor()}; {arguments.threads} threads\n")
    limits = None
    if not arguments.no_ceilings:
        limits = ceilings.measure(sorted({1, arguments.threads}))
        print(f"{limits.table()}\n", flush=True)
    for name in list(models.TITLES) if arguments.model == "all" else [arguments.model]:
        compare(name, arguments, limits)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", choices=[*models.TITLES, "all"])
    parser.add_argument("--servers", default="ours,llama", help="which of ours, llama, vllm, in their order")
    parser.add_argument("--vllm", action="store_true", help="vllm too, installed where it is missing")
    parser.add_argument(
        "--rounds", type=int, default=1, help="each server once a round, every other round in reverse"
    )
    parser.add_argument("--streams", default="1,4,16,32")
    parser.add_argument("--requests", type=int, default=2, help="requests a stream; four at the least")
    parser.add_argument(
        "--prompts", default="random", choices=["random", "text"], help="random ids, or passages of a novel"
    )
    parser.add_argument("--prompt", type=int, default=105, help="prompt tokens")
    parser.add_argument("--output", default="64-96", help="new tokens, drawn from this range")
    parser.add_argument("--prefill", type=int, default=418, help="tokens of the prompts with one token out")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "peers", help="peers, models and logs")
    parser.add_argument("--llama", type=Path, help="folder of llama.cpp's programs, instead of building them")
    parser.add_argument("--server_args", default="", help="more flags of our server")
    parser.add_argument("--no_ceilings", action="store_true", help="leave the machine's limits out")
    return parser.parse_args()


def compare(name: str, arguments: argparse.Namespace, limits: ceilings.Ceilings | None) -> None:
    """All rounds on one model, and their table."""
    cache = arguments.cache
    gguf = models.gguf_file(name, cache, lambda: arguments.llama or llama_cpp.programs(cache))
    text_ids = (
        load_tokenizer(str(gguf)).encode(text.public_text(cache), add_special=False)
        if arguments.prompts == "text"
        else []
    )
    results = Results()
    with chosen_servers(gguf, arguments) as servers:
        for number in range(arguments.rounds):
            for server in reversed(servers) if number % 2 else servers:
                say(f"{name}, round {number + 1} of {arguments.rounds}: {server.name}")
                log = cache / f"{server.name.split(',')[0]}.log"
                with running(server, log) as it:
                    results.add(server.name, measured(it, arguments, text_ids, seed=number))
    print(
        f"{models.TITLES[name]}: {arguments.prompts} prompts of {arguments.prompt} tokens, {arguments.output} out; "
        f"prefill of {arguments.prefill}; median of {arguments.rounds} round(s)\n\n{results.table()}\n"
    )
    if limits:
        print(f"{limits_table(gguf, results, limits)}\n", flush=True)


@contextmanager
def chosen_servers(gguf: Path, arguments: argparse.Namespace) -> Iterator[list[Server]]:
    """How to start each, with what it needs built."""
    names = arguments.servers.split(",") + (["vllm"] if arguments.vllm else [])
    slots, threads, cache = max(stream_counts(arguments)), arguments.threads, arguments.cache
    with TemporaryDirectory() as data:
        servers: list[Server] = []
        for name in dict.fromkeys(names):
            if name == "ours":
                flags = ["--threads", str(threads), "--data_dir", data, *arguments.server_args.split()]
                servers.append(ours(gguf, flags))
            elif name == "llama":
                folder = arguments.llama or llama_cpp.programs(cache)
                servers.append(llama_cpp.server(folder, gguf, threads, slots))
            elif name == "vllm":
                folder = vllm_cpu.environment(cache)
                servers.append(vllm_cpu.server(folder, vllm_cpu.hf_folder(folder, gguf, cache), threads, slots))
            else:
                raise SystemExit(f"--servers: {name} is none of ours, llama, vllm")
        yield servers


def ours(gguf: Path, flags: list[str]) -> Server:
    program = str(ROOT / "bin" / "api_server")
    return Server(OURS, lambda port: [program, str(gguf), "--server_port", str(port), *flags], "/ready")


def stream_counts(arguments: argparse.Namespace) -> list[int]:
    return [int(word) for word in arguments.streams.split(",")]


def measured(
    server: Running, arguments: argparse.Namespace, text_ids: list[int], seed: int
) -> dict[Measure, float]:
    """One round of one server. The same ``seed`` gives the same requests. text_ids: what prompts are cut out of; random
    ids where there are none."""
    values: dict[Measure, float] = {}
    rng = random.Random(seed)
    shortest, longest = (int(word) for word in (arguments.output.split("-") * 2)[:2])

    def ran(count: int, prompt_tokens: int, streams: int, lengths: list[int]) -> load.Report:
        if text_ids:
            starts = rng.sample(range(len(text_ids) - prompt_tokens), count)
            prompts = [text_ids[start : start + prompt_tokens] for start in starts]
        else:
            prompts = load.distinct_prompts(count, prompt_tokens, _VOCABULARY, rng.randrange(1 << 30))
        return asyncio.run(load.measure(server.url, server.model, prompts, streams, lengths))

    ran(2, arguments.prompt, 2, [8, 8])
    for streams in stream_counts(arguments):
        count = max(4, streams * arguments.requests)
        report = ran(count, arguments.prompt, streams, [rng.randint(shortest, longest) for _ in range(count)])
        values[throughput(streams)] = report.tokens_per_s
        values[tpot(streams)] = report.tpot_ms(0.5)
        values[ttft(streams, "p50")] = report.ttft_ms(0.5)
        values[ttft(streams, "p99")] = report.ttft_ms(0.99)
        say(f"  {throughput(streams).name}: {report.tokens_per_s:.1f}, TTFT p50 {report.ttft_ms(0.5):.0f} ms")
    report = ran(5, arguments.prefill, 1, [1] * 5)
    values[PREFILL] = 1000 * arguments.prefill / report.ttft_ms(0.5)
    say(f"  prefill: {values[PREFILL]:.0f} tok/s")
    values[READY] = server.ready_s
    return values


if __name__ == "__main__":
    main()
