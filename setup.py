"""Package list of the ``src`` → ``shoal`` mapping, and the build of the two libraries: plain C++ and CUDA behind C
interfaces. The CPU library is compiled once for each level of instructions that it picks from at run time, the CUDA
library for the chips in ``SHOAL_CUDA_ARCHS`` where nvcc is found. The rest of the metadata is in setup.cfg."""

import os
import platform
import shutil
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

PACKAGE = Path("src/cuda_ext")
SOURCES = PACKAGE / "csrc/cpu"
INTERFACE = SOURCES / "shoal_cpu.h"
LIBRARY = "shoal.cuda_ext.libshoal_cpu"
CUDA_SOURCES = PACKAGE / "csrc/cuda"
CUDA_INTERFACE = CUDA_SOURCES / "shoal_cuda.h"
CUDA_LIBRARY = "shoal.cuda_ext.libshoal_cuda"
EMULATED_LIBRARY = "shoal.cuda_ext.libshoal_cuda_emulated"
CUDA_ARCHS = "80+ptx 90a 100a"
"""Compute capabilities as nvcc names them; +ptx: also as code that newer chips' drivers compile."""

FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden"]
FLAGS += ["-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized"]
SANITIZED = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
LINKING = ["-shared", "-pthread", "-static-libgcc", "-static-libstdc++"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
CUDA_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-lineinfo", "-Xptxas=-v"]
CUDA_FLAGS += ["-Xcompiler=-fPIC,-fvisibility=hidden"]
EMULATED_FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden"]
EMULATED_FLAGS += ["-fno-exceptions", "-fno-rtti"]
LEVELS = {"Scalar": []}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS |= {"Avx2": AVX2, "Avx512": AVX512, "Avx512Vnni": [*AVX512, "-mavx512vnni"]}
EXTRAS = {"_bf16": ["-mavx512bf16"]}
EXTRAS |= {"_amx": [*EXTRAS["_bf16"], "-mavx512vbmi2", "-mamx-tile", "-mamx-int8", "-mamx-bf16"]}
"""What sources are compiled with whose names end so, where the compiler knows it, besides what Avx512Vnni is."""


def run(*command: str) -> str:
    """What it wrote to stderr."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr
    except OSError as error:
        raise CompileError(f"{command[0]}: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        raise CompileError(f"{' '.join(command)}\n{error.stderr}") from error


class BuildLibraries(build_ext):
    """Runs g++ (or $CXX) and nvcc (or $NVCC). Without the one the install goes on, and the operators run on their torch
    twins; without the other there is no CUDA library.

    ``--sanitize=address,undefined`` builds a CPU library for tests that stops at the first such error. ``--library`` is
    the one library to build: cpu, cuda, or cuda_emulated, which is the CUDA kernels as g++ compiles them, for tests.
    """

    user_options: ClassVar = [
        *build_ext.user_options,
        ("sanitize=", None, "the errors that -fsanitize looks for"),
        ("library=", None, "the only library to build: cpu, cuda or cuda_emulated"),
    ]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.sanitize = ""
        self.library = ""

    def finalize_options(self) -> None:
        super().finalize_options()
        usual = ["cpu"] if self.sanitize else ["cpu", "cuda"]
        wanted = [f"shoal.cuda_ext.libshoal_{name}" for name in ([self.library] if self.library else usual)]
        self.extensions = [ext for ext in self.extensions if ext.name in wanted]

    def run(self) -> None:
        self.is_in_tree = bool(self.inplace or self.editable_mode)  # setuptools clears inplace while it builds
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        sources = SOURCES if ext.name == LIBRARY else CUDA_SOURCES
        newest = max(path.stat().st_mtime for path in (*sources.rglob("*"), Path(__file__)))
        in_tree = PACKAGE / target.name
        for made in (target, *([in_tree] if self.is_in_tree else [])):
            if not self.force and made.exists() and made.stat().st_mtime > newest:
                if made != target:  # editable installs build in a folder of their own each time
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(made, target)
                return
        if ext.name == CUDA_LIBRARY and shutil.which(nvcc()) is None:
            target.unlink(missing_ok=True)
            sys.stdout.write(f"no CUDA library: there is no {nvcc()}\n")
            return
        build = {
            LIBRARY: self.build_cpu_library,
            CUDA_LIBRARY: self.build_cuda_library,
            EMULATED_LIBRARY: self.build_emulated_library,
        }
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            built = build[ext.name](target)
        except CompileError:
            target.unlink(missing_ok=True)  # of older sources: no wheel is to carry it
            raise
        sys.stdout.write(f"built {target.name} ({built})\n")

    def build_cpu_library(self, target: Path) -> str:
        compiler = host_compiler("the operators will run on torch alone, slower")
        base, interface = LEVELS.get("Avx512Vnni", []), interface_of(INTERFACE)
        extras = {
            end: [*base, *more] for end, more in EXTRAS.items() if base and knows(compiler, [*base, *more])
        }
        jobs = [
            (SOURCES / "level.cpp", f"level_{name}", [*flags, f"-DSHOAL_LEVEL=k{name}"])
            for name, flags in LEVELS.items()
        ]
        for path in sorted(SOURCES.glob("*.cpp")):
            if path.name != "level.cpp":
                own = next((extras[end] for end in extras if path.stem.endswith(end)), [])
                jobs.append((path, path.stem, [interface, *own]))
        command = (compiler, *FLAGS, *WARNINGS, *self.checks)
        self.compile_and_link("cpu", target, jobs, command, (compiler, *LINKING, *self.checks))
        return f"{', '.join([*LEVELS, *(end[1:].capitalize() for end in extras)])}, with {compiler}"

    def build_cuda_library(self, target: Path) -> str:
        targets, flags = cuda_targets(os.environ.get("SHOAL_CUDA_ARCHS") or CUDA_ARCHS)
        jobs = [(path, path.stem, []) for path in sorted(CUDA_SOURCES.glob("*.cu"))]
        defined = (interface_of(CUDA_INTERFACE), f'-DSHOAL_TARGETS="{targets}"')
        linking = (nvcc(), "-shared", "-cudart=static", *flags)
        self.compile_and_link("cuda", target, jobs, (nvcc(), *CUDA_FLAGS, *defined, *flags), linking)
        return f"{targets}, with {nvcc()}"

    def build_emulated_library(self, target: Path) -> str:
        compiler = host_compiler("CUDA kernels cannot be emulated")
        # What fibres share is no kernel's memory: their scheduler is compiled without ThreadSanitizer.
        is_threads = self.sanitize == "thread"
        scheduler = ["-O2", *(["-fno-sanitize=thread", "-DSHOAL_THREAD_SANITIZER"] if is_threads else [])]
        jobs = [(path, path.stem, ["-x", "c++"]) for path in sorted(CUDA_SOURCES.glob("*.cu"))]
        jobs += [(path, path.stem, scheduler) for path in sorted((CUDA_SOURCES / "emulation").glob("*.cpp"))]
        defined = (interface_of(CUDA_INTERFACE), '-DSHOAL_TARGETS="emulation"')
        command = (compiler, *EMULATED_FLAGS, *WARNINGS, *self.checks, *defined)
        self.compile_and_link("emulated", target, jobs, command, (compiler, *LINKING, *self.checks))
        return f"emulation, with {compiler}"

    @property
    def checks(self) -> list[str]:
        return [*SANITIZED, f"-fsanitize={self.sanitize}"] if self.sanitize else []

    def compile_and_link(
        self,
        kind: str,
        target: Path,
        jobs: list[tuple[Path, str, list[str]]],
        compiling: tuple[str, ...],
        linking: tuple[str, ...],
    ) -> None:
        """jobs: a source, its object's name, flags of its own. What the compiler said is kept beside the object."""
        objects = Path(self.build_temp) / kind
        objects.mkdir(parents=True, exist_ok=True)

        def compile_one(job: tuple[Path, str, list[str]]) -> str:
            source, name, flags = job
            to = objects / f"{name}.o"
            said = run(*compiling, *flags, "-c", str(source), "-o", str(to))
            to.with_suffix(".log").write_text(said)
            return str(to)

        with ThreadPoolExecutor(int(os.environ.get("SHOAL_BUILD_JOBS") or os.cpu_count() or 1)) as pool:
            built = list(pool.map(compile_one, jobs))
        fresh = target.with_suffix(".new")
        run(*linking, "-o", str(fresh), *built)
        fresh.replace(target)


def host_compiler(without: str) -> str:
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        raise CompileError(f"no {compiler}: {without}")
    return compiler


def knows(compiler: str, flags: list[str]) -> bool:
    """Older compilers lack the newest instructions."""
    command = [compiler, *flags, "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def nvcc() -> str:
    return os.environ.get("NVCC") or "nvcc"


def interface_of(header: Path) -> str:
    return f"-DSHOAL_INTERFACE={zlib.crc32(header.read_bytes())}u"


def cuda_targets(wanted: str) -> tuple[str, list[str]]:
    """wanted: "80+ptx 90a". What the library says of itself, and nvcc's flags."""
    names, flags = [], []
    for item in wanted.replace(",", " ").replace(";", " ").split():
        arch, _, extra = item.partition("+")
        names.append(f"sm_{arch}")
        flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        if extra == "ptx":
            names.append(f"compute_{arch}")
            flags.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
    return " ".join(names), flags


class BuildWheel(bdist_wheel):
    """The library is loaded with ctypes: one wheel serves every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    packages=["shoal", *(f"shoal.{name}" for name in find_packages("src"))],
    ext_modules=[
        Extension(LIBRARY, [str(path) for path in sorted(SOURCES.glob("*.cpp"))], optional=True),
        *(
            Extension(name, [str(path) for path in sorted(CUDA_SOURCES.glob("*.cu"))], optional=True)
            for name in (CUDA_LIBRARY, EMULATED_LIBRARY)
        ),
    ],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": BuildWheel},
)
