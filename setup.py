"""Package list of the ``src`` → ``shoal`` mapping, and the build of the CPU library: plain C++ behind a C
interface, compiled once for each level of instructions that it picks from at run time. The rest of the
metadata is in setup.cfg."""

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

SOURCES = Path("src/cuda_ext/csrc/cpu")
INTERFACE = SOURCES / "shoal_cpu.h"
LIBRARY = "shoal.cuda_ext.libshoal_cpu"

FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden"]
FLAGS += ["-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized"]
SANITIZED = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
LINKING = ["-shared", "-pthread", "-static-libgcc", "-static-libstdc++"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
LEVELS = {"Scalar": []}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS |= {"Avx2": AVX2, "Avx512": AVX512, "Avx512Vnni": [*AVX512, "-mavx512vnni"]}
AMX = [*LEVELS["Avx512Vnni"], "-mamx-tile", "-mamx-int8"] if "Avx512Vnni" in LEVELS else []


def run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except OSError as error:
        raise CompileError(f"{command[0]}: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        raise CompileError(f"{' '.join(command)}\n{error.stderr}") from error


class BuildLibrary(build_ext):
    """Runs g++ (or $CXX). Without it the install goes on, and the operators run on their torch twins.

    ``--sanitize=address,undefined`` builds a library for tests that stops at the first such error.
    """

    user_options: ClassVar = [
        *build_ext.user_options,
        ("sanitize=", None, "the errors that -fsanitize looks for"),
    ]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.sanitize = ""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        newest = max(path.stat().st_mtime for path in (*SOURCES.iterdir(), Path(__file__)))
        if not self.force and target.exists() and target.stat().st_mtime > newest:
            return
        compiler = os.environ.get("CXX", "g++")
        try:
            self.build_library(compiler, target)
        except CompileError:
            if not self.inplace:
                target.unlink(missing_ok=True)  # of older sources: no wheel is to carry it
            raise
        sys.stdout.write(f"built {target.name} ({', '.join(LEVELS)}) with {compiler}; no CUDA library\n")

    def build_library(self, compiler: str, target: Path) -> None:
        if shutil.which(compiler) is None:
            raise CompileError(f"no {compiler}: the operators will run on torch alone, slower")
        objects = Path(self.build_temp) / "cpu"
        objects.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        amx = AMX if self.knows(compiler, AMX) else []
        interface = f"-DSHOAL_INTERFACE={zlib.crc32(INTERFACE.read_bytes())}u"
        jobs = [
            (SOURCES / "level.cpp", objects / f"level_{name}.o", [*flags, f"-DSHOAL_LEVEL=k{name}"])
            for name, flags in LEVELS.items()
        ] + [
            (path, objects / f"{path.stem}.o", [interface, *(amx if path.stem.endswith("_amx") else [])])
            for path in sorted(SOURCES.glob("*.cpp"))
            if path.name != "level.cpp"
        ]
        checks = [*SANITIZED, f"-fsanitize={self.sanitize}"] if self.sanitize else []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda job: self.compile(compiler, *job, checks), jobs))
        fresh = target.with_suffix(".new")
        run(compiler, *LINKING, *checks, "-o", str(fresh), *(str(job[1]) for job in jobs))
        fresh.replace(target)

    def knows(self, compiler: str, flags: list[str]) -> bool:
        """Older ones lack the newest instructions."""
        command = [compiler, *flags, "-E", "-x", "c++", os.devnull]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0

    def compile(self, compiler: str, source: Path, to: Path, flags: list[str], checks: list[str]) -> None:
        run(compiler, *FLAGS, *WARNINGS, *flags, *checks, "-c", str(source), "-o", str(to))


class BuildWheel(bdist_wheel):
    """The library is loaded with ctypes: one wheel serves every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    packages=["shoal", *(f"shoal.{name}" for name in find_packages("src"))],
    ext_modules=[Extension(LIBRARY, [str(path) for path in sorted(SOURCES.glob("*.cpp"))], optional=True)],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": BuildWheel},
)
