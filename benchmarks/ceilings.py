"""What this machine allows at most: read bandwidth and arithmetic peaks, on one thread and on every core.

    python benchmarks/ceilings.py [--threads 1,2]

Compiles ``ceilings.cpp`` with g++ and runs what the processor has. ``vs_peers.py`` prints the same figures beside the
servers', since a shared machine's rates move within the hour.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from serve import processor

_SOURCE = Path(__file__).with_suffix(".cpp")
_CACHE_INDEX = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Kernel:
    """One thing to measure."""

    name: str
    what: str
    unit: str
    flag: str = ""
    """The processor's flag without which it cannot run."""


KERNELS = (
    Kernel("read_large", "read, buffer beyond the caches", "GB/s"),
    Kernel("read_100mb", "read, buffer of 100 MB", "GB/s"),
    Kernel("fma_avx2", "fp32 FMA, AVX2", "GFLOP/s", "fma"),
    Kernel("fma_avx512", "fp32 FMA, AVX-512", "GFLOP/s", "avx512f"),
    Kernel("bf16_avx512", "bf16 dot, AVX-512", "GFLOP/s", "avx512_bf16"),
    Kernel("bf16_amx", "bf16 tiles, AMX", "GFLOP/s", "amx_bf16"),
    Kernel("int8_avx2", "int8, AVX2 (maddubs, madd, add)", "GOP/s", "avx2"),
    Kernel("int8_avx_vnni", "int8, AVX-VNNI (vpdpbusd)", "GOP/s", "avx_vnni"),
    Kernel("int8_avx512", "int8, AVX-512 VNNI (vpdpbusd)", "GOP/s", "avx512_vnni"),
    Kernel("int8_amx", "int8 tiles, AMX", "GOP/s", "amx_int8"),
)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Rates by kernel name and number of threads, in the kernel's unit."""

    threads: tuple[int, ...]
    rates: dict[tuple[str, int], float]

    def best(self, *names: str) -> float:
        """The highest rate of any of these kernels at the most threads; 0 where the processor has none."""
        return max((self.rates.get((name, self.threads[-1]), 0.0) for name in names), default=0.0)

    def table(self) -> str:
        """Markdown."""
        heads = [f"{count} thread{'s' * (count > 1)}" for count in self.threads]
        lines = [f"| limit | {' | '.join(heads)} | |", "| --- |" + " --- |" * (len(heads) + 1)]
        for kernel in KERNELS:
            rates = [self.rates.get((kernel.name, count), 0.0) for count in self.threads]
            if any(rates):
                lines.append(
                    f"| {kernel.what} | {' | '.join(f'{rate:.0f}' for rate in rates)} | {kernel.unit} |"
                )
        return "\n".join(lines)


def main() -> None:
    """Prints one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="", help="such as 1,2; one and all cores without it")
    words = parser.parse_args().threads
    counts = [int(word) for word in words.split(",")] if words else default_threads()
    print(f"{processor()}\n\n{measure(counts).table()}")


def default_threads() -> list[int]:
    return sorted({1, len(os.sched_getaffinity(0))})


def measure(threads: Sequence[int]) -> Ceilings:
    """Compiles and runs, some ten seconds a number of threads. Raises RuntimeError without g++."""
    rates: dict[tuple[str, int], float] = {}
    kernels = [kernel.name for kernel in KERNELS if not kernel.flag or kernel.flag in processor_flags()]
    with TemporaryDirectory() as folder:
        program = compiled(Path(folder))
        for count in threads:
            print(f"measuring the machine's limits, {count} thread(s)", file=sys.stderr, flush=True)
            command = [str(program), str(count), str(large_buffer_bytes()), *kernels]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            for line in output.splitlines():
                name, rate = line.split()
                rates[name, count] = float(rate)
    return Ceilings(tuple(threads), rates)


def compiled(folder: Path) -> Path:
    program = folder / "ceilings"
    command = ["g++", "-std=c++17", "-O2", "-pthread", str(_SOURCE), "-o", str(program)]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise RuntimeError("g++ is not installed") from error
    if result.returncode:
        raise RuntimeError(f"g++ could not compile {_SOURCE.name} (version 11 or newer?):\n{result.stderr}")
    return program


def processor_flags() -> set[str]:
    """As the kernel shows them, so that what it does not enable is left out."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {flag for line in lines if line.startswith("flags") for flag in line.split(":")[1].split()}


def large_buffer_bytes() -> int:
    """Four times the last cache and 1 GiB at least, but no more than a quarter of the memory that is free."""
    cache_bytes = 0
    if _CACHE_INDEX.exists():
        cache_bytes = int(_CACHE_INDEX.read_text().strip().removesuffix("K")) << 10
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(100_000_000, min(max(_GIB, 4 * cache_bytes), free_bytes // 4))


if __name__ == "__main__":
    main()
