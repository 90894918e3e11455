"""Which fp8 formats are read, and what is said of the others."""

from typing import Any

import pytest
from fp8_checkpoints import FORMATS, compressed

from shoal.checkpoint.fields import Fields
from shoal.checkpoint.hf_quantization import Fp8Scheme, fp8_scheme
from shoal.errors import ModelError

QWEN3 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm"],
}
CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def scheme(quantization: object, name: str = "quantization_config") -> Fp8Scheme | None:
    return fp8_scheme(Fields("config.json", {name: quantization}))


def test_formats_as_published() -> None:
    assert scheme(QWEN3) == Fp8Scheme((128, 128))
    assert scheme({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": []}) == Fp8Scheme()
    assert scheme({"quant_method": "fp8", "kv_cache_scheme": "static"}) == Fp8Scheme()
    assert scheme({**compressed("channel"), "kv_cache_scheme": CACHE}) == Fp8Scheme()
    assert scheme(compressed("tensor"), "compression_config") == Fp8Scheme()
    assert scheme(compressed("block", block_structure=[128, 128])) == Fp8Scheme((128, 128))
    assert scheme({**compressed("tensor"), "sparsity_config": {"format": "dense"}}) == Fp8Scheme()
    assert fp8_scheme(Fields("config.json", {})) is None
    for form in FORMATS.values():
        assert scheme(form.quantization) == Fp8Scheme(form.block if form.block[0] else None)


GROUPS: Any = compressed("tensor")["config_groups"]
REFUSED: dict[str, tuple[object, str]] = {
    "no object": ("fp8", "quantization_config is 'fp8', not an object"),
    "no method": ({}, "quant_method is missing"),
    "another method": ({"quant_method": "awq"}, "quant_method is 'awq', not supported: fp8 and compressed-tensors"),
    "e5m2": ({**QWEN3, "fmt": "e5m2"}, "fmt is 'e5m2', not supported: e4m3 is"),
    "activations": ({**QWEN3, "activation_scheme": "both"}, "activation_scheme is 'both'"),
    "one number": ({**QWEN3, "weight_block_size": 128}, "weight_block_size is 128, not two whole numbers"),
    "no block": ({**QWEN3, "weight_block_size": [0, 128]}, "weight_block_size is [0, 128]"),
    "flags for a block": ({**QWEN3, "weight_block_size": [128, "a"]}, "weight_block_size is [128, 'a']"),
    "integers": ({**compressed("tensor"), "format": "pack-quantized"}, "format is 'pack-quantized', not supported"),
    "4 bits": (compressed("tensor", num_bits=4), "config_groups.group_0.weights.num_bits is 4, not supported"),
    "int": (compressed("tensor", type="int"), "weights.type is 'int', not supported: float is"),
    "offsets": (compressed("tensor", symmetric=False), "weights.symmetric is false"),
    "groups": (compressed("group"), "weights.strategy is 'group', not supported: tensor and channel and block are"),
    "sparse": ({**compressed("tensor"), "sparsity_config": {"format": "sparse-24"}}, "sparsity_config.format"),
    "transforms": ({**compressed("tensor"), "transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
    "no groups": ({**compressed("tensor"), "config_groups": None}, "config_groups is missing"),
    "no weights": ({**compressed("tensor"), "config_groups": {"a": {"weights": None}}}, "config_groups.a has no"),
    "two sizes of blocks": (
        {
            **compressed("tensor"),
            "config_groups": {
                name: {"weights": {**GROUPS["group_0"]["weights"], "strategy": "block", "block_structure": [n, n]}}
                for name, n in (("a", 64), ("b", 128))
            },
        },
        "config_groups has blocks of several sizes",
    ),
    "integers in the cache": (
        {**compressed("tensor"), "kv_cache_scheme": {**CACHE, "type": "int"}},
        "kv_cache_scheme.type is 'int', not supported",
    ),
    "scales of tokens": (
        {**compressed("tensor"), "kv_cache_scheme": {**CACHE, "dynamic": True}},
        "kv_cache_scheme.dynamic is true",
    ),
    "another cache": ({**QWEN3, "kv_cache_scheme": "dynamic"}, "kv_cache_scheme is 'dynamic'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_others_are_refused_by_the_name_of_the_field(case: str) -> None:
    quantization, expected = REFUSED[case]
    with pytest.raises(ModelError) as caught:
        scheme(quantization)
    message = str(caught.value)
    assert expected in message
    assert "download" in message or "serve the unquantised model or a .gguf" in message
