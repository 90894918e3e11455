"""What a model is, as data: one frozen struct that the decoder, the loader and the frontends read.

An architecture is nothing but such a description plus a map of tensor names (``workers/architectures.py``);
no family has a forward function of its own. ``hf_config.py`` and ``gguf_metadata.py`` build descriptions.
"""

from typing import Literal

from msgspec import Struct


class Rope(Struct, frozen=True, kw_only=True):
    """Rotary position embedding (Su et al. 2021) with its scaling."""

    theta: float = 10000.0
    dim: int
    """How many leading dimensions of a head are rotated (all, in every family so far)."""
    scaling: Literal["none", "linear", "llama3", "yarn", "dynamic"] = "none"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    """yarn: factor on cos and sin; 0: 0.1·ln(factor)+1, or from mscale below."""
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    freq_factors: tuple[float, ...] = ()
    """Divisors of the inverse frequencies given by the file itself (GGUF's rope_freqs.weight)."""


class ModelDescription(Struct, frozen=True, kw_only=True):
    """Shapes and switches of a decoder-only transformer."""

    family: str
    """llama, mistral, qwen2, qwen3, internlm, internlm2, internlm3 or gemma3: the tensor-name map to use."""
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    max_position: int
    """Context length the checkpoint declares (after its own rope scaling)."""
    norm_eps: float
    norm_weight_offset: float = 0.0
    """Added to every norm weight at load: 1.0 for Gemma's Hugging Face checkpoints."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    """Bias of the attention's output projection."""
    ffn_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each head of q and k before rope."""
    post_norms: bool = False
    """Gemma's sandwich: a norm after attention and after the FFN, before each residual addition."""
    rope: Rope
    local_rope: Rope | None = None
    """Rope of the sliding-window layers where it differs."""
    layer_windows: tuple[int, ...]
    """One a layer: 0 attends to everything; w > 0 to the last w positions, itself included."""
    embedding_scale: float = 1.0
    attention_scale: float
    """Factor on q·k, normally head_dim ** -0.5."""
    attention_soft_cap: float = 0.0
    logit_soft_cap: float = 0.0
    tied_head: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
