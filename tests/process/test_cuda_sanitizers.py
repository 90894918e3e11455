"""The emulated CUDA kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, to which the
threads of a block are announced; and faults planted into their sources, each of which must be found."""

import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import cuda_calls
import emulated
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests" / "unit" / "cuda_ext" / "cuda"
NOT_KERNELS = ("test_cuda_registration.py",)
KERNEL_TESTS = sorted(path.name for path in TESTS.glob("test_*.py") if path.name not in NOT_KERNELS)
MEMORY = "address,undefined"
BUILDING = threading.Lock()
pytestmark = pytest.mark.ahead
FLAGS = ("-std=c++17", "-O1", "-g1", "-fPIC", "-fno-omit-frame-pointer", "-ffp-contract=off")


def runtime(name: str) -> str:
    """The path of one of the compiler's own libraries."""
    if shutil.which(emulated.COMPILER) is None:
        pytest.skip(f"there is no {emulated.COMPILER}")
    command = (emulated.COMPILER, f"-print-file-name={name}")
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"{emulated.COMPILER} has no {name}")
    return found


def compiled(*command: str) -> None:
    done = subprocess.run((emulated.COMPILER, *command), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def replayer(sanitize: str) -> Path:
    """The program that runs recorded calls, built with a sanitizer."""
    source = Path(__file__).with_name("replay.cpp")
    program = emulated.BUILDS / f"replay-{sanitize.replace(',', '_')}-{source.stat().st_mtime_ns}"
    with BUILDING:
        if not program.exists():
            emulated.BUILDS.mkdir(parents=True, exist_ok=True)
            compiled(*FLAGS, f"-fsanitize={sanitize}", str(source), "-o", str(program), "-ldl")
    return program


def replay(
    sanitize: str, library: Path, operator: str, to: Path, chip: str = "80", **more: int
) -> "subprocess.CompletedProcess[str]":
    """An example of the operator on the chip; more: arguments of the example."""
    record = to / f"{operator}.calls"
    cuda_calls.record(cuda_calls.EXAMPLES[operator](torch.Generator().manual_seed(3), **more), record)
    together = ["together"] if operator in cuda_calls.TOGETHER else []
    command = [str(replayer(sanitize)), str(library), str(record), *together]
    options = {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    environment = {**os.environ, **options, "SHOAL_EMULATED_CHIP": chip, "SHOAL_EMULATED_NO_CUBLAS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr:
        # The runtime of older compilers does not know every layout of addresses that kernels choose.
        if shutil.which("setarch") is None:
            pytest.skip("ThreadSanitizer does not run with this kernel's address layout")
        command = ["setarch", "--addr-no-randomize", *command]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done


@pytest.mark.parametrize("test", KERNEL_TESTS)
def test_kernels_stay_inside_their_tensors(test: str) -> None:
    preload = f"{runtime('libasan.so')} {runtime('libstdc++.so.6')}"
    environment = {
        **os.environ,
        "SHOAL_CUDA_LIBRARY": str(emulated.build(MEMORY)),
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = (
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "--capture=sys",
        "-p",
        "no:cacheprovider",
        # Half precision lies where bfloat16 does.
        "-k",
        "not dtype1",
        str(TESTS / test),
    )
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    assert re.search(r"\d passed", done.stdout), done.stdout[-2000:]


@pytest.mark.parametrize(
    ("operator", "chip"),
    [
        *((operator, "80") for operator in cuda_calls.EXAMPLES),
        ("paged_attention", "80:1"),
        *(
            (operator, chip)
            for operator in ("linear", "linear_quantised", "paged_attention")
            for chip in ("90", "90:1")
        ),
        ("draw", "90"),
        ("score_logits", "90"),
    ],
)
def test_threads_of_a_block_meet_where_they_must(operator: str, chip: str, tmp_path: Path) -> None:
    assert_no_races(operator, tmp_path, chip)


def test_ranks_meet_where_they_must_in_one_step_too(tmp_path: Path) -> None:
    assert_no_races("all_reduce", tmp_path, "80", steps=1)


def assert_no_races(operator: str, to: Path, chip: str, **more: int) -> None:
    runtime("libtsan.so")
    done = replay("thread", emulated.build("thread"), operator, to, chip, **more)
    assert done.returncode == 0, done.stderr[-8000:]
    assert "status 0" in done.stdout, done.stdout


@dataclass(frozen=True)
class Planted:
    """A change to the sources, and what is said of it (a pattern)."""

    operator: str
    file: str
    was: str
    now: str
    sanitize: str
    found: str
    chip: str = "80"
    more: tuple[tuple[str, int], ...] = ()


PLANTED = {
    "no barrier before a block's sum": Planted(
        "rms_norm", "device.h", "    __syncthreads();\n", "", "thread", "data race"
    ),
    "no barrier before a tile is read": Planted(
        "paged_attention",
        "paged_attention.cu",
        "wait_for_copies<kStages - 2>();\n            __syncthreads();",
        "wait_for_copies<kStages - 2>();",
        "thread",
        "data race",
    ),
    "no barrier before a section's tiles are added": Planted(
        "paged_attention",
        "attention_split.h",
        "            __syncthreads();\n            add_tiles(items);",
        "            add_tiles(items);",
        "thread",
        "data race",
    ),
    "a tile in the place of sums that are still added": Planted(
        "paged_attention",
        "attention_split.h",
        "            if (!has_next) return;\n            __syncthreads();",
        "            if (!has_next) return;",
        "thread",
        "data race",
        "80:1",
    ),
    "sums in the place of values that other lanes still read": Planted(
        "paged_attention",
        "attention_split.h",
        "const {\n        __syncwarp();\n        UNROLL for (unsigned i = 0; i < 2; i++) {",
        "const {\n        UNROLL for (unsigned i = 0; i < 2; i++) {",
        "thread",
        "data race",
    ),
    "no barrier before other ranks are told": Planted(
        "all_reduce",
        "peer_memory.h",
        "    __syncthreads();\n    if (int(threadIdx.x) < ranks)",
        "    if (int(threadIdx.x) < ranks)",
        "thread",
        "data race",
    ),
    "no wait for the other ranks' parts": Planted(
        "all_reduce",
        "all_reduce.cu",
        "    meet(regions, rank, ranks, call, kFirst, a.stop, a.fault);\n",
        "",
        "thread",
        "data race",
        more=(("steps", 1),),
    ),
    "no wait for the other ranks' sums": Planted(
        "all_reduce",
        "all_reduce.cu",
        "        meet(regions, rank, ranks, call, kSecond, a.stop, a.fault);\n",
        "",
        "thread",
        "data race",
    ),
    "no barrier before other blocks' turns are added": Planted(
        "linear", "linear_few.h", "else\n            meet_cluster();", ";", "thread", "data race", "90"
    ),
    "a block that leaves before its turns are added": Planted(
        "linear",
        "linear_few.h",
        "    if (!is_alone) meet_cluster();",
        "",
        MEMORY,
        "heap-use-after-free",
        "90",
    ),
    "no barrier before wgmma's sums of other blocks are added": Planted(
        "linear", "linear_some.h", "else\n        meet_cluster();", ";", "thread", "data race", "90"
    ),
    "a block that leaves before its sums of wgmma are added": Planted(
        "linear",
        "linear_some.h",
        "    if (!is_alone) meet_cluster();",
        "",
        MEMORY,
        "heap-use-after-free",
        "90",
    ),
    "no barrier before other blocks' histograms are added": Planted(
        "draw",
        "draw.cu",
        "        team.meet();\n        KEEP_LOOP",
        "        __syncthreads();\n        KEEP_LOOP",
        "thread",
        "data race",
        "90",
    ),
    "sums in the place of those that other blocks still read": Planted(
        "draw",
        "logit_row.h",
        "join_blocks<Blocks>(exchange, turn ^= 1",
        "join_blocks<Blocks>(exchange, 0",
        "thread",
        "data race",
        "90",
    ),
    "a block that leaves while others read its best": Planted(
        "score_logits",
        "score_logits.cu",
        "    team.meet();  // nobody leaves while others may read what it has told",
        "",
        MEMORY,
        "heap-use-after-free",
        "90",
    ),
    "turns that are added before they are there": Planted(
        "linear",
        "linear_few.h",
        "            wait_for_phase(barrier, group);",
        "            ;",
        "thread",
        "data race",
        "90:1",
    ),
    "no barrier before wgmma reads some rows": Planted(
        "linear",
        "linear_some.h",
        "        show_to_products();\n        __syncthreads();",
        "        show_to_products();",
        "thread",
        "data race",
        "90",
    ),
    "no barrier before wgmma reads its rows": Planted(
        "linear",
        "linear_group.h",
        "        show_to_products();\n        __syncthreads();",
        "        show_to_products();",
        "thread",
        "data race",
        "90",
    ),
    "tiles that are read before they are there": Planted(
        "paged_attention",
        "attention_group.h",
        "        wait_for_phase(shared.full[slot], item / kSlots);\n",
        "",
        "thread",
        "data race",
        "90",
    ),
    "tiles in the place of those that are still read": Planted(
        "paged_attention",
        "attention_group.h",
        "        if (item >= kSlots) wait_for_phase(shared.empty[item % kSlots], item / kSlots - 1);\n",
        "",
        "thread",
        "data race",
        "90:1",
    ),
    "queries in the place of those that are still read": Planted(
        "paged_attention",
        "attention_group.h",
        "if (spans_before >= kSets)",
        "if (spans_before < 0)",
        "thread",
        "data race",
        "90:1",
        more=(("chunk", 200), ("context", 200)),
    ),
    "one lane that tells before the others have read": Planted(
        "paged_attention",
        "attention_group.h",
        "        __syncwarp();\n        if (threadIdx.x % kWarpSize == 0) arrive(at);",
        "        if (threadIdx.x % kWarpSize == 0) arrive(at);",
        "thread",
        "data race",
        "90",
    ),
    "a slot beyond the shared memory": Planted(
        "paged_attention",
        "attention_group.h",
        "shared.slots[slot] + d / 4 * kPanel",
        "shared.slots[slot] + (d / 4 + 9) * kPanel",
        MEMORY,
        "heap-buffer-overflow",
        "90",
    ),
    "a column too far": Planted(
        "rms_norm",
        "rms_norm.cu",
        "if (place(n) < dim) load_eight",
        "if (place(n) <= dim) load_eight",
        MEMORY,
        "heap-buffer-overflow",
    ),
    "a warp's place too far": Planted(
        "rms_norm",
        "device.h",
        "parts[threadIdx.x / kWarpSize] = x",
        "parts[threadIdx.x / kWarpSize + 30] = x",
        MEMORY,
        "insufficient space|global-buffer-overflow",
    ),
    "a tile beyond the shared memory": Planted(
        "paged_attention",
        "paged_attention.cu",
        "shared + stage * Places::kStage + key",
        "shared + Places::kBytes + key",
        MEMORY,
        "heap-buffer-overflow",
    ),
    "a vector load at any address": Planted(
        "rms_norm",
        "device.h",
        "return reinterpret_cast<uintptr_t>(pointer) % sizeof(Eight<T>) == 0 && stride % 8 == 0;",
        "return pointer || stride;",
        MEMORY,
        "misaligned address|heap-buffer-overflow",
        more=(("dim", 1003),),
    ),
}


def is_of(planted: Planted, source: Path) -> bool:
    """An operator's sources: its own and those that do the same with another type."""
    return re.fullmatch(rf"{planted.operator}(_fp\d+)?", source.stem) is not None


def plant(planted: Planted, to: Path) -> Path:
    """The library of the changed sources, of one operator alone."""
    sources = to / "cuda"
    shutil.copytree(emulated.SOURCES, sources)
    changed = sources / planted.file
    text = changed.read_text()
    assert planted.was in text
    changed.write_text(text.replace(planted.was, planted.now, 1))
    flags = [
        *FLAGS,
        "-O0",
        "-fno-exceptions",
        "-fno-rtti",
        "-DSHOAL_INTERFACE=0u",
        '-DSHOAL_TARGETS="emulation"',
    ]
    checks = [f"-fsanitize={planted.sanitize}", "-fno-sanitize-recover=all"] if planted.sanitize else []
    scheduler = ["-DSHOAL_THREAD_SANITIZER"] if planted.sanitize == "thread" else checks
    compiling = [
        (sources / "library.cu", checks),
        (sources / "library_product.cu", checks),
        *((path, checks) for path in sorted(sources.glob(f"{planted.operator}*.cu")) if is_of(planted, path)),
        *((path, scheduler) for path in sorted((sources / "emulation").glob("*.cpp"))),
    ]
    for source, how in compiling:
        compiled(*flags, *how, "-x", "c++", "-c", str(source), "-o", str(to / f"{source.stem}.o"))
    library = to / "planted.so"
    objects = [str(to / f"{source.stem}.o") for source, _ in compiling]
    compiled("-shared", *checks, *objects, "-o", str(library))
    return library


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
def test_a_planted_fault_is_found(planted: Planted, tmp_path: Path) -> None:
    runtime("libtsan.so" if planted.sanitize == "thread" else "libasan.so")
    library = plant(planted, tmp_path)
    done = replay(planted.sanitize, library, planted.operator, tmp_path, planted.chip, **dict(planted.more))
    assert done.returncode != 0, done.stdout
    assert re.search(planted.found, done.stderr), done.stderr[-4000:]


def test_a_barrier_for_some_threads_only_is_a_deadlock_by_name(tmp_path: Path) -> None:
    planted = Planted(
        "rms_norm",
        "device.h",
        "    __syncthreads();\n    float sum",
        "    if (threadIdx.x < 100) __syncthreads();\n    float sum",
        "",
        "",
    )
    done = replay("undefined", plant(planted, tmp_path), "rms_norm", tmp_path)
    assert re.search(r"status 8 .*deadlock in rms_norm, block \(0, 0, 0\): .*__syncthreads", done.stdout)


def changes_results(planted: Planted, to: Path) -> bool:
    sums = []
    for library in (emulated.build(), plant(planted, to)):
        done = replay("undefined", library, planted.operator, to, planted.chip, **dict(planted.more))
        assert "status 0" in done.stdout, done.stdout + done.stderr
        sums.append(done.stdout.split("checksum")[1])
    return sums[0] != sums[1]


def test_a_slot_that_nobody_frees_is_a_deadlock_by_name(tmp_path: Path) -> None:
    freed = "        tell(shared.empty[item_of_keys(turn) % kSlots]);\n"
    planted = Planted("paged_attention", "attention_group.h", freed, "", "", "", "90:1")
    done = replay("undefined", plant(planted, tmp_path), "paged_attention", tmp_path, "90:1")
    assert re.search(r"status 8 .*deadlock in paged_attention, block \(0, 0, 0\): .*an mbarrier", done.stdout)


HURRIED = [
    (
        "paged_attention",
        "80",
        "paged_attention.cu",
        "wait_for_copies<kStages - 2>",
        "wait_for_copies<kStages - 1>",
    ),
    (
        "paged_attention",
        "80",
        "attention_split.h",
        "keep(softmax);\n            wait_for_copies<kBuffers - 1>",
        "keep(softmax);\n            wait_for_copies<kBuffers>",
    ),
    ("linear", "80", "linear_many.h", "wait_for_copies<kStages - 2>", "wait_for_copies<kStages - 1>"),
    ("paged_attention", "90", "attention_group.h", "tell_full<1>", "tell_full<2>"),
    (
        "paged_attention",
        "90",
        "attention_group.h",
        "        wait_for_copies<Later>();\n        show_to_products();\n",
        "        wait_for_copies<Later>();\n",
    ),
    ("paged_attention", "90", "attention_group.h", "wait_for_products<0>(s);", "wait_for_products<1>(s);"),
    ("paged_attention", "90", "attention_group.h", "wait_for_products<1>(s);", "wait_for_products<2>(s);"),
    ("linear", "80", "linear_few.h", "wait_for_copies<(kDepth > 1 ? 1 : 0)>", "wait_for_copies<kDepth>"),
    ("linear", "90:1", "linear_few.h", "wait_for_copies<kDepth - 1>", "wait_for_copies<kDepth>"),
    ("linear", "90", "linear_some.h", "wait_for_copies<kStages - 2>", "wait_for_copies<kStages - 1>"),
    ("linear", "90", "linear_some.h", "wait_for_products<0>(product", "wait_for_products<1>(product"),
    ("linear", "90", "linear_some.h", "            begin_products(product);\n", ""),
    (
        "paged_attention",
        "90",
        "attention_group.h",
        "            wait_for_products<0>(sums, weights);\n            tell",
        "            tell",
    ),
    (
        "paged_attention",
        "90",
        "attention_group.h",
        "        wait_for_products<0>(sums, weights);\n        tell",
        "        tell",
    ),
    ("paged_attention", "90", "attention_group.h", "        begin_products(s);\n", ""),
    ("paged_attention", "90", "attention_group.h", "        begin_products(sums, weights);\n", ""),
]
"""Waits and fences taken away from copies and products."""


@pytest.mark.parametrize(("operator", "chip", "file", "was", "now"), HURRIED)
def test_copies_and_products_that_are_not_waited_for_show(
    operator: str, chip: str, file: str, was: str, now: str, tmp_path: Path
) -> None:
    assert changes_results(Planted(operator, file, was, now, "", "", chip), tmp_path)


@pytest.mark.parametrize("operator", ["linear", "paged_attention"])
@pytest.mark.parametrize("is_deterministic", [0, 1])
def test_a_wgmma_that_rounds_otherwise_changes_no_deterministic_row(
    operator: str, is_deterministic: int, tmp_path: Path
) -> None:
    was = "sum = product_sum(shape.adds ? sum : 0.0f, a[row], b);"
    more = (("is_deterministic", is_deterministic),)
    planted = Planted(operator, "emulation/emulation.cpp", was, was + " sum *= 1.001f;", "", "", "90", more)
    assert changes_results(planted, tmp_path) == (not is_deterministic)


def test_fibres_change_stacks_without_assembly_too(tmp_path: Path) -> None:
    """With ucontext, as on other processors than x86-64."""
    changed = ("#if defined(__x86_64__) && !defined(SHOAL_UCONTEXT)", "#if 0")
    slower = plant(Planted("rms_norm", "emulation/fibre.cpp", *changed, "", ""), tmp_path)
    sums = [replay("undefined", library, "rms_norm", tmp_path).stdout for library in (emulated.build(), slower)]
    assert "status 0" in sums[0]
    assert sums[0] == sums[1]
