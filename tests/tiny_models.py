"""Tiny random checkpoints of every family, made with Hugging Face transformers, which also says what is right.

transformers has no class for InternLM 1 and 2, and builds InternLM 3 from its Llama. InternLM 1 is its Llama with
attention biases; InternLM 2 its Llama whose q, k and v are stacked here, group by group, into ``wqkv``.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

LENGTH = 59
SHAPE = {
    "vocab_size": 203,
    "hidden_size": 84,
    "intermediate_size": 101,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 22,
    "max_position_embeddings": 17,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 6.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 17,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 5.0,
    "original_max_position_embeddings": 17,
    "beta_fast": 1.7,
    "beta_slow": 0.05,
}
YARN_SCALES = YARN_ROPE | {"mscale": 0.8, "mscale_all_dim": 0.3, "truncate": False}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0}
GEMMA_ROPE = {
    "full_attention": LINEAR_ROPE | {"rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
GEMMA = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 9,
    "query_pre_attn_scalar": 31,
    "rope_parameters": GEMMA_ROPE,
    "tie_word_embeddings": True,
}
QWEN2_WINDOW = {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1}
SQUARE = {"head_dim": 14}
"""InternLM 1 and 2 divide the hidden size by the heads."""


@dataclass(frozen=True)
class Family:
    """A configuration of transformers, and how the folder it saves is turned into the family's own."""

    config_class: str
    config: dict[str, Any]
    rewrite: Callable[[Path], None] = lambda folder: None


def rewrite_as_internlm(folder: Path) -> None:
    kept = config_fields(folder, "num_key_value_heads")
    rotary = {"base": 10000, "type": "dynamic", "scaling_factor": 3.0}
    write_config(
        folder,
        kept
        | {"model_type": "internlm", "architectures": ["InternLMForCausalLM"], "bias": True, "rotary": rotary},
    )


def rewrite_as_internlm2(folder: Path) -> None:
    scaling = {"type": "dynamic", "factor": 3.0}
    write_config(
        folder,
        config_fields(folder)
        | {
            "model_type": "internlm2",
            "architectures": ["InternLM2ForCausalLM"],
            "bias": False,
            "rope_theta": 10000.0,
            "rope_scaling": scaling,
        },
    )
    renamed = {
        "embed_tokens": "tok_embeddings",
        "lm_head": "output",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
    }
    tensors = load_file(folder / "model.safetensors")
    for layer in range(3):
        prefix = f"model.layers.{layer}."
        q, k, v = (tensors.pop(f"{prefix}self_attn.{name}_proj.weight") for name in "qkv")
        groups = [
            torch.cat((q[42 * g : 42 * g + 42], k[14 * g : 14 * g + 14], v[14 * g : 14 * g + 14]))
            for g in (0, 1)
        ]
        tensors[f"{prefix}attention.wqkv.weight"] = torch.cat(groups)
    for old, new in renamed.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")


def config_fields(folder: Path, *without: str) -> dict[str, Any]:
    """The shape alone, as the old configuration classes wrote it."""
    return {name: value for name, value in (SHAPE | SQUARE).items() if name not in {*without, "head_dim"}}


def write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))


FAMILIES = {
    "llama2": Family("LlamaConfig", {}),
    "llama2-tied-linear": Family("LlamaConfig", {"rope_parameters": LINEAR_ROPE, "tie_word_embeddings": True}),
    "llama3.1": Family("LlamaConfig", {"rope_parameters": LLAMA3_ROPE}),
    "llama-biased-dynamic": Family(
        "LlamaConfig", {"rope_parameters": DYNAMIC_ROPE, "attention_bias": True, "mlp_bias": True}
    ),
    "mistral": Family("MistralConfig", {"sliding_window": 13}),
    "qwen2": Family("Qwen2Config", QWEN2_WINDOW | SQUARE),
    "qwen2-yarn": Family("Qwen2Config", SQUARE | {"rope_parameters": YARN_ROPE}),
    "qwen3": Family("Qwen3Config", {}),
    "qwen3-yarn": Family("Qwen3Config", {"rope_parameters": YARN_SCALES}),
    "internlm": Family(
        "LlamaConfig",
        SQUARE | {"num_key_value_heads": 6, "attention_bias": True, "rope_parameters": DYNAMIC_ROPE},
        rewrite_as_internlm,
    ),
    "internlm2": Family("LlamaConfig", SQUARE | {"rope_parameters": DYNAMIC_ROPE}, rewrite_as_internlm2),
    "internlm3": Family("InternLM3Config", {"qkv_bias": True, "bias": True, "rope_parameters": DYNAMIC_ROPE}),
    "internlm3-unbiased": Family("InternLM3Config", {}),
    "gemma3": Family("Gemma3TextConfig", GEMMA),
    "gemma3-capped": Family("Gemma3TextConfig", GEMMA | {"final_logit_softcapping": 4.0}),
}


def random_model(family: Family) -> Any:
    """Every parameter random, the norms' and biases' too, and the logits wide enough that none goes unnoticed."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")  # noqa: T201
    config = getattr(transformers, family.config_class)(**SHAPE | family.config)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.4
            centre = 1.0 if "norm" in name and "Gemma" not in family.config_class else 0.0
            scale = 1.6 if "_proj" in name or "head" in name or "embed" in name else 1.0
            parameter.copy_(centre + scale * spread * torch.randn(parameter.shape, generator=generator))
    return model


def random_ids(length: int) -> list[int]:
    return [random.randrange(SHAPE["vocab_size"]) for _ in range(length)]


@torch.inference_mode()
def reference_states(model: Any, ids: list[int]) -> Tensor:
    """[positions, hidden], after the final norm."""
    states: Tensor = model.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    return states


@torch.inference_mode()
def reference_logits(model: Any, ids: list[int]) -> Tensor:
    """[positions, vocabulary]. The longest prompt comes first: it settles the base of dynamic rope."""
    logits: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits
