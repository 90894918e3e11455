"""Writes checkpoints in the fp8 formats of Hugging Face folders, and says what their weights are."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Scaled:
    """codes: e4m3; scales: as the file has them."""

    codes: Tensor
    scales: Tensor


def per_tensor(weight: Tensor) -> Scaled:
    scale = weight.abs().max() / LARGEST
    return Scaled((weight / scale).to(E4M3), scale)


def per_channel(weight: Tensor) -> Scaled:
    scales = (weight.abs().amax(1, keepdim=True) / LARGEST).bfloat16()
    return Scaled((weight / scales.float()).clamp(-LARGEST, LARGEST).to(E4M3), scales)


def per_channel_in_powers_of_two(weight: Tensor) -> Scaled:
    """bfloat16 holds what is meant."""
    scales = (weight.abs().amax(1, keepdim=True) / LARGEST).log2().ceil().exp2()
    return Scaled((weight / scales).to(E4M3), scales)


def per_block(rows: int, columns: int) -> Callable[[Tensor], Scaled]:
    def scale(weight: Tensor) -> Scaled:
        codes, stripes = torch.empty_like(weight), []
        for i in range(0, len(weight), rows):
            stripe = []
            for j in range(0, weight.shape[1], columns):
                block = weight[i : i + rows, j : j + columns]
                stripe.append(block.abs().max() / LARGEST)
                codes[i : i + rows, j : j + columns] = block / stripe[-1]
            stripes.append(torch.stack(stripe))
        return Scaled(codes.to(E4M3), torch.stack(stripes))

    return scale


def meant(scaled: Scaled, rows: int = 0, columns: int = 0) -> Tensor:
    """float32; rows and columns: of a block."""
    wide, scales = scaled.codes.float(), scaled.scales.float()
    if not rows:
        return wide * scales
    whole = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return wide * whole[: len(wide), : wide.shape[1]]


@dataclass(frozen=True)
class Format:
    """quantization: the field of config.json."""

    quantization: dict[str, object]
    scale: Callable[[Tensor], Scaled]
    ending: str = "_scale"
    block: tuple[int, int] = (0, 0)

    def write(self, folder: Path, config: dict[str, object], plain: Tensors, more: Tensors) -> Tensors:
        """Layers' matrices become fp8, ``more`` is put beside them. Returns the tensors that are meant."""
        written, meaning = dict(more), dict(plain)
        for name, tensor in plain.items():
            if not name.endswith("_proj.weight"):
                written[name] = tensor.contiguous()
                continue
            scaled = self.scale(tensor)
            written |= {name: scaled.codes, name + self.ending: scaled.scales}
            meaning[name] = meant(scaled, *self.block)
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": self.quantization}))
        save_file(written, folder / "model.safetensors")
        return meaning


def compressed(strategy: str, **weights: object) -> dict[str, object]:
    """What llm-compressor writes."""
    numbers = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**numbers, "strategy": strategy, "group_size": None, **weights},
                "input_activations": {**numbers, "strategy": "token", "dynamic": True},
                "output_activations": None,
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


FORMATS = {
    "fp8 per tensor": Format({"quant_method": "fp8", "activation_scheme": "static"}, per_tensor),
    "fp8 in blocks": Format(
        {
            "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [16, 32],
            "modules_to_not_convert": ["lm_head"],
        },
        per_block(16, 32),
        "_scale_inv",
        (16, 32),
    ),
    "compressed per tensor": Format(compressed("tensor"), lambda weight: _in_a_vector(per_tensor(weight))),
    "compressed per channel": Format(compressed("channel"), per_channel),
    "compressed in blocks": Format(
        compressed("block", block_structure=[16, 32]), per_block(16, 32), block=(16, 32)
    ),
}  # fmt: skip


def _in_a_vector(scaled: Scaled) -> Scaled:
    return Scaled(scaled.codes, scaled.scales.view(1))
