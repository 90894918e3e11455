"""Folders of random weights in the shapes of real models, for a server's throughput where nothing can be fetched."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers

_LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN_HALF_B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES: dict[str, dict[str, Any]] = {"qwen2.5-0.5b-shape": _QWEN_HALF_B, "llama-3-8b-shape": _LLAMA_8B}
_TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
_RANDOM = 1 << 22
"""Different numbers; a matrix repeats them."""


def write_model(name: str, to: Path, *, tiny: bool, layers: int = 0) -> Path:
    """The folder, a shard a layer; about 2 bytes a weight. layers: as many as there are, where 0."""
    config = SHAPES[name] | (_TINY if tiny else {}) | ({"num_hidden_layers": layers} if layers else {})
    folder = to / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    _write_tokenizer(folder, config["vocab_size"])
    numbers = torch.randn(_RANDOM, generator=torch.Generator().manual_seed(1)).bfloat16() * 0.02
    index: dict[str, str] = {}
    for shard, shapes in enumerate(_shards(config)):
        file = f"model-{shard:05}.safetensors"
        tensors = {tensor: _filled(shape, numbers) for tensor, shape in shapes.items()}
        save_file(tensors, folder / file)
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def _shards(config: dict[str, Any]) -> Iterator[dict[str, tuple[int, ...]]]:
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    dim = hidden // config["num_attention_heads"]
    heads = dict.fromkeys("kv", config["num_key_value_heads"] * dim) | {"q": hidden}
    table = (config["vocab_size"], hidden)
    outer: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table, "model.norm.weight": (hidden,)}
    yield outer if config["tie_word_embeddings"] else outer | {"lm_head.weight": table}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes: dict[str, tuple[int, ...]] = {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}self_attn.o_proj.weight": (hidden, hidden),
            f"{prefix}mlp.gate_proj.weight": (ffn, hidden),
            f"{prefix}mlp.up_proj.weight": (ffn, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, ffn),
        }
        for name, rows in heads.items():
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, hidden)
            if config["model_type"] == "qwen2":
                shapes[f"{prefix}self_attn.{name}_proj.bias"] = (rows,)
        yield shapes


def _filled(shape: tuple[int, ...], numbers: torch.Tensor) -> torch.Tensor:
    size = torch.Size(shape).numel()
    return numbers.repeat(-(-size // len(numbers)))[:size].view(shape)


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Every byte, then words that no text has."""
    vocab = {piece: number for number, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {f"w{number}": number for number in range(len(vocab), vocab_size)}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.save(str(folder / "tokenizer.json"))
