"""llama.cpp as a teacher: a small program of ours, linked to the libraries that a build of it left behind."""

import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from peers.progress import carry_out, say
from torch import Tensor

from forcing.teacher import ROWS

_SOURCE = Path(__file__).with_name("logits.cpp")
_LIBRARIES = ("src/libllama.a", "ggml/src/libggml.a", "ggml/src/libggml-cpu.a", "ggml/src/libggml-base.a")
_HOME = "CMAKE_HOME_DIRECTORY:INTERNAL="


def compiled(programs: Path, cache: Path) -> Path:
    """The program, given the folder of llama.cpp's own."""
    build, program = programs.parent, cache / "llama-logits"
    libraries = [build / name for name in _LIBRARIES]
    inputs = [_SOURCE, *libraries]
    if program.exists() and program.stat().st_mtime > max(file.stat().st_mtime for file in inputs):
        return program
    lines = (build / "CMakeCache.txt").read_text().splitlines()
    source = Path(next(line for line in lines if line.startswith(_HOME)).removeprefix(_HOME))
    includes = [f"-I{source / folder}" for folder in ("include", "ggml/include")]
    flags: list[str] = ["-std=c++17", "-O2", "-fopenmp", "-pthread", *includes]
    group: list[str | Path] = ["-Wl,--start-group", *libraries, "-Wl,--end-group", "-ldl"]
    carry_out(["g++", *flags, _SOURCE, *group, "-o", program], cache / "llama-logits.log")
    return program


def requantised(programs: Path, gguf: Path, kind: str, cache: Path) -> Path:
    """The same weights, dequantised and, unless ``kind`` is F32, quantised anew by llama-quantize. Made once."""
    path = cache / f"{gguf.stem}-as-{kind}.gguf"
    if not path.exists():
        say(f"making {path.name}, once")
        partial = path.with_suffix(".partial")
        quantise: list[str | Path] = [programs / "llama-quantize", "--allow-requantize", gguf, partial, kind]
        carry_out(quantise, path.with_suffix(".log"))
        partial.rename(path)
    return path


class Llama:
    """One file with one kind of cache, in a process that lives until ``close``."""

    def __init__(self, program: Path, name: str, gguf: Path, cache: str, threads: int, length: int) -> None:
        self.name = f"llama.cpp, {name}"
        self.cache = cache
        # Threads that wait actively would take the cores from the other teachers.
        self._process = subprocess.Popen(
            [program, gguf, str(threads), cache, str(length)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_WAIT_POLICY": "passive"},
        )
        (self._vocabulary,) = struct.unpack("=i", self._read(4))

    def logits(self, ids: list[int]) -> Iterator[Tensor]:
        """See ``Teacher``."""
        assert self._process.stdin is not None
        self._process.stdin.write(np.array([len(ids), *ids], np.int32).tobytes())
        self._process.stdin.flush()
        for at in range(0, len(ids), ROWS):
            rows = min(ROWS, len(ids) - at)
            values = np.frombuffer(self._read(4 * rows * self._vocabulary), np.float32).copy()
            yield torch.from_numpy(values).view(rows, self._vocabulary)

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()

    def _read(self, count: int) -> bytes:
        assert self._process.stdout is not None
        content = self._process.stdout.read(count)
        if len(content) != count:
            raise RuntimeError(f"{self.name} ended early with {self._process.wait()}")
        return content
