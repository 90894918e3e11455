"""config.json of every family, as published and as transformers writes it, and the ways in which one can be wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from shoal.checkpoint.description import ModelDescription, Rope
from shoal.checkpoint.hf_config import describe_folder
from shoal.errors import ModelError

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 6, "vocab_size": 300, "max_position_embeddings": 512,
}  # fmt: skip


def small(family: str, **fields: object) -> dict[str, object]:
    """A small config of a family; fields that are ... are left away."""
    config = {"model_type": family, **SMALL, **fields}
    return {name: value for name, value in config.items() if value is not ...}


def described(folder: Path, config: object, generation: object = None) -> ModelDescription:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return describe_folder(folder)


def test_llama_3_1_as_published(tmp_path: Path) -> None:
    model = described(tmp_path, LLAMA, {"eos_token_id": [128001, 128008, 128009]})
    assert model == ModelDescription(
        family="llama",
        vocab_size=128256,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        ffn_size=14336,
        max_position=131072,
        norm_eps=1e-5,
        rope=Rope(
            theta=500000.0,
            dim=128,
            scaling="llama3",
            factor=8.0,
            original_max_position=8192,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
        ),
        layer_windows=(0,) * 32,
        attention_scale=128**-0.5,
        bos_id=128000,
        eos_ids=(128001, 128008, 128009),
    )


def test_gemma_3_4b_as_published(tmp_path: Path) -> None:
    """Its config leaves most of the text model to the class's defaults."""
    text = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "text_config": text,
        "vision_config": {"hidden_size": 1152},
    }
    model = described(tmp_path, config)
    assert model.family == "gemma3"
    assert (model.vocab_size, model.num_heads, model.num_kv_heads, model.head_dim) == (262208, 8, 4, 256)
    assert model.max_position == 131072
    assert model.layer_windows == tuple(0 if layer % 6 == 5 else 1024 for layer in range(34))
    assert (model.rope.theta, model.rope.scaling, model.rope.factor) == (1e6, "linear", 8.0)
    assert model.local_rope == Rope(theta=10000.0, dim=256)
    assert (model.bos_id, model.eos_ids) == (2, (1, 106))
    assert model.embedding_scale == 2560**0.5
    assert model.attention_scale == 256**-0.5
    assert model.norm_weight_offset == 1.0
    assert model.tied_head
    assert model.post_norms
    assert model.qk_norm
    assert model.activation == "gelu_tanh"


FAMILIES: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "llama 2, old": (
        small("llama", num_key_value_heads=..., rope_scaling=None),
        {"num_kv_heads": 4, "rope": Rope(dim=16), "max_position": 512, "eos_ids": (2,), "bos_id": 1},
    ),
    "llama, biases": (
        small("llama", attention_bias=True, mlp_bias=True, head_dim=32, tie_word_embeddings=True),
        {"qkv_bias": True, "output_bias": True, "ffn_bias": True, "head_dim": 32, "tied_head": True},
    ),
    "llama, linear": (
        small("llama", rope_scaling={"type": "linear", "factor": 4}),
        {"rope": Rope(dim=16, scaling="linear", factor=4.0, original_max_position=512), "max_position": 2048},
    ),
    "llama, dynamic": (
        small("llama", rope_scaling={"type": "dynamic", "factor": 2.0}, rope_theta=1e6),
        {
            "rope": Rope(theta=1e6, dim=16, scaling="dynamic", factor=2.0, original_max_position=512),
            "max_position": 1024,
        },
    ),
    "mistral 0.1": (
        small("mistral", sliding_window=128, num_key_value_heads=...) | {"num_attention_heads": 8},
        {"layer_windows": (128,) * 6, "num_kv_heads": 8, "qkv_bias": False},
    ),
    "mistral 0.3": (small("mistral", sliding_window=None), {"layer_windows": (0,) * 6}),
    "mistral, silent": (small("mistral"), {"layer_windows": (4096,) * 6}),
    "qwen 2.5": (
        small("qwen2", use_sliding_window=False, sliding_window=100, max_window_layers=3, rope_theta=1e6),
        {"qkv_bias": True, "output_bias": False, "layer_windows": (0,) * 6, "eos_ids": (), "bos_id": None},
    ),
    "qwen 2, windows": (
        small("qwen2", use_sliding_window=True, sliding_window=100, max_window_layers=4),
        {"layer_windows": (0, 0, 0, 0, 100, 100)},
    ),
    "qwen 2.5, yarn": (
        small("qwen2", rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}),
        {"rope": Rope(dim=16, scaling="yarn", factor=4.0, original_max_position=256), "max_position": 1024},
    ),
    "qwen 3": (
        small("qwen3", head_dim=..., attention_bias=False),
        {"qk_norm": True, "head_dim": 128, "attention_scale": 128**-0.5, "qkv_bias": False},
    ),
    "qwen 3, layer types": (
        small(
            "qwen3",
            use_sliding_window=True,
            sliding_window=9,
            layer_types=["full_attention", "sliding_attention"] * 3,
        ),
        {"layer_windows": (0, 9, 0, 9, 0, 9)},
    ),
    "internlm": (
        small("internlm", bias=True, num_key_value_heads=..., rotary={"base": 10000, "type": "origin"}),
        {"qkv_bias": True, "output_bias": True, "ffn_bias": False, "rope": Rope(dim=16), "num_kv_heads": 4},
    ),
    "internlm, silent": (
        small("internlm", num_key_value_heads=...),
        {"qkv_bias": True, "rope": Rope(dim=16, scaling="dynamic", original_max_position=512), "max_position": 512},
    ),
    "internlm, dynamic": (
        small("internlm", rotary={"base": 5000, "type": "dynamic", "scaling_factor": 3.0}),
        {
            "rope": Rope(theta=5000.0, dim=16, scaling="dynamic", factor=3.0, original_max_position=512),
            "max_position": 1536,
        },
    ),
    "internlm 2.5": (
        small("internlm2", bias=False, rope_theta=1000000, rope_scaling={"type": "dynamic", "factor": 2.0}),
        {"qkv_bias": False, "output_bias": False, "max_position": 1024},
    ),
    "internlm 2, silent": (small("internlm2"), {"qkv_bias": True, "output_bias": True, "ffn_bias": False}),
    "internlm 3": (
        small("internlm3", qkv_bias=True, head_dim=16, rope_scaling={"rope_type": "dynamic", "factor": 6.0}),
        {"qkv_bias": True, "output_bias": False, "ffn_bias": False, "max_position": 3072},
    ),
    "internlm 3, transformers' names": (
        small("internlm3", architectures=["LlamaForCausalLM"], attention_bias=True, mlp_bias=True),
        {"family": "internlm3", "qkv_bias": True, "output_bias": True, "ffn_bias": True, "head_dim": 128},
    ),
    "gemma 3, pattern": (
        small("gemma3_text", head_dim=32, sliding_window=7, sliding_window_pattern=3, query_pre_attn_scalar=64),
        {"layer_windows": (7, 7, 0, 7, 7, 0), "attention_scale": 0.125, "embedding_scale": 8.0, "tied_head": True},
    ),
    "gemma 3, old rope": (
        small("gemma3_text", rope_theta=500.0, rope_local_base_freq=50, final_logit_softcapping=30.0),
        {"rope": Rope(theta=500.0, dim=256), "local_rope": Rope(theta=50.0, dim=256), "logit_soft_cap": 30.0},
    ),
    "gemma 3, new rope": (
        small(
            "gemma3_text",
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 700.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
            },
        ),
        {
            "rope": Rope(theta=700.0, dim=256, scaling="linear", factor=8.0, original_max_position=512),
            "local_rope": Rope(theta=70.0, dim=256),
            "max_position": 512,
        },
    ),
    "new rope": (
        small(
            "llama",
            rope_parameters={
                "rope_type": "yarn", "factor": 2.0, "rope_theta": 99.0, "beta_fast": 16, "beta_slow": 2,
                "attention_factor": 1.5, "mscale": 0.5, "mscale_all_dim": 0.25, "truncate": False,
            },
        ),
        {
            "rope": Rope(
                theta=99.0, dim=16, scaling="yarn", factor=2.0, original_max_position=512, beta_fast=16.0,
                beta_slow=2.0, attention_factor=1.5, mscale=0.5, mscale_all_dim=0.25, truncate=False,
            ),
            "max_position": 1024,
        },
    ),
    "yarn, factor by the lengths": (
        small("llama", rope_scaling={"type": "yarn", "factor": None, "original_max_position_embeddings": 128}),
        {"rope": Rope(dim=16, scaling="yarn", factor=4.0, original_max_position=128), "max_position": 512},
    ),
    "eos list, null bos": (
        small("llama", eos_token_id=[7, 9, 7], bos_token_id=None),
        {"eos_ids": (7, 9), "bos_id": None},
    ),
    "auto_map is ignored": (
        small("internlm2", auto_map={"AutoModel": "evil.Model"}, architectures=["InternLM2ForCausalLM"]),
        {"family": "internlm2"},
    ),
    "no model_type": (small("llama", model_type=..., architectures=["Qwen2ForCausalLM"]), {"family": "qwen2"}),
}  # fmt: skip


@pytest.mark.parametrize("case", FAMILIES)
def test_families(case: str, tmp_path: Path) -> None:
    config, expected = FAMILIES[case]
    model = described(tmp_path, config)
    assert {name: getattr(model, name) for name in expected} == expected
    assert len(model.layer_windows) == model.num_layers


def test_the_generation_config_decides_where_to_stop(tmp_path: Path) -> None:
    assert described(tmp_path, small("llama", eos_token_id=5), {"eos_token_id": 6}).eos_ids == (6,)
    assert described(tmp_path, small("llama", eos_token_id=5), {"temperature": 0.5}).eos_ids == (5,)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "InternLM3", "Gemma3Text"])
def test_what_transformers_writes(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config: Any = getattr(transformers, f"{family}Config")(**SMALL)
    config.save_pretrained(tmp_path)
    model = describe_folder(tmp_path)
    heads = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    assert model.head_dim == heads
    assert model.num_kv_heads == config.num_key_value_heads
    assert model.max_position == config.max_position_embeddings
    assert model.norm_eps == config.rms_norm_eps
    assert model.rope == Rope(theta=rope["rope_theta"], dim=heads)
    assert model.tied_head == config.tie_word_embeddings
    assert model.bos_id == config.bos_token_id
    assert model.eos_ids == (() if config.eos_token_id is None else (config.eos_token_id,))
    types = (
        getattr(config, "layer_types", None)
        or ["full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"]
        * config.num_hidden_layers
    )
    window = getattr(config, "sliding_window", None)
    assert model.layer_windows == tuple(0 if kind == "full_attention" else window for kind in types)


BAD_CONFIGS = {
    "unknown architecture": (small("llama", architectures=["FalconForCausalLM"]), "architectures"),
    "no language model": (small("llama", architectures=["LlamaForSequenceClassification"]), "architectures"),
    "unknown type": (small("falcon"), "model_type is 'falcon'"),
    "mixture of experts": (small("qwen3_moe"), "model_type"),
    "nothing named": (small("llama", model_type=...), "model_type"),
    "type of the type": (small("llama", model_type=3), "model_type is 3"),
    "architectures a string": (small("llama", architectures="LlamaForCausalLM"), "architectures"),
    "no hidden size": (small("llama", hidden_size=...), "hidden_size is missing"),
    "no layers": (small("llama", num_hidden_layers=...), "num_hidden_layers is missing"),
    "no vocabulary": (small("llama", vocab_size=None), "vocab_size is missing"),
    "size a string": (small("llama", hidden_size="64"), "hidden_size is '64'"),
    "size true": (small("llama", hidden_size=True), "hidden_size is True"),
    "size a fraction": (small("llama", intermediate_size=96.5), "intermediate_size is 96.5"),
    "size a list": (small("llama", intermediate_size=[96] * 99), "intermediate_size is [96, 96"),
    "zero heads": (small("llama", num_attention_heads=0), "num_attention_heads is 0"),
    "negative layers": (small("llama", num_hidden_layers=-1), "num_hidden_layers is -1"),
    "huge layers": (small("llama", num_hidden_layers=10**12), "num_hidden_layers"),
    "huge vocabulary": (small("llama", vocab_size=10**30), "vocab_size"),
    "heads and KV heads": (small("llama", num_key_value_heads=3), "num_key_value_heads is 3"),
    "more KV heads than heads": (small("llama", num_key_value_heads=8), "num_key_value_heads is 8"),
    "heads and size": (small("llama", num_attention_heads=6, num_key_value_heads=2), "hidden_size is 64"),
    "odd head": (small("llama", head_dim=15), "head_dim comes to 15"),
    "tiny head": (small("llama", num_attention_heads=32), "head_dim comes to 2"),
    "huge head": (small("llama", head_dim=10**6), "head_dim is 1000000"),
    "epsilon": (small("llama", rms_norm_eps=-1.0), "rms_norm_eps is -1.0"),
    "epsilon a string": (small("llama", rms_norm_eps="1e-5"), "rms_norm_eps is '1e-5'"),
    "length": (small("llama", max_position_embeddings=0), "max_position_embeddings is 0"),
    "activation": (small("llama", hidden_act="relu"), "hidden_act is 'relu'"),
    "gemma's activation": (small("gemma3_text", hidden_activation="silu"), "hidden_activation"),
    "bias": (small("llama", attention_bias="yes"), "attention_bias is 'yes'"),
    "tied": (small("llama", tie_word_embeddings=1), "tie_word_embeddings is 1"),
    "theta": (small("llama", rope_theta=0), "rope_theta is 0"),
    "rope a string": (small("llama", rope_scaling="yarn"), "rope_scaling is 'yarn'"),
    "longrope": (small("llama", rope_scaling={"type": "longrope", "factor": 2.0}), "longrope"),
    "su": (
        small("llama", rope_scaling={"rope_type": "su", "short_factor": []}),
        "rope_scaling.rope_type is 'su'",
    ),
    "mrope": (small("qwen2", rope_scaling={"type": "mrope", "mrope_section": [1]}), "mrope"),
    "no factor": (small("llama", rope_scaling={"type": "linear"}), "rope_scaling.factor is missing"),
    "factor 0": (small("llama", rope_scaling={"type": "dynamic", "factor": 0}), "rope_scaling.factor is 0"),
    "factor a string": (small("llama", rope_scaling={"type": "linear", "factor": "2"}), "rope_scaling.factor"),
    "llama3 without bounds": (
        small("llama", rope_scaling={"rope_type": "llama3", "factor": 8.0}),
        "rope_scaling.low_freq_factor is missing",
    ),
    "llama3 with equal bounds": (
        small(
            "llama",
            rope_scaling={"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4},
        ),
        "rope_scaling.high_freq_factor",
    ),
    "yarn with crossed betas": (
        small("llama", rope_parameters={"rope_type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 2}),
        "rope_parameters.beta_fast",
    ),
    "partial rotation": (
        small("llama", rope_parameters={"partial_rotary_factor": 0.5}),
        "partial_rotary_factor",
    ),
    "nested rope": (
        small("gemma3_text", rope_parameters={"full_attention": {"rope_type": "longrope"}}),
        "rope_parameters.full_attention.rope_type",
    ),
    "internlm's rotary": (small("internlm", rotary={"type": "polar"}), "rotary.type"),
    "layer types' count": (small("qwen3", layer_types=["full_attention"] * 5), "layer_types has 5"),
    "layer types' names": (
        small("qwen3", layer_types=["linear_attention"] * 6),
        "layer_types has 'linear_attention'",
    ),
    "sliding without a window": (
        small("qwen3", layer_types=["sliding_attention"] * 6, use_sliding_window=False),
        "use_sliding_window",
    ),
    "window": (small("mistral", sliding_window=-5), "sliding_window is -5"),
    "pattern": (small("gemma3_text", sliding_window_pattern=0), "sliding_window_pattern is 0"),
    "eos outside": (small("llama", eos_token_id=300), "eos_token_id has 300"),
    "eos a string": (small("llama", eos_token_id=["</s>"]), "eos_token_id"),
    "quantised": (
        small("llama", quantization_config={"quant_method": "awq"}),
        "quantization_config.quant_method is 'awq', not supported",
    ),
    "not causal": (small("qwen2", is_causal=False), "is_causal"),
    "embedding model": (small("gemma3_text", use_bidirectional_attention=True), "use_bidirectional_attention"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_refuses_by_name(case: str, tmp_path: Path) -> None:
    config, expected = BAD_CONFIGS[case]
    with pytest.raises(ModelError) as caught:
        described(tmp_path, config)
    message = str(caught.value)
    assert str(tmp_path / "config.json") in message
    assert expected in message
    assert "\n" not in message


BAD_JSON = [
    b"",
    b"{",
    b"[1]",
    b"null",
    b'{"a": NaN}',
    b'{"a": 1e999}',
    b"\xff\xfe{}",
    b'{"a": "\xc3"}',
    b"[" * 100000,
]


@pytest.mark.parametrize("content", BAD_JSON, ids=range(len(BAD_JSON)))
def test_what_is_no_json_object_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json: is not a JSON object"):
        describe_folder(tmp_path)


def test_a_missing_config_and_a_broken_generation_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json: cannot be read"):
        describe_folder(tmp_path)
    with pytest.raises(ModelError, match=r"generation_config\.json: eos_token_id"):
        described(tmp_path, small("llama"), {"eos_token_id": "2"})
