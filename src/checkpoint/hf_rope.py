"""Rotary embedding as ``config.json`` declares it, in its three historical forms; called by ``hf_config.py``.

Until transformers 4: ``rope_theta`` beside a ``rope_scaling`` object. Since transformers 5: ``rope_parameters``,
one object or one a layer type. InternLM 1: ``rotary``. Their meanings follow transformers'
``modeling_rope_utils.py``.
"""

from msgspec.structs import replace

from shoal.checkpoint.description import Rope
from shoal.checkpoint.fields import REMEDY, Fields, shown

MAX_POSITION = 1 << 27
_MAX_FACTOR = 65536.0
_NO_FIELDS: dict[str, object] = {}


def rope_of(
    config: Fields, layer_type: str, theta: float, theta_field: str, head_dim: int, declared: int
) -> Rope:
    """The rope of the layers of one type; ``theta`` is the family's default, ``declared`` the length declared."""
    fields = _fields_of(config, layer_type)
    theta = config.number(theta_field, 1.001, 1e15, theta)
    return _rope(fields, fields.number("rope_theta", 1.001, 1e15, theta), head_dim, declared)


def internlm_rope(config: Fields, head_dim: int, declared: int) -> Rope:
    """InternLM 1 stretches by dynamic NTK unless its ``rotary`` says "origin"."""
    rotary = config.nested("rotary") or Fields(config.source, _NO_FIELDS)
    theta = rotary.number("base", 1.001, 1e15, 10000.0)
    kind = rotary.text("type", "dynamic")
    if kind == "origin":
        return Rope(theta=theta, dim=head_dim)
    if kind != "dynamic":
        raise rotary.error(
            "type", f"is {shown(kind)}, which InternLM does not have: origin and dynamic are supported"
        )
    factor = rotary.number("scaling_factor", 1.0, _MAX_FACTOR, 1.0)
    return Rope(theta=theta, dim=head_dim, scaling="dynamic", factor=factor, original_max_position=declared)


def stretched_length(rope: Rope, declared: int) -> int:
    """The context length after scaling, of a checkpoint whose ``max_position_embeddings`` is ``declared``.

    Linear and dynamic scaling leave that field at the trained length; llama3's already counts the scaling, and
    yarn names the trained length beside it.
    """
    if rope.scaling in ("linear", "dynamic"):
        return min(int(declared * rope.factor), MAX_POSITION)
    if rope.scaling == "yarn":
        return min(int(rope.original_max_position * rope.factor), MAX_POSITION)
    return declared


def _fields_of(config: Fields, layer_type: str) -> Fields:
    """The object that scales the layers of this type; an empty one where nothing does."""
    empty = Fields(config.source, _NO_FIELDS)
    scaling = config.nested("rope_scaling")
    if scaling is not None and layer_type == "full_attention":
        return scaling
    parameters = config.nested("rope_parameters")
    if parameters is None:
        return empty
    if parameters.has("full_attention") or parameters.has("sliding_attention"):
        return parameters.nested(layer_type) or empty
    return parameters if layer_type == "full_attention" else empty


def _rope(fields: Fields, theta: float, head_dim: int, declared: int) -> Rope:
    plain = Rope(theta=theta, dim=head_dim)
    kind = fields.text("rope_type", fields.text("type", "default"))
    if fields.number("partial_rotary_factor", 0.0, 1.0, 1.0) != 1.0:
        raise fields.error(
            "partial_rotary_factor", "is not 1, which is not supported: take a model that rotates all"
        )
    if kind == "default":
        return plain
    if kind in ("linear", "dynamic"):
        factor = fields.number("factor", 1.0, _MAX_FACTOR)
        return replace(plain, scaling=kind, factor=factor, original_max_position=declared)
    original = fields.integer("original_max_position_embeddings", 1, MAX_POSITION, declared)
    trained = replace(plain, original_max_position=original)
    if kind == "llama3":
        return _llama3(fields, trained)
    if kind == "yarn":
        return _yarn(fields, trained, max(declared / original, 1.0))
    raise fields.error(
        "rope_type", f"is {shown(kind)}, not supported: default, linear, dynamic, llama3 and yarn are"
    )


def _llama3(fields: Fields, trained: Rope) -> Rope:
    factor = fields.number("factor", 1.0, _MAX_FACTOR)
    low = fields.number("low_freq_factor", 1e-6, 1e6)
    high = fields.number("high_freq_factor", 1e-6, 1e6)
    if high <= low:
        raise fields.error("high_freq_factor", f"is {high:g}, not above low_freq_factor {low:g}: {REMEDY}")
    return replace(trained, scaling="llama3", factor=factor, low_freq_factor=low, high_freq_factor=high)


def _yarn(fields: Fields, trained: Rope, default_factor: float) -> Rope:
    fast = fields.number("beta_fast", 1e-6, 1e6, 32.0)
    slow = fields.number("beta_slow", 1e-6, 1e6, 1.0)
    if fast < slow:
        raise fields.error("beta_fast", f"is {fast:g}, below beta_slow {slow:g}: {REMEDY}")
    return replace(
        trained,
        scaling="yarn",
        factor=fields.number("factor", 1.0, _MAX_FACTOR, default_factor),
        beta_fast=fast,
        beta_slow=slow,
        attention_factor=fields.number("attention_factor", 1e-6, 1e6)
        if fields.has("attention_factor")
        else 0.0,
        mscale=fields.number("mscale", 0.0, 1e6, 0.0),
        mscale_all_dim=fields.number("mscale_all_dim", 0.0, 1e6, 0.0),
        truncate=fields.flag("truncate", True),
    )
