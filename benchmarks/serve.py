"""Load on a running server at several concurrencies: tokens/s, TTFT, inter-token latency, memory.

    python benchmarks/serve.py [URL] [--concurrency 1,4,16,32] [--prompt 128] [--output 128]

Without a URL it starts ``bin/api_server`` with the default model on a free port and ends it afterwards.
"""

import argparse
import asyncio
import contextlib
import json
import platform
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import load

ROOT = Path(__file__).resolve().parent.parent
_REQUESTS_A_CLIENT = 2
_START_TIMEOUT_S = 180
_VECTOR_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def main() -> None:
    """Prints one Markdown table."""
    arguments = parse()
    with contextlib.ExitStack() as stack:
        url, server_pid = arguments.url, None
        if not url:
            url, server_pid = stack.enter_context(own_server(arguments.model, arguments.server_args.split()))
        model = fetch(f"{url}/v1/models")["data"][0]["id"]
        print(f"{processor()}; model {model}; prompt {arguments.prompt}, output {arguments.output}, greedy\n")
        print(
            "| streams | tok/s | TTFT p50 ms | p99 | gap p50 ms | p99 | mean rows a step | server MiB (PSS) |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        asyncio.run(load.measure(url, model, load.distinct_prompts(1, 16, arguments.vocab, 7), 1, 8))
        for level in [int(word) for word in arguments.concurrency.split(",")]:
            run_level(url, model, level, arguments, server_pid)


def run_level(url: str, model: str, level: int, arguments: argparse.Namespace, server_pid: int | None) -> None:
    """One row of the table."""
    count = max(4, level * _REQUESTS_A_CLIENT)
    prompts = load.distinct_prompts(count, arguments.prompt, arguments.vocab, seed=time.time_ns())
    before = steps(url)
    report = asyncio.run(load.measure(url, model, prompts, level, arguments.output))
    after = steps(url)
    rows = (after[1] - before[1]) / max(1.0, after[0] - before[0])
    memory = f"{tree_pss_mib(server_pid):.0f}" if server_pid else "–"
    print(
        f"| {level} | {report.tokens_per_s:.1f} | {report.ttft_ms(0.5):.0f} | {report.ttft_ms(0.99):.0f} "
        f"| {report.gap_ms(0.5):.1f} | {report.gap_ms(0.99):.1f} | {rows:.1f} | {memory} |",
        flush=True,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?", default="")
    parser.add_argument("--concurrency", default="1,4,16,32")
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens")
    parser.add_argument("--output", type=int, default=128, help="new tokens")
    parser.add_argument("--vocab", type=int, default=49000, help="prompt ids are drawn below this")
    parser.add_argument("--model", default="", help="model of the server that is started here")
    parser.add_argument("--server_args", default="", help="more flags of that server")
    return parser.parse_args()


@contextlib.contextmanager
def own_server(model: str, flags: list[str]) -> Iterator[tuple[str, int]]:
    """A server of ours on a free loopback port: its URL and the supervisor's pid."""
    port = free_port()
    command = [str(ROOT / "bin/api_server"), *([model] if model else []), "--server_port", str(port), *flags]
    server = subprocess.Popen(command, stdout=sys.stderr)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_ready(url, server)
        yield url, server.pid
    finally:
        server.terminate()
        server.wait(60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_ready(
    url: str, server: "subprocess.Popen[bytes]", path: str = "/ready", timeout_s: float = _START_TIMEOUT_S
) -> None:
    """Until ``path`` answers 200. Raises RuntimeError when the server ends or takes too long."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {server.returncode}")
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{url}{path}"):
            return
        time.sleep(0.2)
    raise RuntimeError(f"the server was not ready within {timeout_s:.0f} s")


def fetch(url: str) -> dict:
    """GET, JSON."""
    with urllib.request.urlopen(url) as answer:
        return json.load(answer)


def steps(url: str) -> tuple[float, float]:
    """(steps so far, rows computed in them) from /metrics; zeros where a peer has no such counters."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return float(values.get("shoal:steps_total", 0)), float(values.get("shoal:step_rows_total", 0))


def tree_pss_mib(pid: int) -> float:
    """Proportional set size of a process and all its descendants, MiB."""
    total, pending = 0.0, [pid]
    while pending:
        current = pending.pop()
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{current}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) / 1024
            for task in Path(f"/proc/{current}/task").iterdir():
                pending.extend(int(child) for child in (task / "children").read_text().split())
    return total


def processor() -> str:
    """Model name and the vector extensions that matter."""
    text = Path("/proc/cpuinfo").read_text()
    name = next((line.split(":")[1].strip() for line in text.splitlines() if "model name" in line), "?")
    flags = [flag for flag in _VECTOR_FLAGS if f" {flag}" in text]
    return f"{name} ({' '.join(flags)}), {platform.machine()}"


if __name__ == "__main__":
    main()
