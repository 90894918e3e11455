"""What a located model says about itself, whatever its format; called by the supervisor and every process."""

from msgspec.structs import replace

from shoal.checkpoint.description import ModelDescription
from shoal.checkpoint.fields import Fields, read_json_object
from shoal.checkpoint.gguf import GgufFile
from shoal.checkpoint.gguf_metadata import describe_gguf
from shoal.checkpoint.hf_config import describe_folder
from shoal.checkpoint.hf_rope import MAX_POSITION
from shoal.checkpoint.locate import DEFAULT_FILE, ModelLocation
from shoal.errors import FlagError

_MAX_ROPE_FACTOR = 1024.0
_DEFAULT_MODEL_SAMPLING = {"temperature": 0.0}
"""A model of 135M parameters in 4 bits wanders off at any temperature: asked for a capital, it names it every time
when greedy, and every other time at the 0.2 of its model card."""


def describe(location: ModelLocation) -> ModelDescription:
    """The shapes and switches of the model."""
    if location.kind == "folder":
        return describe_folder(location.path)
    with GgufFile(location.path) as file:
        return describe_gguf(file)


def generation_defaults(location: ModelLocation) -> dict[str, float | int]:
    """The sampling values that the model's authors recommend, those that they give.

    A folder tells them in generation_config.json; a GGUF file has no field for them, so the default model's stand
    here.
    """
    if location.kind == "gguf":
        return dict(_DEFAULT_MODEL_SAMPLING) if location.path.name == DEFAULT_FILE else {}
    path = location.path / "generation_config.json"
    if not path.exists():
        return {}
    fields = Fields(str(path), read_json_object(path))
    defaults: dict[str, float | int] = {}
    for name, low, high in (
        ("temperature", 0.0, 100.0),
        ("top_p", 0.0, 1.0),
        ("repetition_penalty", 0.01, 100.0),
    ):
        if fields.has(name):
            defaults[name] = fields.number(name, low, high)
    if fields.has("top_k"):
        defaults["top_k"] = max(fields.integer("top_k", -1, 1 << 31), 0)
    return defaults


def with_rope_scaling(description: ModelDescription, factor: float) -> ModelDescription:
    """The model with dynamic NTK scaling by ``--rope_scaling_factor``; 0 leaves it as it is."""
    if factor == 0.0:
        return description
    if not 1.0 <= factor <= _MAX_ROPE_FACTOR:
        raise FlagError(
            f"--rope_scaling_factor {factor:g}: give 0 (off), or a number from 1 to {_MAX_ROPE_FACTOR:g}"
        )
    rope = description.rope
    if rope.scaling not in ("none", "dynamic") or rope.freq_factors:
        kind = "llama3" if rope.freq_factors else rope.scaling
        raise FlagError(
            f"--rope_scaling_factor: the model has {kind} rope scaling of its own; leave the flag away"
        )
    original = rope.original_max_position if rope.scaling == "dynamic" else description.max_position
    stretched = replace(rope, scaling="dynamic", factor=float(factor), original_max_position=original)
    return replace(description, rope=stretched, max_position=min(int(original * factor), MAX_POSITION))
