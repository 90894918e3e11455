"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, at every level that this processor has, and the
threads under ThreadSanitizer. Each is built once for the sources as they are, in .cache/sanitizers."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPU = ROOT / "src" / "cuda_ext" / "csrc" / "cpu"
BUILDS = ROOT / ".cache" / "sanitizers"
STRESS = ROOT / "tests" / "process" / "parallel_stress.cpp"
NOT_KERNELS = ("test_binding.py", "test_registration.py")
"""Neither other libraries nor torch's compiler are what is looked at here."""
KERNEL_TESTS = [
    str(path)
    for path in sorted((ROOT / "tests" / "unit" / "cuda_ext").glob("test_*.py"))
    if path.name not in NOT_KERNELS
]

COMPILER = os.environ.get("CXX", "g++")
pytestmark = pytest.mark.ahead
BUILDING = threading.Lock()


def runtime(name: str) -> str:
    """The path of one of the compiler's own libraries."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"there is no {COMPILER}")
    command = (COMPILER, f"-print-file-name={name}")
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"{COMPILER} has no {name}")
    return found


def folder_of(name: str, sources: Sequence[Path]) -> Path:
    """For what is built of ``sources``; what was built of others goes away."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources))).hexdigest()[:16]
    folder = BUILDS / f"{name}-{digest}"
    for other in BUILDS.glob(f"{name}-*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def checked(*command: str) -> "subprocess.CompletedProcess[str]":
    """Runs Python with a library that stops at the first memory error."""
    preload = f"{runtime('libasan.so')} {runtime('libstdc++.so.6')}"
    environment = {
        **{name: value for name, value in os.environ.items() if name != "SHOAL_CPU_LEVEL"},
        "SHOAL_CPU_LIBRARY": str(checked_library()),
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return subprocess.run((sys.executable, *command), cwd=ROOT, env=environment, capture_output=True, text=True)


def checked_library() -> Path:
    """Built once."""
    folder = folder_of("address", [*CPU.iterdir(), ROOT / "setup.py"])
    library = folder / "shoal" / "cuda_ext" / "libshoal_cpu.so"
    with BUILDING:
        if not library.exists():
            places = (f"--build-lib={folder}", f"--build-temp={folder / 'objects'}")
            command = (
                sys.executable, "setup.py", "-q", "build_ext", "--sanitize=address,undefined", *places
            )  # fmt: skip
            built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert library.exists(), built.stderr
            shutil.rmtree(folder / "objects")
    return library


@pytest.mark.parametrize("half", [0, 1])
def test_kernels_stay_inside_their_tensors(half: int) -> None:
    tests = KERNEL_TESTS[half::2]
    done = checked("-m", "pytest", "-q", "-x", "--capture=sys", "-p", "no:cacheprovider", *tests)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    assert re.search(r"\d{3,} passed", done.stdout), done.stdout[-2000:]


PLANTED = {
    "a row too few to write": (
        "rms_norm",
        "[torch.empty(3, 40), None, torch.ones(4, 40), torch.ones(40), 4, 1, 40, 40, 0, 1e-5]",
    ),
    "a row too few to read": (
        "add_rms_norm",
        "[torch.empty(4, 40), None, torch.ones(4, 40), torch.ones(3, 40), torch.ones(40), 4, 40, 40, 40, 1e-5]",
    ),
    "a panel too few": (
        "linear",
        "[torch.empty(2, 40), torch.ones(2, 24), torch.ones(2, 24, 16), None, 2, 24, 40, 24, 40, 0, 0, 0, 0]",
    ),
    "one element too few": (
        "gated_activation",
        "[torch.empty(80)[:79].clone(), None, torch.ones(2, 80), 2, 40, 80, 0]",
    ),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_an_overrun_is_found(planted: str) -> None:
    operator, values = PLANTED[planted]
    code = (
        "import torch; from shoal.cuda_ext.program import Program; program = Program(); "
        f"program.add({operator!r}, {values}, print); program.run(); print('not found')"
    )
    done = checked("-c", code)
    assert done.returncode != 0
    assert "not found" not in done.stdout
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr[-4000:]
    assert operator.split("_")[-1] in done.stderr


def stress() -> Path:
    """The program, built with ThreadSanitizer."""
    runtime("libtsan.so")
    sources = [STRESS, CPU / "parallel.cpp", CPU / "parallel.h", CPU / "look_out.h"]
    program = folder_of("thread", sources) / "parallel_stress"
    with BUILDING:
        if not program.exists():
            flags = ("-std=c++17", "-O1", "-g", "-pthread", "-fsanitize=thread", f"-I{CPU}")
            command = (COMPILER, *flags, str(STRESS), str(CPU / "parallel.cpp"), "-o", str(program))
            subprocess.run(command, check=True)
    return program


def run_stress(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = (str(stress()), *arguments)
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr:
        # The runtime of older compilers does not know every layout of addresses that kernels choose.
        if shutil.which("setarch") is None:
            pytest.skip("ThreadSanitizer does not run with this kernel's address layout")
        command = ("setarch", "--addr-no-randomize", *command)
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done


def test_threads_hand_over_their_work_without_a_race() -> None:
    done = run_stress()
    assert done.returncode == 0, done.stderr[-8000:]
    assert "all items done once" in done.stdout


def test_a_race_is_found() -> None:
    done = run_stress("--race")
    assert done.returncode != 0
    assert "ThreadSanitizer: data race" in done.stderr
