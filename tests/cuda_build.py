"""Builds the CUDA library with nvcc, once for the sources as they are, in .cache/cuda, and reads what the assembler
says of each kernel. ``python tests/cuda_build.py`` writes the table that a test compares; with ``--ahead`` it only
builds, with what others leave of the processors."""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "src" / "cuda_ext" / "csrc" / "cuda"
TABLE = SOURCES / "resources.txt"
BUILDS = ROOT / ".cache" / "cuda"

Resources = dict[str, dict[str, tuple[int, int, int]]]
"""Kernel → chip → registers a thread, bytes spilled, bytes of static shared memory."""


def build() -> Path:
    """The folder with ``shoal/cuda_ext/libshoal_cuda.so`` and the compiler's words in ``objects/cuda``."""
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc")
    files = [path for path in sorted(SOURCES.glob("*.*")) if path != TABLE]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in (*files, ROOT / "setup.py"))).hexdigest()
    folder = BUILDS / digest[:16]
    BUILDS.mkdir(parents=True, exist_ok=True)
    with (BUILDS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = folder / "shoal" / "cuda_ext" / "libshoal_cuda.so"
        if not library.exists():
            for other in BUILDS.glob("*/"):
                shutil.rmtree(other, ignore_errors=True)
            places = (f"--build-lib={folder}", f"--build-temp={folder / 'objects'}")
            command = (sys.executable, "setup.py", "-q", "build_ext", "--library=cuda", *places)
            built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert library.exists(), built.stdout + built.stderr
    return folder


def begin() -> "subprocess.Popen[bytes] | None":
    """Builds ahead of the tests that want it; None where there is no nvcc."""
    if shutil.which("nvcc") is None:
        return None
    command, quiet = (sys.executable, __file__, "--ahead"), subprocess.DEVNULL
    return subprocess.Popen(command, cwd=ROOT, stdout=quiet, stderr=quiet, start_new_session=True)


def nvcc_version() -> str:
    said = subprocess.run(("nvcc", "--version"), check=True, capture_output=True, text=True).stdout
    version = re.search(r"V(\d+\.\d+\.\d+)", said)
    return f"nvcc {version[1]}" if version else "nvcc"


def resources(folder: Path) -> Resources:
    """From the assembler's words."""
    said = "".join(path.read_text() for path in sorted((folder / "objects" / "cuda").glob("*.log")))
    said = subprocess.run("c++filt", input=said, check=True, capture_output=True, text=True).stdout
    found: Resources = {}
    for part in said.split("Compiling entry function '")[1:]:
        signature, chip = re.match(r"(.*)' for '(\w+)'", part).groups()  # type: ignore[union-attr]
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", part)[:2])
        registers, shared = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
        assert registers is not None
        sizes = (int(registers[1]), spilled, int(shared[1]) if shared else 0)
        found.setdefault(kernel_name(signature), {})[chip] = sizes
    return found


def serialised(folder: Path) -> list[str]:
    """What the assembler says of kernels whose products of wgmma it lets wait for each other."""
    said = "".join(path.read_text() for path in sorted((folder / "objects" / "cuda").glob("*.log")))
    return [line for line in said.splitlines() if "wgmma.mma_async instructions are serialized" in line]


def kernel_name(signature: str) -> str:
    """Without what every kernel's signature has, and its parameters."""
    name = signature.replace("(anonymous namespace)::", "").removeprefix("void ").rsplit("(", 1)[0]
    name = re.sub(r"\((?:int|bool)\)", "", name)
    shorter = {"__nv_bfloat16": "bf16", "__half": "fp16", "__nv_fp8_e4m3": "fp8", "_kernel": ""}
    for long, short in shorter.items():
        name = name.replace(long, short)
    return name


def table(folder: Path) -> str:
    found = resources(folder)
    chips = sorted(
        {chip for sizes in found.values() for chip in sizes}, key=lambda chip: int(re.sub(r"\D", "", chip))
    )
    lines = [nvcc_version(), "registers a thread / bytes spilled / bytes of static shared memory"]
    lines.append("  ".join([*(f"{chip:<14}" for chip in chips), "kernel"]))
    for name in sorted(found):
        cells = ("/".join(str(size) for size in found[name][chip]) for chip in chips)
        lines.append("  ".join([*(f"{cell:<14}" for cell in cells), name]))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--ahead"]:
        os.nice(19)
        build()
    else:
        TABLE.write_text(table(build()))
