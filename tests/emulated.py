"""Builds the CUDA kernels as g++ compiles them, once for the sources as they are, in .cache/emulated."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "src" / "cuda_ext" / "csrc" / "cuda"
BUILDS = ROOT / ".cache" / "emulated"
COMPILER = os.environ.get("CXX", "g++")

DTYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.int8: 2,
    torch.float16: 3,
    torch.float8_e4m3fn: 4,
}
"""As shoal_cuda.h numbers them."""


def build(sanitize: str = "") -> Path:
    """The library. Test processes that want it at once wait for one of them."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"there is no {COMPILER}")
    files = [path for path in sorted(SOURCES.rglob("*")) if path.is_file()] + [ROOT / "setup.py"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
    kind = sanitize.replace(",", "_") or "plain"
    folder = BUILDS / f"{kind}-{digest}"
    BUILDS.mkdir(parents=True, exist_ok=True)
    library = folder / "shoal" / "cuda_ext" / "libshoal_cuda_emulated.so"
    with (BUILDS / f"{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            for other in BUILDS.glob(f"{kind}-*"):
                shutil.rmtree(other, ignore_errors=True)
            places = (f"--build-lib={folder}", f"--build-temp={folder / 'objects'}")
            checks = [f"--sanitize={sanitize}"] if sanitize else []
            command = (
                sys.executable,
                "setup.py",
                "-q",
                "build_ext",
                "--library=cuda_emulated",
                *checks,
                *places,
            )
            built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert library.exists(), built.stdout + built.stderr
    return library


def close(actual: Tensor, truth: Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(actual.double(), truth.double(), rtol=rtol, atol=atol)


def one_rounding(dtype: torch.dtype) -> float:
    """The relative error of a result that is right but for its last rounding, and a little."""
    return float(torch.finfo(dtype).eps) * 0.51
