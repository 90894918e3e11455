"""Everything there is to check on a GPU, in one go; without one, as far as that goes.

    python benchmarks/gpu_check.py [--skip-build] [--skip-tests]

Builds the CUDA library for the chip that is here (without nvcc: takes the one that is there), runs every kernel test on
it and every operator once under compute-sanitizer, prints a table of bandwidth and FLOPs beside the roofline's, and a
server's tokens a second on random weights. Without a chip the library is built for all chips where nvcc is, all the
rest runs on the emulated kernels, whose times say nothing, and each step that was left out says so. Exit code 1 where a
step failed.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_models import SHAPES, write_model
from gpu_step import bound_s
from serve import processor
from torch.nn import functional

from shoal.cuda_ext.cuda_binding import LIBRARY, CudaLibrary
from shoal.cuda_ext.cuda_ops import workspace_floats
from shoal.cuda_ext.cuda_program import CudaProgram
from shoal.errors import StartError

ROOT = Path(__file__).resolve().parents[1]
_LIMIT_S = 540
_LEAST_SERVING_S = 90
"""To write a model, load it and measure; a model is left out where fewer are left."""
_TESTS = (
    "tests/process/test_cuda_serving.py",
    "tests/unit/workers/test_cuda_*.py",
    "tests/unit/workers/test_fp8_checkpoints.py",
    "tests/unit/cuda_ext/cuda/test_*.py",
)
"""Those that take longest first."""
_MOST_JOBS = 8


@dataclass(frozen=True, slots=True)
class Place:
    """Where kernels run: a chip, or the emulation of one."""

    library: CudaLibrary
    device: torch.device
    name: str

    @property
    def is_chip(self) -> bool:
        return self.device.type == "cuda"


def say(*parts: object) -> None:
    print(*parts, flush=True)


def run(*command: str, **environment: str) -> bool:
    say("$", " ".join(command))
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}).returncode == 0


def test(library: Path) -> bool:
    """A process a file, so that an error after which a chip does nothing more for a process ends no other's tests."""
    jobs = max(1, min(_MOST_JOBS, (os.cpu_count() or 1) // 2))
    files = [path for pattern in _TESTS for path in sorted(ROOT.glob(pattern))]
    environment = {**os.environ, "SHOAL_CUDA_LIBRARY": str(library), "OMP_NUM_THREADS": "2"}

    def passes(path: Path) -> bool:
        command = (sys.executable, "-m", "pytest", "-q", str(path))
        ended = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
        lines = ended.stdout.strip().splitlines() or [ended.stderr.strip()]
        said = lines[-1] if ended.returncode == 0 else "\n" + ended.stdout + ended.stderr
        say(f"{path.relative_to(ROOT)}: {said}")
        return ended.returncode == 0

    say(f"$ pytest, {jobs} at a time")
    with ThreadPoolExecutor(jobs) as pool:
        return all(list(pool.map(passes, files)))


def build(chips: list[str]) -> bool:
    if shutil.which("nvcc") is None:
        say(f"no nvcc: {'the library that is there is taken' if LIBRARY.exists() else 'no CUDA library'}")
        return True
    wanted = {"SHOAL_CUDA_ARCHS": " ".join(sorted(set(chips)))} if chips else {}
    return run(
        sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--library=cuda", "--force", **wanted
    )


def compute_capabilities() -> list[str]:
    """Of the chips here, as setup.py takes them: "90a" for an H100."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    said = subprocess.run(command, capture_output=True, text=True)
    numbers = [line.strip().replace(".", "") for line in said.stdout.splitlines() if line.strip()]
    return [number + ("a" if int(number) >= 90 else "") for number in numbers] if said.returncode == 0 else []


def find_place() -> Place:
    """The first chip where torch can use it, else the emulated kernels, which are built if need be."""
    if LIBRARY.exists() and torch.cuda.is_available():
        library = CudaLibrary(LIBRARY)
        if library.chips():
            return Place(library, torch.device("cuda"), torch.cuda.get_device_name())
        say(f"the library finds no chip: {library.error}")
    elif LIBRARY.exists():
        try:
            seen = CudaLibrary(LIBRARY).chips() or "none"
        except StartError as error:
            seen = str(error)
        say(f"torch {torch.__version__} finds no GPU; the library says: {seen}")
    sys.path.insert(0, str(ROOT / "tests"))
    import emulated

    return Place(CudaLibrary(emulated.build()), torch.device("cpu"), "emulation")


@dataclass(frozen=True, slots=True)
class Measured:
    """One call's cost: what it must move and multiply. peer: the same, or for narrow weights what they stand for, by
    torch's own kernels."""

    what: str
    nbytes: float
    flops: float
    call: Callable[[], None]
    peer: Callable[[], object] | None = None


class Shapes:
    """Those of a Llama of 8B, or tiny ones."""

    def __init__(self, place: Place) -> None:
        small = not place.is_chip
        self.hidden, self.ffn = (128, 192) if small else (4096, 14336)
        self.heads, self.kv_heads, self.dim = (4, 2, 64) if small else (32, 8, 128)
        self.vocabulary = 300 if small else 128256
        self.rows, self.chunk, self.context = (3, 70, 90) if small else (16, 2048, 4096)
        self.some_rows = (1, self.rows, self.chunk) if small else (1, self.rows, 64, 256, self.chunk)
        self._place = place

    def zeros(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self._place.device)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self._place.device).bfloat16()

    def caller(self, operator: str, **fields: object) -> Callable[[], None]:
        program = CudaProgram(self._place.library, self._place.device)
        program.add(operator, **fields)  # type: ignore[arg-type]
        return program.run

    def add_rms_norm(self, rows: int) -> Measured:
        size, x = rows * self.hidden, self.random(rows, self.hidden)
        call = self.caller(
            "add_rms_norm", out=self.zeros(rows, self.hidden), residual=x.float(), x=x, weight=x[0].float(),
            rows=rows, dim=self.hidden, residual_stride=self.hidden, x_stride=self.hidden, dtype=1, eps=1e-5,
        )  # fmt: skip
        residual, weight = x.float(), x[0].float()
        return Measured(
            f"add_rms_norm, {rows} rows",
            12 * size,
            0,
            call,
            lambda: functional.rms_norm(residual.add_(x), (self.hidden,), weight),
        )

    def gated_activation(self, rows: int) -> Measured:
        sizes = {"rows": rows, "dim": self.ffn, "row_stride": 2 * self.ffn, "dtype": 1}
        gate_up = self.random(rows, 2 * self.ffn)
        call = self.caller("gated_activation", out=self.zeros(rows, self.ffn), gate_up=gate_up, **sizes)
        gate, up = gate_up.chunk(2, dim=1)
        return Measured(
            f"gated_activation, {rows} rows",
            6 * rows * self.ffn,
            0,
            call,
            lambda: functional.silu(gate) * up,
        )

    def linear(self, rows: int, *, narrow: bool = False) -> Measured:
        outputs, inputs = 2 * self.ffn, self.hidden
        plain, x = self.random(outputs, inputs), self.random(rows, inputs)
        weight = plain.to(torch.float8_e4m3fn) if narrow else plain
        sizes = {
            "rows": rows,
            "inputs": inputs,
            "outputs": outputs,
            "row_stride": inputs,
            "weight_stride": inputs,
        }
        kinds = {"out_stride": outputs, "dtype": 1, "weight_dtype": 4 if narrow else 1, "out_dtype": 1}
        call = self.caller("linear", out=self.zeros(rows, outputs), x=x, weight=weight, **sizes, **kinds)
        what = f"linear {'fp8' if narrow else 'bfloat16'}, {rows} rows"
        return Measured(
            what, weight.nbytes, 2.0 * rows * weight.numel(), call, lambda: functional.linear(x, plain)
        )

    def linear_quantised(self, rows: int, bits: int) -> Measured:
        outputs, inputs = 2 * self.ffn, self.hidden
        tile_bytes = 16 * 64 * bits // 8 + 64 * (2 if bits == 4 else 1)
        panels = self.zeros(outputs // 16, inputs // 64, tile_bytes, dtype=torch.uint8)
        sizes = {
            "rows": rows,
            "inputs": inputs,
            "outputs": outputs,
            "row_stride": inputs,
            "out_stride": outputs,
        }
        form = {"bits": bits, "group": 32, "has_offset": bits == 4, "dtype": 1, "out_dtype": 1}
        x, out = self.random(rows, inputs), self.zeros(rows, outputs)
        call = self.caller("linear_quantised", out=out, x=x, panels=panels, **sizes, **form)
        plain = self.random(outputs, inputs)
        return Measured(
            f"linear W{bits}, {rows} rows",
            panels.nbytes,
            2.0 * rows * outputs * inputs,
            call,
            lambda: functional.linear(x, plain),
        )

    def paged_attention(self, sequences: int, tokens: int, context: int, what: str) -> Measured:
        """Sequences of ``tokens`` new ones each."""
        block = 16
        width = -(-context // block)
        caches = [self.random(sequences * width, self.kv_heads, block, self.dim) for _ in range(2)]
        count, device = sequences * tokens, self._place.device
        q = self.random(count, self.heads, self.dim)
        floats = workspace_floats(sequences, self.heads, self.dim, context)
        workspace = self.zeros(floats, dtype=torch.float32)
        call = self.caller(
            "paged_attention", out=torch.zeros_like(q), q=q, k_cache=caches[0], v_cache=caches[1],
            block_tables=torch.arange(sequences * width, dtype=torch.int32, device=device).view(sequences, width),
            query_starts=torch.arange(0, count + 1, tokens, dtype=torch.int32, device=device),
            context_lens=torch.full((sequences,), context, dtype=torch.int32, device=device), workspace=workspace,
            fault=self.zeros(1, dtype=torch.int32), tokens=count, sequences=sequences, heads=self.heads,
            kv_heads=self.kv_heads, dim=self.dim, blocks=sequences * width, block_size=block, table_width=width,
            table_stride=width, q_token_stride=self.heads * self.dim, q_head_stride=self.dim, most_tokens=tokens,
            most_context=context, workspace_floats=workspace.numel(), dtype=1, cache_dtype=1, scale=0.1,
        )  # fmt: skip
        seen = tokens * (2 * context - tokens + 1) / 2
        flops = 4 * sequences * seen * self.heads * self.dim
        dense = [
            self.random(sequences, heads, length, self.dim)
            for heads, length in ((self.heads, tokens), (self.kv_heads, context), (self.kv_heads, context))
        ]
        return Measured(
            what,
            sum(cache.nbytes for cache in caches) + 2 * q.nbytes,
            flops,
            call,
            lambda: functional.scaled_dot_product_attention(
                *dense, is_causal=tokens == context, enable_gqa=True
            ),
        )

    def draw(self, rows: int) -> Measured:
        columns = {
            "temperature": torch.ones(rows), "top_k": torch.full((rows,), 40), "top_p": torch.full((rows,), 0.9),
            "min_p": torch.zeros(rows), "uniform": torch.full((rows,), 0.5, dtype=torch.float64),
        }  # fmt: skip
        here = {name: column.to(self._place.device) for name, column in columns.items()}
        logits, ids = self.random(rows, self.vocabulary).float(), self.zeros(rows, dtype=torch.int64)
        sizes = {"rows": rows, "vocabulary": self.vocabulary, "row_stride": self.vocabulary}
        call = self.caller("draw", ids=ids, logits=logits, **here, **sizes)
        return Measured(f"draw, {rows} rows, top-k and top-p", logits.nbytes, 0, call)

    def score_logits(self, rows: int) -> Measured:
        logits, width = self.random(rows, self.vocabulary).float(), 20
        sizes = {
            "count": rows,
            "logits_rows": rows,
            "vocabulary": self.vocabulary,
            "row_stride": self.vocabulary,
        }
        call = self.caller(
            "score_logits", totals=self.zeros(rows, dtype=torch.float64),
            top_ids=self.zeros(rows, width, dtype=torch.int32), top_values=self.zeros(rows, width, dtype=torch.float32),
            logits=logits, rows=torch.arange(rows, device=self._place.device),
            tops=torch.full((rows,), 5, dtype=torch.int32, device=self._place.device), width=width, **sizes,
        )  # fmt: skip
        return Measured(f"score_logits, {rows} rows, the best 5", logits.nbytes, 0, call)

    def all(self) -> list[Measured]:
        decodes = f"paged_attention, {self.rows} decodes at {self.context}"
        chunk = f"paged_attention, a chunk of {self.chunk}"
        return [
            self.add_rms_norm(self.rows),
            self.add_rms_norm(self.chunk),
            self.gated_activation(self.chunk),
            *(self.linear(rows) for rows in self.some_rows),
            *(self.linear(rows, narrow=True) for rows in self.some_rows),
            *(self.linear_quantised(rows, bits) for bits in (4, 8) for rows in self.some_rows),
            self.paged_attention(self.rows, 1, self.context, decodes),
            self.paged_attention(1, self.chunk, self.chunk, chunk),
            self.draw(self.rows),
            self.score_logits(self.rows),
        ]


def seconds_of(place: Place, call: Callable[[], object]) -> float:
    """The median of several runs, each after the caches were written over."""
    if not place.is_chip:
        began_s = time.perf_counter()
        call()
        return time.perf_counter() - began_s
    elsewhere = torch.empty(256 << 20, dtype=torch.uint8, device=place.device)
    taken = []
    for _ in range(20):
        elsewhere.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        taken.append(begin.elapsed_time(end) / 1000)
    return statistics.median(taken[5:])


def measure(place: Place) -> None:
    """A line an operator: time, rates, and the share of what the chip allows."""
    say(
        f"\n{place.name}: caches cold, median of 15"
        if place.is_chip
        else "\nemulated: times say nothing of a chip"
    )
    say(f"{'operator':<44}{'µs':>10}{'GB/s':>9}{'TFLOP/s':>9}{'of the bound':>14}{'torch µs':>12}{'ratio':>8}")
    for one in Shapes(place).all():
        taken_s = seconds_of(place, one.call)
        least_s = bound_s(place.name, one.nbytes, one.flops)
        share = f"{least_s / taken_s:.0%}" if least_s else "-"
        rates = f"{one.nbytes / taken_s / 1e9:>9.1f}{one.flops / taken_s / 1e12:>9.2f}"
        theirs = f"{'-':>12}{'-':>8}"
        if one.peer is not None:
            theirs_s = seconds_of(place, one.peer)
            theirs = f"{theirs_s * 1e6:>12.1f}{theirs_s / taken_s:>8.2f}"
        say(f"{one.what:<44}{taken_s * 1e6:>10.1f}{rates}{share:>14}{theirs}")


def measure_steps(place: Place) -> bool:
    """Whole steps of a rank, and what each kernel takes of them."""
    small = ("--tiny", "--rows", "1,3", "--context", "20", "--chunk", "40")
    large = ("--shapes", ",".join(SHAPES), "--layers", "8")
    command = (sys.executable, "benchmarks/gpu_step.py", *(large if place.is_chip else small))
    return run(*command, SHOAL_CUDA_LIBRARY=str(place.library.path))


def watch(place: Place) -> bool:
    """Every operator once, under compute-sanitizer where there is one and a chip for it."""
    command = (sys.executable, "benchmarks/gpu_once.py")
    named = str(place.library.path)
    if not place.is_chip or shutil.which("compute-sanitizer") is None:
        say("left out: compute-sanitizer, which needs a chip" if not place.is_chip else "no compute-sanitizer")
        return run(*command, SHOAL_CUDA_LIBRARY=named)
    tools = [
        ("compute-sanitizer", f"--tool={tool}", "--error-exitcode=9") for tool in ("memcheck", "racecheck")
    ]
    return all(run(*tool, *command, SHOAL_CUDA_LIBRARY=named) for tool in tools)


def serve(place: Place, deadline_s: float) -> bool:
    """The server on random weights in the shapes of real models; tiny ones where the chip is emulated."""
    small, fine = not place.is_chip, True
    flags = (
        "--log_level warning --device cuda --instance_num 256 --session_len 1024 --max_prefill_token_num 2048"
    )
    load = ("--concurrency", "1,16,64,256", "--prompt", "128", "--output", "128")
    if small:
        flags = "--log_level warning --device cuda --instance_num 4 --session_len 64 --max_prefill_token_num 32"
        load = ("--concurrency", "1,2", "--prompt", "8", "--output", "4", "--vocab", "512")
    for name in SHAPES:
        left_s = deadline_s - time.monotonic()
        if left_s < _LEAST_SERVING_S and not small:
            say(f"left out: {name}, for which {left_s:.0f} s are too few")
            continue
        with tempfile.TemporaryDirectory() as folder:
            say(f"\n{name}, random weights{', tiny' if small else ''}")
            model = write_model(name, Path(folder), tiny=small)
            command = (sys.executable, "benchmarks/serve.py", "--model", str(model), *load)
            named = str(place.library.path)
            fine &= run(*command, "--server_args", flags, SHOAL_CUDA_LIBRARY=named, XDG_STATE_HOME=folder)
    return fine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-build", action="store_true")
    parser.add_argument("--skip-tests", action="store_true")
    options, began_s = parser.parse_args(), time.monotonic()
    chips = compute_capabilities()
    say(f"{processor()}; torch {torch.__version__}; chips: {', '.join(chips) or 'none'}")
    failed = [] if options.skip_build or build(chips) else ["build"]
    place = find_place()
    if not options.skip_tests:
        if not test(place.library.path):
            failed.append("tests")
        if not watch(place):
            failed.append("compute-sanitizer")
    measure(place)
    if not measure_steps(place):
        failed.append("steps")
    if not serve(place, began_s + _LIMIT_S):
        failed.append("server")
    say(f"\n{time.monotonic() - began_s:.0f} s")
    say("\nfailed:" if failed else "\nall done", *failed)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
