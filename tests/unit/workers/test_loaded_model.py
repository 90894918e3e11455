"""A model on a device whose memory does not suffice: what is said, and what fits where it does."""

import gc
import json
from pathlib import Path
from typing import Any

import emulated
import pytest
import torch
from safetensors.torch import save_file

from shoal.config import Settings
from shoal.cuda_ext.cuda_binding import CudaLibrary
from shoal.cuda_ext.cuda_device import CudaDevice
from shoal.errors import StartError
from shoal.messages import Allocate
from shoal.workers.loaded_model import LoadedModel, load_model

HEAD_DIM = 16
BLOCK_BYTES = 2 * 2 * 2 * 16 * HEAD_DIM * 2
"""Keys and values, layers, heads, positions, elements of two bytes."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path, HEAD_DIM)


def write_model(folder: Path, head_dim: int) -> Path:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {"model.norm.weight": (64,), "model.embed_tokens.weight": (300, 64), "lm_head.weight": (300, 64)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        tensors |= {f"{prefix}{name}.weight": (64,) for name in ("input_layernorm", "post_attention_layernorm")}
        for name, heads in (("q", 4), ("k", 2), ("v", 2)):
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = (heads * head_dim, 64)
        tensors[f"{prefix}self_attn.o_proj.weight"] = (64, 4 * head_dim)
        tensors |= {f"{prefix}mlp.{name}_proj.weight": (96, 64) for name in ("gate", "up")}
        tensors[f"{prefix}mlp.down_proj.weight"] = (64, 96)
    save_file(
        {name: torch.ones(shape).bfloat16() for name, shape in tensors.items()}, folder / "model.safetensors"
    )
    return folder


def load(folder: Path, **changes: Any) -> tuple[CudaDevice, LoadedModel]:
    base = {"instance_num": 4, "session_len": 64, "max_prefill_token_num": 32, "device": "cuda"}
    settings = Settings(model=str(folder), model_name="m", run_dir="/r", **(base | changes))
    device = CudaDevice(CudaLibrary(emulated.build()))
    return device, load_model(settings, 0, device, lambda done, total: None)


def test_blocks_are_counted_from_what_is_free_when_all_else_is_there(folder: Path) -> None:
    device, model = load(folder, cache_max_entry_count=0.25)
    free = device.free_bytes()
    assert model.count_blocks() == int(0.25 * free) // BLOCK_BYTES - 1
    model.make_runner(Allocate(1, model.count_blocks(), ""), None)
    assert free - device.free_bytes() == (model.count_blocks() + 1) * BLOCK_BYTES
    model.free_cache()


def test_a_model_that_is_given_up_leaves_nothing(folder: Path) -> None:
    gc.collect()
    before = CudaDevice(CudaLibrary(emulated.build())).free_bytes()
    device, model = load(folder)
    runner = model.make_runner(Allocate(1, 40, ""), None)
    assert device.free_bytes() < before - 400_000
    runner.close()
    del runner
    model.free_cache()
    del model
    gc.collect()
    assert device.free_bytes() == before


def test_weights_are_on_the_device_alone(folder: Path) -> None:
    before = CudaDevice(CudaLibrary(emulated.build())).free_bytes()
    device, model = load(folder, quantization="w8")
    assert 80_000 < model.weight_bytes < before - device.free_bytes()


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        (100_000, r"the weights do not fit GPU 0 of 0.0 GiB .*out of memory.*: take --quantization w4 or w8"),
        (240_000, r"GPU 0 has no room for a step .*out of memory.*: lower --instance_num, --session_len or"),
    ],
)
def test_what_to_change_where_memory_does_not_suffice(
    folder: Path, monkeypatch: pytest.MonkeyPatch, memory: int, said: str
) -> None:
    monkeypatch.setenv("SHOAL_EMULATED_MEMORY", str(memory))
    with pytest.raises(StartError, match=said):
        load(folder)[1].count_blocks()


def test_too_few_blocks_for_one_sequence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device, model = load(folder)
    used = device.total_bytes() - device.free_bytes()
    del device, model
    monkeypatch.setenv("SHOAL_EMULATED_MEMORY", str(used + 4 * BLOCK_BYTES))
    said = r"one sequence of --session_len 64 tokens needs 5 KV blocks .*only 3 fit.* raise --cache_max_entry_count"
    with pytest.raises(StartError, match=said):
        load(folder)[1].count_blocks()


def test_a_cache_that_does_not_fit_any_more(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Because somebody else has taken the memory meanwhile."""
    _, model = load(folder)
    blocks = model.count_blocks()
    monkeypatch.setenv("SHOAL_EMULATED_MEMORY", "400000")
    with pytest.raises(
        StartError, match=rf"no memory for {blocks} KV blocks .*: lower --cache_max_entry_count"
    ):
        model.make_runner(Allocate(1, blocks, ""), None)


def test_heads_without_kernels(tmp_path: Path) -> None:
    _, model = load(write_model(tmp_path, 20), cache_max_entry_count=0.01)
    with pytest.raises(StartError, match=r"no CUDA kernel for these sizes .*heads of 20.* or --device cpu"):
        model.make_runner(Allocate(1, 40, ""), None)
