"""llama.cpp, whose whole source travels in the sdist of llama-cpp-python."""

import shutil
import sys
import tarfile
from pathlib import Path

from peers.progress import carry_out, say
from peers.serving import Server

_SDIST = "llama-cpp-python==0.3.36"
_TARGETS = ("llama-server", "llama-bench", "llama-batched-bench", "llama-quantize", "llama-perplexity")
_CONTEXT_TOKENS = 1024


def programs(cache: Path) -> Path:
    """The folder of llama.cpp's programs, built under ``cache`` the first time: some ten minutes on two cores."""
    folder = cache / "llama" / "bin"
    if not all((folder / target).exists() for target in _TARGETS):
        _build(cache)
    return folder


def _build(cache: Path) -> None:
    say(f"building llama.cpp of {_SDIST} under {cache}, once")
    log = cache / "llama.log"
    sources = cache / "sdist"
    if not _vendored(sources):
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
        carry_out([*pip, "-d", sources, _SDIST], log)
        with tarfile.open(next(sources.glob("*.tar.gz"))) as archive:
            archive.extractall(sources, filter="data")
        _keep_tile_config(_vendored(sources)[0])
    cmake, ninja = _tool("cmake", cache, log), _tool("ninja", cache, log)
    build = cache / "llama"
    options = ["CMAKE_BUILD_TYPE=Release", "GGML_NATIVE=ON", "LLAMA_CURL=OFF", "BUILD_SHARED_LIBS=OFF"]
    options.append(f"CMAKE_MAKE_PROGRAM={ninja}")
    flags = [f"-D{option}" for option in options]
    carry_out([cmake, "-G", "Ninja", "-S", _vendored(sources)[0], "-B", build, *flags], log)
    carry_out([cmake, "--build", build, "--target", *_TARGETS], log)


def _keep_tile_config(source: Path) -> None:
    """Without this gcc 12 and older leave the configuration's stores out, and every model crashes where AMX is.

    Their ``_tile_loadconfig`` names eight bytes of it as read (llama.cpp's pull request 26954).
    """
    file = source / "ggml/src/ggml-cpu/amx/mmq.cpp"
    load = "    _tile_loadconfig(&tc);\n"
    barrier = '    __asm__ volatile("" : : "r"(&tc) : "memory");\n'
    text = file.read_text()
    if load in text and barrier not in text:
        file.write_text(text.replace(load, barrier + load))


def _vendored(sources: Path) -> list[Path]:
    return [file.parent for file in sources.glob("*/vendor/llama.cpp/CMakeLists.txt")]


def _tool(name: str, cache: Path, log: Path) -> str:
    """cmake or ninja: the machine's, or else from its package in an environment of its own."""
    found = shutil.which(name)
    if found:
        return found
    environment = cache / "tools"
    if not (environment / "bin" / name).exists():
        carry_out([sys.executable, "-m", "venv", environment], log)
        carry_out([environment / "bin" / "pip", "install", "-q", "cmake", "ninja"], log)
    return str(environment / "bin" / name)


def server(folder: Path, model: Path, threads: int, slots: int) -> Server:
    """Without the cache of prompts in host memory: no two prompts are alike, and filling it takes time."""

    def command(port: int) -> list[str]:
        words = [folder / "llama-server", "-m", model, "-t", threads, "-np", slots]
        words += ["-c", slots * _CONTEXT_TOKENS, "--cache-ram", 0, "--no-webui"]
        return [str(word) for word in [*words, "--host", "127.0.0.1", "--port", port]]

    return Server("llama-server", command)
