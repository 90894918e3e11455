"""Reads ``config.json`` and ``generation_config.json`` of a Hugging Face folder into a ``ModelDescription``.

Where a field is absent the default is that of the family's class in transformers, or of InternLM's own
configuration for its first two generations. ``auto_map`` is ignored: no code of a model is ever run.
"""

from pathlib import Path

from msgspec import Struct

from shoal.checkpoint.description import ModelDescription, Rope
from shoal.checkpoint.fields import REMEDY, Fields, read_json_object, shown
from shoal.checkpoint.hf_quantization import fp8_scheme
from shoal.checkpoint.hf_rope import MAX_POSITION, internlm_rope, rope_of, stretched_length

_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "InternLMForCausalLM": "internlm",
    "InternLM2ForCausalLM": "internlm2",
    "InternLM3ForCausalLM": "internlm3",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
    "LlamaModel": "llama",
    "MistralModel": "mistral",
    "Qwen2Model": "qwen2",
    "Qwen3Model": "qwen3",
}
"""The last four are saved without a head: they make vectors."""
_MODEL_TYPES = {family: family for family in _ARCHITECTURES.values()} | {"gemma3_text": "gemma3"}


class _Defaults(Struct, frozen=True, kw_only=True):
    """What a family's configuration class takes for an absent field; None: the field has to be there."""

    vocab_size: int | None = None
    hidden_size: int | None = None
    ffn_size: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    """None: as many as heads."""
    head_dim: int | None = None
    """None: hidden size by heads."""
    max_position: int = 32768
    norm_eps: float = 1e-6
    bias: bool = False
    """Biases of the attention's projections."""
    tied_head: bool = False
    eos_id: int | None = None
    bos_id: int | None = None


_DEFAULTS = {
    "llama": _Defaults(max_position=2048, bos_id=1, eos_id=2),
    "mistral": _Defaults(max_position=131072, num_kv_heads=8, bos_id=1, eos_id=2),
    "qwen2": _Defaults(num_kv_heads=32, bias=True),
    "qwen3": _Defaults(num_kv_heads=32, head_dim=128),
    "internlm": _Defaults(max_position=2048, bias=True, bos_id=1, eos_id=2),
    "internlm2": _Defaults(bias=True, bos_id=1, eos_id=2),
    "internlm3": _Defaults(num_kv_heads=2, head_dim=128, norm_eps=1e-5, bos_id=1, eos_id=2),
    "gemma3": _Defaults(
        vocab_size=262208,
        hidden_size=2304,
        ffn_size=9216,
        num_layers=26,
        num_heads=8,
        num_kv_heads=4,
        head_dim=256,
        max_position=131072,
        tied_head=True,
        bos_id=2,
        eos_id=1,
    ),
}


def describe_folder(folder: Path) -> ModelDescription:
    """The model in a Hugging Face folder."""
    outer = Fields(str(folder / "config.json"), read_json_object(folder / "config.json"))
    family = _family(outer)
    config = outer.nested("text_config") or outer
    _refuse_unsupported(outer)
    _refuse_unsupported(config)
    return _describe(family, config, outer, _generation_fields(folder))


def _generation_fields(folder: Path) -> Fields:
    path = folder / "generation_config.json"
    return Fields(str(path), read_json_object(path) if path.exists() else {})


def _family(config: Fields) -> str:
    """By ``model_type``, whose fields it then has; the architecture, where named, has to be a language model."""
    architectures = config.texts("architectures")
    model_type = config.text("model_type", "")
    known = [_ARCHITECTURES[name] for name in architectures if name in _ARCHITECTURES]
    if architectures and not known:
        supported = ", ".join(_ARCHITECTURES)
        raise config.error("architectures", f"is {shown(architectures)}, not supported: {supported} are")
    family = _MODEL_TYPES.get(model_type) or (known[0] if known and not model_type else None)
    if family is None:
        supported = ", ".join(_MODEL_TYPES)
        raise config.error("model_type", f"is {shown(model_type)}, not supported: {supported} are")
    return family


def _refuse_unsupported(config: Fields) -> None:
    fp8_scheme(config)
    if config.flag("use_bidirectional_attention", False):
        raise config.error(
            "use_bidirectional_attention", "is true: this is no text generator; serve a causal model"
        )
    if not config.flag("is_causal", True):
        raise config.error("is_causal", "is false: tokens that see what comes after them are not supported")


def _describe(family: str, config: Fields, outer: Fields, generation: Fields) -> ModelDescription:
    defaults = _DEFAULTS[family]
    vocab_size = config.integer("vocab_size", 1, 1 << 24, defaults.vocab_size)
    layers = config.integer("num_hidden_layers", 1, 4096, defaults.num_layers)
    hidden_size, num_heads, num_kv_heads, head_dim = _heads(config, defaults)
    declared = config.integer("max_position_embeddings", 1, MAX_POSITION, defaults.max_position)
    rope, local_rope = _ropes(family, config, head_dim, declared)
    qkv_bias, output_bias, ffn_bias = _biases(family, config, defaults)
    gemma = family == "gemma3"
    _check_activation(config, gemma)
    return ModelDescription(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        ffn_size=config.integer("intermediate_size", 1, 1 << 22, defaults.ffn_size),
        max_position=declared if gemma and rope.scaling == "linear" else stretched_length(rope, declared),
        norm_eps=config.number("rms_norm_eps", 1e-20, 0.1, defaults.norm_eps),
        norm_weight_offset=1.0 if gemma else 0.0,
        activation="gelu_tanh" if gemma else "silu",
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        ffn_bias=ffn_bias,
        qk_norm=family in ("qwen3", "gemma3"),
        post_norms=gemma,
        rope=rope,
        local_rope=local_rope,
        layer_windows=_windows(family, config, layers),
        embedding_scale=hidden_size**0.5 if gemma else 1.0,
        attention_scale=(config.number("query_pre_attn_scalar", 1e-3, 1e6, 256.0) if gemma else head_dim)
        ** -0.5,
        attention_soft_cap=config.number("attn_logit_softcapping", 0.0, 1e6, 0.0) if gemma else 0.0,
        logit_soft_cap=config.number("final_logit_softcapping", 0.0, 1e6, 0.0) if gemma else 0.0,
        tied_head=outer.flag("tie_word_embeddings", config.flag("tie_word_embeddings", defaults.tied_head)),
        bos_id=_bos_id(outer, config, generation, defaults, vocab_size),
        eos_ids=_eos_ids(outer, config, generation, defaults, vocab_size),
    )


def _heads(config: Fields, defaults: _Defaults) -> tuple[int, int, int, int]:
    """Hidden size, heads, KV heads and head size, found consistent."""
    hidden_size = config.integer("hidden_size", 1, 1 << 20, defaults.hidden_size)
    heads = config.integer("num_attention_heads", 1, 4096, defaults.num_heads)
    kv_default = heads if "num_key_value_heads" in config.values else defaults.num_kv_heads or heads
    kv_heads = config.integer("num_key_value_heads", 1, 4096, kv_default)
    if heads % kv_heads:
        raise config.error(
            "num_key_value_heads", f"is {kv_heads}, which does not divide {heads} heads: {REMEDY}"
        )
    head_default = None if "head_dim" in config.values else defaults.head_dim
    if not config.has("head_dim") and head_default is None and hidden_size % heads:
        raise config.error("hidden_size", f"is {hidden_size}, no multiple of {heads} heads: {REMEDY}")
    head_dim = config.integer("head_dim", 1, 1024, head_default or max(hidden_size // heads, 1))
    if head_dim % 2 or head_dim < 4:
        raise config.error("head_dim", f"comes to {head_dim}, not an even number of at least 4: {REMEDY}")
    return hidden_size, heads, kv_heads, head_dim


def _ropes(family: str, config: Fields, head_dim: int, declared: int) -> tuple[Rope, Rope | None]:
    """The rope of the model, and of its sliding-window layers where that differs."""
    modern = any(config.has(name) for name in ("rope_scaling", "rope_parameters", "rope_theta"))
    if family == "internlm" and (config.has("rotary") or not modern):
        return internlm_rope(config, head_dim, declared), None
    theta = 1e6 if family == "gemma3" else 10000.0
    rope = rope_of(config, "full_attention", theta, "rope_theta", head_dim, declared)
    if family != "gemma3":
        return rope, None
    return rope, rope_of(config, "sliding_attention", 10000.0, "rope_local_base_freq", head_dim, declared)


def _biases(family: str, config: Fields, defaults: _Defaults) -> tuple[bool, bool, bool]:
    """Biases of q, k and v, of the attention's output, and of the FFN."""
    if family == "qwen2":
        return True, False, False
    if family == "mistral":
        return False, False, False
    if family in ("internlm", "internlm2"):
        bias = config.flag("bias", defaults.bias)
        return bias, bias, False
    if family == "internlm3":
        other = config.flag("bias", config.flag("mlp_bias", False))
        return config.flag("qkv_bias", config.flag("attention_bias", False)), other, other
    attention = config.flag("attention_bias", False)
    return attention, attention, family == "llama" and config.flag("mlp_bias", False)


def _windows(family: str, config: Fields, layers: int) -> tuple[int, ...]:
    """How far each layer looks back; 0: everything."""
    sliding = _sliding_layers(family, config, layers)
    if not any(sliding):
        return (0,) * layers
    if family in ("qwen2", "qwen3") and not config.flag("use_sliding_window", False):
        raise config.error(
            "layer_types", f"has sliding_attention, but use_sliding_window is not true: {REMEDY}"
        )
    window = config.integer("sliding_window", 1, MAX_POSITION, 4096)
    return tuple(window if slides else 0 for slides in sliding)


def _sliding_layers(family: str, config: Fields, layers: int) -> list[bool]:
    types = config.texts("layer_types")
    if types:
        return _typed_layers(config, types, layers)
    if family == "gemma3":
        pattern = config.integer("sliding_window_pattern", 1, 4096, 6)
        return [(layer + 1) % pattern != 0 for layer in range(layers)]
    if family in ("qwen2", "qwen3") and config.flag("use_sliding_window", False):
        absent = "sliding_window" in config.values and not config.has("sliding_window")
        first = config.integer("max_window_layers", 0, 1 << 20, 28)
        return [not absent and layer >= first for layer in range(layers)]
    disabled = family != "mistral" or ("sliding_window" in config.values and not config.has("sliding_window"))
    return [not disabled] * layers


def _typed_layers(config: Fields, types: list[str], layers: int) -> list[bool]:
    if len(types) != layers:
        raise config.error("layer_types", f"has {len(types)} entries for {layers} layers: {REMEDY}")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise config.error(
                "layer_types", f"has {shown(kind)}; only full and sliding_attention are supported"
            )
    return [kind == "sliding_attention" for kind in types]


def _check_activation(config: Fields, gemma: bool) -> None:
    name, expected = ("hidden_activation", "gelu_pytorch_tanh") if gemma else ("hidden_act", "silu")
    activation = config.text(name, expected)
    if activation != expected:
        raise config.error(name, f"is {shown(activation)}, not supported for this family: {expected} is")


def _eos_ids(
    outer: Fields, config: Fields, generation: Fields, defaults: _Defaults, vocab_size: int
) -> tuple[int, ...]:
    """Where generation stops; the generation config decides if it says anything."""
    for fields in (generation, outer, config):
        if ids := fields.token_ids("eos_token_id", vocab_size):
            return ids
    default = _default_id("eos_token_id", config, defaults.eos_id, vocab_size)
    return () if default is None else (default,)


def _bos_id(
    outer: Fields, config: Fields, generation: Fields, defaults: _Defaults, vocab_size: int
) -> int | None:
    for fields in (outer, config, generation):
        if ids := fields.token_ids("bos_token_id", vocab_size):
            return ids[0]
    return _default_id("bos_token_id", config, defaults.bos_id, vocab_size)


def _default_id(name: str, config: Fields, default: int | None, vocab_size: int) -> int | None:
    """The family's default, unless the config says null or has a smaller vocabulary."""
    return default if default is not None and default < vocab_size and name not in config.values else None
