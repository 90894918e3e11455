"""Where a GPU rank's step goes: its time when steps follow each other, and each kernel's part of it.

    python benchmarks/gpu_step.py [--shapes llama-3-8b-shape] [--layers 8] [--rows 1,16,64,256] [--context 512]
                                  [--chunk 2048] [--quantization none] [--kv_cache_dtype auto] [--tiny]

A rank without a server, over random weights in a real model's shapes, given plans as the scheduler sends them: a token
a row behind a context, one step ahead, and then chunks of prompts. A step's time is the clock's; a kernel's is what the
driver tells of each launch, and "bound" what bytes (of weights and cache) and FLOPs take at the chip's peaks. "host" is
what the rank's own thread is busy with in a step, while the device computes. On the emulation there are only the
clock's.
"""

import argparse
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gpu_models import write_model
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from shoal.checkpoint import describe, locate_model
from shoal.config import Settings
from shoal.cuda_ext.cuda_binding import library
from shoal.cuda_ext.cuda_device import CudaDevice
from shoal.messages import Allocate, Sampling, Seat, StepPlan
from shoal.wire import pack_ids
from shoal.workers.loaded_model import load_model
from shoal.workers.runner import PlanRunner

_PEAKS = {"A100": (2.04e12, 312e12), "H100": (3.35e12, 989e12), "H200": (4.8e12, 989e12)}
"""Bytes and bfloat16 FLOPs a second, dense."""
_BLOCK_SIZE = 16
_WARM_UP = 6
_STEPS = 20


def bound_s(chip: str, nbytes: float, flops: float) -> float:
    """What the peaks of a chip of that name allow at best; 0 for one that is not known."""
    peaks = next((peaks for name, peaks in _PEAKS.items() if name in chip), None)
    return max(nbytes / peaks[0], flops / peaks[1]) if peaks else 0.0


@dataclass(frozen=True, slots=True)
class Work:
    """What a step must at least do."""

    nbytes: float
    flops: float


class Rank:
    """A loaded model and a runner, and plans for it."""

    def __init__(self, device: CudaDevice, folder: Path, arguments: argparse.Namespace) -> None:
        self.device = device
        most_rows = max(arguments.rows)
        length = max(arguments.context + _WARM_UP + 4 * _STEPS, arguments.chunk) + 1
        settings = Settings(
            model=str(folder), model_name="m", run_dir="/nowhere", device="cuda", instance_num=most_rows,
            session_len=length, max_prefill_token_num=max(arguments.chunk, most_rows),
            quantization=arguments.quantization, kv_cache_dtype=arguments.kv_cache_dtype,
        )  # fmt: skip
        began_s = time.monotonic()
        model = load_model(settings, 0, device, lambda done, total: None)
        self.blocks = -(-length // _BLOCK_SIZE)
        self.runner: PlanRunner = model.make_runner(Allocate(0, most_rows * self.blocks, ""), None)
        self.load_s = time.monotonic() - began_s
        self.description = describe(locate_model(str(folder)))
        self.weight_bytes = model.weight_bytes
        self._epoch = 0
        self._seated = 0

    def seat(self, rows: int, prompt: int, count: int) -> StepPlan:
        """Of the last ``count`` tokens of prompts, in place of all that were there."""
        ids = np.random.default_rng(self._epoch).integers(3, self.description.vocab_size - 1, (rows, prompt))
        self._epoch += rows
        seats = tuple(
            Seat(slot, self._epoch + slot, pack_ids(one.tolist()), b"", Sampling(seed=slot, temperature=0.0))
            for slot, one in enumerate(ids)
        )
        leave = pack_ids(list(range(self._seated)))
        self._seated = rows
        return self._plan(rows, prompt - count, count, leave, seats)

    def decode(self) -> StepPlan:
        return self._plan(self._seated, -1, 1)

    def _plan(
        self, rows: int, start: int, count: int, leave: bytes = b"", admit: tuple[Seat, ...] = ()
    ) -> StepPlan:
        new_blocks = self.blocks if admit else 0
        return StepPlan(
            crew_epoch=0,
            step_id=0,
            leave=leave,
            admit=admit,
            slots=pack_ids(list(range(rows))),
            starts=pack_ids([start] * rows),
            counts=pack_ids([count] * rows),
            samples=bytes([1]) * rows,
            block_counts=pack_ids([new_blocks] * rows),
            new_blocks=pack_ids(list(range(rows * new_blocks))),
        )

    def work(self, rows: int, tokens: int, context: int) -> Work:
        """Of a step of ``rows`` sequences with so many new tokens each, ``context`` long with them."""
        d = self.description
        kv = 2 * d.num_layers * d.num_kv_heads * d.head_dim * 2 * rows * context
        table = d.vocab_size * d.hidden_size
        width = d.hidden_size * (2 * d.num_heads + 2 * d.num_kv_heads) * d.head_dim // d.num_heads
        weights = d.num_layers * ((width * d.num_heads) + 3 * d.hidden_size * d.ffn_size)
        seen = tokens * (2 * context - tokens + 1) / 2
        products = 2.0 * rows * (tokens * weights + table)
        attention = 4.0 * rows * seen * d.num_heads * d.head_dim * d.num_layers
        read = self.weight_bytes - (0 if d.tied_head else 2 * table)  # of an embedding table only some rows are
        return Work(read + kv, products + attention)


def clocked(run: Callable[[], None], device: CudaDevice, steps: int) -> tuple[float, float]:
    """Seconds a step, and of them busy on this thread."""
    began_s, busy_s = time.perf_counter(), time.thread_time()
    for _ in range(steps):
        run()
    busy_s = time.thread_time() - busy_s
    device.wait()
    return (time.perf_counter() - began_s) / steps, busy_s / steps


def kernels(run: Callable[[], None], device: CudaDevice, steps: int) -> dict[str, tuple[float, float]]:
    """By name: microseconds and launches a step."""
    with profile(activities=[ProfilerActivity.CUDA]) as watch:
        for _ in range(steps):
            run()
        device.wait()
    taken: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for event in watch.events():
        if event.device_type == DeviceType.CUDA:
            taken[short(event.name)] += event.device_time
            launches[short(event.name)] += 1
    return {name: (us / steps, launches[name] / steps) for name, us in taken.most_common()}


def short(name: str) -> str:
    """A kernel's name without its namespace, types and parameters."""
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    return re.split(r"[<(]", name, maxsplit=1)[0].removesuffix("_kernel")


def report(what: str, rank: Rank, run: Callable[[], None], steps: int, work: Work) -> None:
    for _ in range(_WARM_UP):
        run()
    rank.device.wait()
    whole_s, busy_s = clocked(run, rank.device, steps)
    least_s = bound_s(rank.device.name, work.nbytes, work.flops)
    share = f"{least_s / whole_s:.0%}" if least_s else "-"
    print(
        f"\n{what}: {whole_s * 1e6:.0f} µs a step, host {busy_s * 1e6:.0f}, bound {least_s * 1e6:.0f} ({share})",
        flush=True,
    )
    if rank.device.library.is_emulated:
        return
    parts = kernels(run, rank.device, steps)
    print(f"  {'all kernels':<36}{sum(us for us, _ in parts.values()):>10.1f} µs", flush=True)
    for name, (us, launches) in parts.items():
        if us >= 0.3:
            print(f"  {name:<36}{us:>10.1f} µs in {launches:>6.1f}: {us / launches:>7.2f} each")
    print(end="", flush=True)


def main() -> None:
    arguments = parse()
    loaded = library()
    if loaded is None:
        raise SystemExit("the CUDA library is not built")
    device = CudaDevice(loaded)
    print(
        f"{device.name}; torch {torch.__version__}; context {arguments.context}, {arguments.quantization} weights"
    )
    for name in arguments.shapes.split(","):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            path = write_model(name, Path(folder), tiny=arguments.tiny, layers=arguments.layers)
            rank = Rank(device, path, arguments)
        layers, gigabytes = rank.description.num_layers, rank.weight_bytes / 1e9
        print(f"\n{name}, {layers} layers: {gigabytes:.2f} GB, {rank.load_s:.1f} s to load")
        for rows in arguments.rows:
            rank.runner.execute(rank.seat(rows, arguments.context, 1))
            work = rank.work(rows, 1, arguments.context + _WARM_UP + _STEPS // 2)
            report(f"{rows} rows", rank, lambda: rank.runner.start(rank.decode()), _STEPS, work)  # noqa: B023
            rank.runner.finish()
        chunk = arguments.chunk
        run = lambda: rank.runner.start(rank.seat(1, chunk, chunk))  # noqa: B023, E731
        report(f"a prompt of {chunk}", rank, run, max(2, _STEPS // 4), rank.work(1, chunk, chunk))
        rank.runner.finish()
        rank.runner.close()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="llama-3-8b-shape")
    parser.add_argument("--layers", type=int, default=0, help="fewer than the model has; 0: all")
    parser.add_argument(
        "--rows", type=lambda text: [int(word) for word in text.split(",")], default=[1, 16, 64, 256]
    )
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--kv_cache_dtype", default="auto")
    parser.add_argument("--tiny", action="store_true", help="tiny layers, for the emulation")
    parser.add_argument("--folder", default=None, help="where the model is written for a moment")
    return parser.parse_args()


if __name__ == "__main__":
    main()
