"""Reads a GGUF file's metadata into a ``ModelDescription``.

What the metadata leaves open is told by the tensors: the vocabulary's size, biases, a tied head. Conventions
are llama.cpp's: Gemma's norm weights already hold their 1, rope frequencies may come as a tensor, and Mistral
and InternLM 3 call themselves llama.
"""

import numpy as np
from msgspec.structs import replace

from shoal.checkpoint.description import ModelDescription, Rope
from shoal.checkpoint.fields import REMEDY, Fields, shown
from shoal.checkpoint.gguf import GgufFile, GgufType
from shoal.checkpoint.hf_rope import MAX_POSITION

_ARCHITECTURES = ("llama", "qwen2", "qwen3", "internlm2", "gemma3")
_GEMMA_27B_LAYERS = 62
_GEMMA_PATTERN = 6
_TURN_ENDS = frozenset(("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>"))
_MAX_VOCAB_SIZE = 1 << 24


def describe_gguf(file: GgufFile) -> ModelDescription:
    """The model in a GGUF file."""
    general = _general(file)
    family = general.text("general.architecture")
    if family not in _ARCHITECTURES:
        supported = ", ".join(_ARCHITECTURES)
        raise general.error("general.architecture", f"is {shown(family)}, not supported: {supported} are")
    fields = Fields(str(file.path), file.metadata, f"{family}.")
    if fields.integer("expert_count", 0, 1 << 20, 0):
        raise fields.error(
            "expert_count", "is not 0: mixtures of experts are not available yet; take a dense model"
        )
    return _describe(family, file, fields)


def _describe(family: str, file: GgufFile, fields: Fields) -> ModelDescription:
    layers = fields.integer("block_count", 1, 4096)
    hidden_size, num_heads, num_kv_heads, head_dim = _heads(fields)
    vocab_size = _vocab_size(file, fields, hidden_size)
    declared = fields.integer("context_length", 1, MAX_POSITION)
    rope = _rope(file, fields, head_dim, declared)
    gemma = family == "gemma3"
    return ModelDescription(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        ffn_size=fields.integer("feed_forward_length", 1, 1 << 22),
        max_position=_stretched_length(fields, rope, declared),
        norm_eps=fields.number("attention.layer_norm_rms_epsilon", 1e-20, 0.1),
        activation="gelu_tanh" if gemma else "silu",
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        ffn_bias="blk.0.ffn_gate.bias" in file.tensors,
        qk_norm=family in ("qwen3", "gemma3"),
        post_norms=gemma,
        rope=rope,
        local_rope=_local_rope(fields, head_dim) if gemma else None,
        layer_windows=_windows(family, fields, layers),
        embedding_scale=hidden_size**0.5 if gemma else 1.0,
        attention_scale=(hidden_size // num_heads if gemma and layers == _GEMMA_27B_LAYERS else head_dim)
        ** -0.5,
        attention_soft_cap=fields.number("attn_logit_softcapping", 0.0, 1e6, 0.0) if gemma else 0.0,
        logit_soft_cap=fields.number("final_logit_softcapping", 0.0, 1e6, 0.0) if gemma else 0.0,
        tied_head="output.weight" not in file.tensors,
        bos_id=next(iter(_token_ids(file, "bos", vocab_size)), None),
        eos_ids=_eos_ids(file, vocab_size),
    )


def _heads(fields: Fields) -> tuple[int, int, int, int]:
    """Hidden size, heads, KV heads and head size, found consistent."""
    hidden_size = fields.integer("embedding_length", 1, 1 << 20)
    heads = fields.integer("attention.head_count", 1, 4096)
    kv_heads = fields.integer("attention.head_count_kv", 1, 4096, heads)
    if heads % kv_heads:
        raise fields.error(
            "attention.head_count_kv", f"is {kv_heads}, which does not divide {heads} heads: {REMEDY}"
        )
    if not fields.has("attention.key_length") and hidden_size % heads:
        raise fields.error("embedding_length", f"is {hidden_size}, no multiple of {heads} heads: {REMEDY}")
    head_dim = fields.integer("attention.key_length", 1, 1024, max(hidden_size // heads, 1))
    if head_dim % 2 or head_dim < 4:
        raise fields.error(
            "attention.key_length", f"comes to {head_dim}, not an even number of at least 4: {REMEDY}"
        )
    for name in ("attention.value_length", "rope.dimension_count"):
        if (size := fields.integer(name, 1, 1 << 20, head_dim)) != head_dim:
            raise fields.error(name, f"is {size}, which differs from the head size {head_dim}: not supported")
    return hidden_size, heads, kv_heads, head_dim


def _vocab_size(file: GgufFile, fields: Fields, hidden_size: int) -> int:
    shape = file.tensor("token_embd.weight").shape
    if len(shape) != 2 or shape[1] != hidden_size:
        raise fields.error("embedding_length", f"is {hidden_size}, but token_embd.weight is {shape}: {REMEDY}")
    tokens = len(_general(file).texts("tokenizer.ggml.tokens"))
    if not tokens <= shape[0] <= _MAX_VOCAB_SIZE:
        raise _general(file).error("token_embd.weight", f"has {shape[0]} rows for {tokens} tokens: {REMEDY}")
    return shape[0]


def _rope(file: GgufFile, fields: Fields, head_dim: int, declared: int) -> Rope:
    theta = fields.number("rope.freq_base", 1.001, 1e15, 10000.0)
    plain = Rope(theta=theta, dim=head_dim, freq_factors=_freq_factors(file, fields, head_dim))
    legacy = fields.number("rope.scale_linear", 1.0, 65536.0, 1.0)
    kind = fields.text("rope.scaling.type", "none" if legacy == 1.0 else "linear")
    factor = fields.number("rope.scaling.factor", 0.0, 65536.0, legacy) or 1.0
    if kind == "none" or factor == 1.0:
        return plain
    if factor < 1.0:
        raise fields.error("rope.scaling.factor", f"is {factor:g}, below 1: {REMEDY}")
    if kind == "linear":
        return replace(plain, scaling="linear", factor=factor, original_max_position=declared)
    if kind == "yarn":
        return _yarn(fields, plain, factor, declared)
    raise fields.error("rope.scaling.type", f"is {shown(kind)}, not supported: none, linear and yarn are")


def _yarn(fields: Fields, plain: Rope, factor: float, declared: int) -> Rope:
    """llama.cpp multiplies the paper's attention factor by its own, which is normally 1."""
    extra = fields.number("rope.scaling.attn_factor", 1e-6, 1e6, 1.0)
    extra *= fields.number("rope.scaling.yarn_attn_factor", 1e-6, 1e6, 1.0)
    fast = fields.number("rope.scaling.yarn_beta_fast", 1e-6, 1e6, 32.0)
    slow = fields.number("rope.scaling.yarn_beta_slow", 1e-6, 1e6, 1.0)
    if fast < slow:
        raise fields.error(
            "rope.scaling.yarn_beta_fast", f"is {fast:g}, below yarn_beta_slow {slow:g}: {REMEDY}"
        )
    return replace(
        plain,
        scaling="yarn",
        factor=factor,
        original_max_position=fields.integer("rope.scaling.original_context_length", 1, MAX_POSITION, declared),
        beta_fast=fast,
        beta_slow=slow,
        attention_factor=0.0 if extra == 1.0 else extra * (0.1 * float(np.log(factor)) + 1.0),
    )


def _stretched_length(fields: Fields, rope: Rope, declared: int) -> int:
    """``context_length`` counts the scaling, but for yarn where the trained length is given beside it."""
    if rope.scaling == "yarn" and fields.has("rope.scaling.original_context_length"):
        return min(int(rope.original_max_position * rope.factor), MAX_POSITION)
    return declared


def _local_rope(fields: Fields, head_dim: int) -> Rope:
    return Rope(theta=fields.number("rope.freq_base_swa", 1.001, 1e15, 10000.0), dim=head_dim)


def _freq_factors(file: GgufFile, fields: Fields, head_dim: int) -> tuple[float, ...]:
    """Llama 3's scaling, worked out by the converter."""
    tensor = file.tensors.get("rope_freqs.weight")
    if tensor is None:
        return ()
    if tensor.type is not GgufType.F32 or tensor.shape != (head_dim // 2,):
        problem = f"is {tensor.type.name} {tensor.shape}, not F32 ({head_dim // 2},): convert the model again"
        raise _general(file).error("rope_freqs.weight", problem)
    factors = file.raw("rope_freqs.weight", 0, 1).view(np.float32)[0]
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise _general(file).error("rope_freqs.weight", f"has numbers that are no positive factors: {REMEDY}")
    return tuple(factors.tolist())


def _windows(family: str, fields: Fields, layers: int) -> tuple[int, ...]:
    """Only Gemma's layers slide: all but every sixth, or as the file says, by a period or layer by layer."""
    if family != "gemma3":
        return (0,) * layers
    window = fields.integer("attention.sliding_window", 1, MAX_POSITION)
    pattern = fields.values.get(f"{family}.attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray):
        if pattern.dtype != np.bool_ or len(pattern) != layers:
            raise fields.error("attention.sliding_window_pattern", f"is not {layers} booleans: {REMEDY}")
        return tuple(window if slides else 0 for slides in pattern.tolist())
    period = fields.integer("attention.sliding_window_pattern", 1, 4096, _GEMMA_PATTERN)
    return tuple(window if (layer + 1) % period else 0 for layer in range(layers))


def _eos_ids(file: GgufFile, vocab_size: int) -> tuple[int, ...]:
    """What ends a text or a turn. Many files name only one such token, so the usual names count too."""
    named = [token for kind in ("eos", "eot", "eom") for token in _token_ids(file, kind, vocab_size)]
    tokens = _general(file).texts("tokenizer.ggml.tokens")
    return tuple(dict.fromkeys([*named, *(index for index, text in enumerate(tokens) if text in _TURN_ENDS)]))


def _token_ids(file: GgufFile, kind: str, vocab_size: int) -> tuple[int, ...]:
    return _general(file).token_ids(f"tokenizer.ggml.{kind}_token_id", vocab_size)


def _general(file: GgufFile) -> Fields:
    return Fields(str(file.path), file.metadata)
