"""Where a rank's step goes: its share inside the kernels, and each operator's part of it.

    python benchmarks/step.py [MODEL] [--rows 1,4,16,32] [--guesses 0] [--context 128] [--prompt 0] [--threads 2]

One rank without a server, given plans as the scheduler sends them: one token a row, and with --guesses as many wrong
ones behind it, whose price that shows; medians over the steps. "Kernels"
is the time inside the library's calls, the rest Python's. An operator's part comes from calling the recorded operators
one by one, so the parts add up to a little more than the kernels' time; products then do not ask the memory for what
attention reads next, which it waits for. With --prompt a step computes that many tokens
of a prompt a row instead, always the same ones.
"""

import argparse
import ctypes
import os
import statistics
import time
from collections import Counter

import numpy as np
import torch
from serve import processor

from shoal.checkpoint import describe, locate_model
from shoal.cuda_ext import ops
from shoal.cuda_ext.binding import OPERATORS, CpuLibrary, library
from shoal.messages import Sampling, Seat, StepPlan
from shoal.wire import pack_ids
from shoal.workers.decoder import Decoder
from shoal.workers.drafts import Drafter, Guess, Int32s
from shoal.workers.kv_cache import KVCache
from shoal.workers.load import load_parameters
from shoal.workers.parallel import SoloGroup, split
from shoal.workers.runner import Runner
from shoal.workers.slots import SlotTable
from shoal.workers.weights.places import HostPlace
from shoal.workers.weights.source import open_source

_BLOCK_SIZE = 16
_WARM_UP = 10
_STEPS = 50
_OPERATORS = ("linear_quantised", "linear", "gated_linear", "paged_attention")
"""With a column of their own."""


class _Watch:
    """Stands in for the library's ``run``, and sums up the time inside; ``parts`` also runs each call by itself."""

    def __init__(self, compiled: CpuLibrary) -> None:
        self._run = compiled.run
        self._names = {compiled.address_of(name): name for name in OPERATORS}
        self.seconds = 0.0
        self.parts: Counter[str] = Counter()
        self.apart = False

    def __call__(self, calls: ctypes.c_void_p, count: int) -> None:
        began = time.perf_counter()
        if self.apart:
            self._run_apart(calls, count)
        else:
            self._run(calls, count)
        self.seconds += time.perf_counter() - began

    def _run_apart(self, calls: ctypes.c_void_p, count: int) -> None:
        assert calls.value is not None
        words = (ctypes.c_uint64 * (2 * count)).from_address(calls.value)
        for index in range(count):
            began = time.perf_counter()
            self._run(ctypes.c_void_p(calls.value + 16 * index), 1)
            self.parts[self._names[words[2 * index]]] += time.perf_counter() - began


def main() -> None:
    """Prints one Markdown table."""
    arguments = parse()
    compiled = library()
    if compiled is None:
        raise SystemExit("the CPU library is not built")
    cpus = sorted(os.sched_getaffinity(0))[: arguments.threads]
    os.sched_setaffinity(0, cpus[:1])
    ops.set_threads(arguments.threads, cpus)
    watch = _Watch(compiled)
    compiled.run = watch  # type: ignore[method-assign]
    print(f"{processor()}; {compiled.level}, {arguments.threads} threads; context {arguments.context}\n")
    print(f"| rows | step ms | kernels ms | share | {' | '.join(_OPERATORS)} | other operators |")
    print("| --- " * (5 + len(_OPERATORS)) + "|")
    for rows in [int(word) for word in arguments.rows.split(",")]:
        steps = _Steps(arguments.model, rows, arguments.context, arguments.guesses, arguments.prompt)
        print_row(rows, steps, watch)


def print_row(rows: int, steps: "_Steps", watch: _Watch) -> None:
    for _ in range(_WARM_UP):
        steps.run()
    wholes, kernels = [], []
    for _ in range(_STEPS):
        watch.seconds, began = 0.0, time.perf_counter()
        steps.run()
        wholes.append(time.perf_counter() - began)
        kernels.append(watch.seconds)
    watch.apart, watch.parts = True, Counter()
    for _ in range(_STEPS):
        steps.run()
    watch.apart = False
    whole, kernel = statistics.median(wholes), statistics.median(kernels)
    parts = {name: seconds / _STEPS for name, seconds in watch.parts.items()}
    columns = [parts.pop(name, 0.0) for name in _OPERATORS]
    cells = [whole, kernel, *columns, sum(parts.values())]
    text = [f"{1000 * cell:.2f}" for cell in cells]
    print(f"| {rows} | {text[0]} | {text[1]} | {kernel / whole:.0%} | {' | '.join(text[2:])} |", flush=True)


class _Wrong(Drafter):
    """Guesses as many as it may, all of them ids that were never drawn."""

    def guess(self, tokens: Int32s, most: int, worth: float) -> Guess:
        return Guess(np.full(most, tokens[-1] ^ 1, np.int32), 1)


class _Steps:
    """A rank's runner with ``rows`` sequences that are ``context`` long; ``run`` decodes one token of each, and
    computes ``guesses`` more; or ``prompt`` tokens of each, if any."""

    def __init__(self, model: str | None, rows: int, context: int, guesses: int, prompt: int) -> None:
        context = prompt or context
        location = locate_model(model)
        description = describe(location)
        shard, group = split(description, 1, 0), SoloGroup()
        parameters = load_parameters(
            open_source(location), description, shard, HostPlace(torch.bfloat16), lambda done, total: None
        )
        length = context + _WARM_UP + 2 * _STEPS + 1 + guesses
        blocks = -(-length // _BLOCK_SIZE)
        cache = KVCache(description, shard, torch.bfloat16, rows * blocks, _BLOCK_SIZE)
        decoder = Decoder(description, shard, parameters, cache, group, length)
        slots = SlotTable(
            rows,
            length,
            rows * blocks,
            _BLOCK_SIZE,
            description.vocab_size,
            sampling=True,
            drafter=_Wrong(0.0),
        )
        self._guesses, self._prompt = guesses, prompt
        self._runner = Runner(decoder, group, slots, 0)
        self._rows, self._start = rows, 0
        ids = np.random.default_rng(1).integers(0, description.vocab_size - 1, (rows, context))
        seats = tuple(
            Seat(slot, 0, pack_ids(prompt.tolist()), b"", Sampling(seed=slot))
            for slot, prompt in enumerate(ids)
        )
        self._runner.execute(self._plan(context, 0, blocks, seats))
        self._start = 0 if prompt else -1

    def run(self) -> None:
        if self._prompt:
            self._runner.execute(self._plan(self._prompt, 0, samples=False))
        else:
            self._runner.execute(self._plan(1, self._guesses))

    def _plan(
        self, count: int, drafts: int, new_blocks: int = 0, admit: tuple[Seat, ...] = (), samples: bool = True
    ) -> StepPlan:
        rows = self._rows
        return StepPlan(
            crew_epoch=0,
            step_id=0,
            leave=b"",
            admit=admit,
            slots=pack_ids(list(range(rows))),
            starts=pack_ids([self._start] * rows),
            counts=pack_ids([count] * rows),
            samples=bytes([samples]) * rows,
            block_counts=pack_ids([new_blocks] * rows),
            new_blocks=pack_ids(list(range(rows * new_blocks))),
            drafts=pack_ids([drafts] * rows),
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=None)
    parser.add_argument("--rows", default="1,4,16,32")
    parser.add_argument("--guesses", type=int, default=0, help="wrong guesses behind each row's token")
    parser.add_argument(
        "--context", type=int, default=128, help="tokens of each sequence before the first step"
    )
    parser.add_argument("--prompt", type=int, default=0, help="prompt tokens a row to compute in each step")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
