"""What a Hugging Face folder's ``quantization_config`` says of weights in fp8 (e4m3): quant_method "fp8", as DeepSeek's
and Qwen's checkpoints have it, and "compressed-tensors" in the format "float-quantized", as llm-compressor writes it.
Called by ``hf_config`` and by the ranks' weight source.

Which tensors are fp8 is told by their own types, so lists of modules that were left out are not read. Scales of
activations have no use here: activations are of 16 or 32 bits.
"""

from pathlib import Path
from typing import Final

from msgspec import Struct

from shoal.checkpoint.fields import REMEDY, Fields, read_json_object, shown

_INSTEAD: Final = "serve the unquantised model or a .gguf"
_STRATEGIES: Final = ("tensor", "channel", "block")
_MOST_BLOCK: Final = 1 << 20


class Fp8Scheme(Struct, frozen=True):
    """How fp8 weights are scaled."""

    block: tuple[int, int] | None = None
    """Rows and columns of a weight that share a scale; None: all of it do, or a row of it."""


def fp8_scheme_of(folder: Path) -> Fp8Scheme | None:
    """None where the weights are plain. Raises ModelError where they are quantised otherwise."""
    outer = Fields(str(folder / "config.json"), read_json_object(folder / "config.json"))
    config = outer.nested("text_config")
    return fp8_scheme(outer) or (fp8_scheme(config) if config is not None else None)


def fp8_scheme(config: Fields) -> Fp8Scheme | None:
    """The same, of the fields of config.json."""
    for name in ("quantization_config", "compression_config"):
        quantization = config.nested(name)
        if quantization is not None:
            method = _one_of(quantization, "quant_method", "fp8", "compressed-tensors")
            return _plain_scheme(quantization) if method == "fp8" else _compressed_scheme(quantization)
    return None


def _plain_scheme(fields: Fields) -> Fp8Scheme:
    for name, allowed in (("fmt", ("e4m3",)), ("activation_scheme", ("dynamic", "static"))):
        if fields.has(name):
            _one_of(fields, name, *allowed)
    _check_cache(fields)
    return Fp8Scheme(_block(fields, "weight_block_size"))


def _compressed_scheme(fields: Fields) -> Fp8Scheme:
    _one_of(fields, "format", "float-quantized")
    sparsity, transform = fields.nested("sparsity_config"), fields.nested("transform_config")
    if sparsity is not None and sparsity.has("format"):
        _one_of(sparsity, "format", "dense")
    if transform is not None and transform.values.get("config_groups"):
        raise fields.error("transform_config", f"is not supported: {_INSTEAD}")
    _check_cache(fields)
    groups = fields.nested("config_groups")
    if groups is None:
        raise fields.error("config_groups", f"is missing: {REMEDY}")
    blocks = {_group_block(groups, name) for name in groups.values} - {None}
    if len(blocks) > 1:
        raise fields.error("config_groups", f"has blocks of several sizes, not supported: {_INSTEAD}")
    return Fp8Scheme(blocks.pop() if blocks else None)


def _group_block(groups: Fields, name: str) -> tuple[int, int] | None:
    group = groups.nested(name)
    weights = None if group is None else group.nested("weights")
    if weights is None:
        raise groups.error(name, f"has no weights, not supported: {_INSTEAD}")
    _check_numbers(weights)
    strategy = _one_of(weights, "strategy", *_STRATEGIES)
    return _block(weights, "block_structure") if strategy == "block" else None


def _check_cache(fields: Fields) -> None:
    """Whether the cache's scales, if there are any, are a number for a layer or for each KV head."""
    if not fields.has("kv_cache_scheme"):
        return
    if isinstance(fields.values["kv_cache_scheme"], str):
        _one_of(fields, "kv_cache_scheme", "static")
        return
    scheme = fields.nested("kv_cache_scheme")
    assert scheme is not None
    _check_numbers(scheme)
    if scheme.has("strategy"):
        _one_of(scheme, "strategy", "tensor", "attn_head")


def _check_numbers(fields: Fields) -> None:
    """That they are of 8 bits, floats, with scales of the file's and no offsets."""
    _one_of(fields, "type", "float")
    bits = fields.integer("num_bits", 1, 64)
    if bits != 8:
        raise fields.error("num_bits", f"is {bits}, not supported: 8 is; {_INSTEAD}")
    if not fields.flag("symmetric", True):
        raise fields.error("symmetric", f"is false, not supported: {_INSTEAD}")
    if fields.flag("dynamic", False):
        raise fields.error("dynamic", f"is true, not supported: {_INSTEAD}")


def _one_of(fields: Fields, name: str, *allowed: str) -> str:
    value = fields.text(name)
    if value not in allowed:
        are = f"{' and '.join(allowed)} {'are' if len(allowed) > 1 else 'is'}"
        raise fields.error(name, f"is {shown(value)}, not supported: {are}; {_INSTEAD}")
    return value


def _block(fields: Fields, name: str) -> tuple[int, int] | None:
    if not fields.has(name):
        return None
    value = fields.values[name]
    match value:
        case [int(rows), int(columns)] if 0 < rows <= _MOST_BLOCK and 0 < columns <= _MOST_BLOCK:
            return rows, columns
        case _:
            raise fields.error(name, f"is {shown(value)}, not two whole numbers from 1 on: {REMEDY}")
