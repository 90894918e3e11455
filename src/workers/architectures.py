"""What the tensors of each family are called in its checkpoints, and what shapes they must have.

``load`` reads by these names. A family is a row in the table below and a ``ModelDescription``: there is
no code of its own for any of them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from shoal.checkpoint.description import ModelDescription
from shoal.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Tensor names of one kind of checkpoint. Those of a layer follow ``layer``; matrices lack ``.weight``."""

    embedding: str
    final_norm: str
    head: str
    layer: str
    """``{}`` stands for the layer's index."""
    attention_norm: str
    q: str = ""
    k: str = ""
    v: str = ""
    grouped_qkv: str = ""
    """One matrix instead of q, k and v: for each KV head its query heads, then its key, then its value."""
    output: str
    q_norm: str = ""
    k_norm: str = ""
    attention_post_norm: str = ""
    ffn_norm: str
    gate: str
    up: str
    down: str
    ffn_post_norm: str = ""
    interleaved_rope: bool = False
    """Rows of q and k are in the order of rope on neighbouring pairs; the decoder rotates halves."""


_HF_LLAMA = Layout(
    embedding="model.embed_tokens",
    final_norm="model.norm",
    head="lm_head",
    layer="model.layers.{}.",
    attention_norm="input_layernorm",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    output="self_attn.o_proj",
    q_norm="self_attn.q_norm",
    k_norm="self_attn.k_norm",
    ffn_norm="post_attention_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
)
_HF_BARE = replace(_HF_LLAMA, embedding="embed_tokens", final_norm="norm", layer="layers.{}.")
"""As embedding models are saved: without what surrounds the decoder."""
_HF_GEMMA3 = replace(
    _HF_LLAMA,
    attention_post_norm="post_attention_layernorm",
    ffn_norm="pre_feedforward_layernorm",
    ffn_post_norm="post_feedforward_layernorm",
)
_HF_GEMMA3_WITH_VISION = replace(
    _HF_GEMMA3,
    embedding="model.language_model.embed_tokens",
    final_norm="model.language_model.norm",
    layer="model.language_model.layers.{}.",
)
_HF_GEMMA3_WITH_VISION_2025 = replace(
    _HF_GEMMA3,
    embedding="language_model.model.embed_tokens",
    final_norm="language_model.model.norm",
    head="language_model.lm_head",
    layer="language_model.model.layers.{}.",
)
_HF_INTERNLM2 = Layout(
    embedding="model.tok_embeddings",
    final_norm="model.norm",
    head="output",
    layer="model.layers.{}.",
    attention_norm="attention_norm",
    grouped_qkv="attention.wqkv",
    output="attention.wo",
    ffn_norm="ffn_norm",
    gate="feed_forward.w1",
    up="feed_forward.w3",
    down="feed_forward.w2",
)
_GGUF = Layout(
    embedding="token_embd",
    final_norm="output_norm",
    head="output",
    layer="blk.{}.",
    attention_norm="attn_norm",
    q="attn_q",
    k="attn_k",
    v="attn_v",
    output="attn_output",
    q_norm="attn_q_norm",
    k_norm="attn_k_norm",
    attention_post_norm="post_attention_norm",
    ffn_norm="ffn_norm",
    gate="ffn_gate",
    up="ffn_up",
    down="ffn_down",
    ffn_post_norm="post_ffw_norm",
)
_GGUF_INTERLEAVED = replace(_GGUF, interleaved_rope=True)

_LAYOUTS = {
    "llama": (_HF_LLAMA, _HF_BARE, _GGUF_INTERLEAVED),
    "mistral": (_HF_LLAMA, _HF_BARE),
    "qwen2": (_HF_LLAMA, _HF_BARE, _GGUF),
    "qwen3": (_HF_LLAMA, _HF_BARE, _GGUF),
    "internlm": (_HF_LLAMA,),
    "internlm2": (_HF_INTERNLM2, _GGUF_INTERLEAVED),
    "internlm3": (_HF_LLAMA,),
    "gemma3": (_HF_GEMMA3, _HF_GEMMA3_WITH_VISION, _HF_GEMMA3_WITH_VISION_2025, _GGUF),
}
"""The layouts in which a family is found; GGUF files of Mistral and InternLM 1 and 3 call themselves llama."""
_OF_NO_CONSEQUENCE = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|rope_freqs\.weight)$|(^|\.)(vision_tower|multi_modal_projector)\."
)
"""Rope tables, which the description holds, and the half of a model that reads images."""


def choose_layout(family: str, names: frozenset[str]) -> Layout:
    """The layout of a checkpoint that has tensors of these names."""
    for layout in _LAYOUTS[family]:
        if f"{layout.embedding}.weight" in names:
            return layout
    expected = " or ".join(f"{layout.embedding}.weight" for layout in _LAYOUTS[family])
    raise ModelError(f"tensor {expected} is missing: this is no checkpoint of a {family} model")


def expected_shapes(description: ModelDescription, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Every tensor that the model needs."""
    table = (description.vocab_size, description.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {
        f"{layout.embedding}.weight": table,
        f"{layout.final_norm}.weight": (description.hidden_size,),
    }
    if not description.tied_head:
        shapes[f"{layout.head}.weight"] = table
    of_a_layer = dict(_layer_shapes(description, layout))
    for index in range(description.num_layers):
        prefix = layout.layer.format(index)
        shapes |= {prefix + name: shape for name, shape in of_a_layer.items()}
    return shapes


def has_no_place(name: str, layout: Layout) -> bool:
    """Whether a tensor that was not expected changes what the model computes."""
    return name != f"{layout.head}.weight" and not _OF_NO_CONSEQUENCE.search(name)


def _layer_shapes(description: ModelDescription, layout: Layout) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, (rows, columns, bias) in _matrices(description, layout).items():
        yield f"{name}.weight", (rows, columns)
        if bias:
            yield f"{name}.bias", (rows,)
    hidden, head_dim = (description.hidden_size,), (description.head_dim,)
    yield f"{layout.attention_norm}.weight", hidden
    yield f"{layout.ffn_norm}.weight", hidden
    if description.qk_norm:
        yield f"{layout.q_norm}.weight", head_dim
        yield f"{layout.k_norm}.weight", head_dim
    if description.post_norms:
        yield f"{layout.attention_post_norm}.weight", hidden
        yield f"{layout.ffn_post_norm}.weight", hidden


def _matrices(description: ModelDescription, layout: Layout) -> dict[str, tuple[int, int, bool]]:
    """Rows, columns and whether there is a bias."""
    hidden, ffn = description.hidden_size, description.ffn_size
    q_rows = description.num_heads * description.head_dim
    kv_rows = description.num_kv_heads * description.head_dim
    if layout.grouped_qkv:
        matrices = {layout.grouped_qkv: (q_rows + 2 * kv_rows, hidden, description.qkv_bias)}
    else:
        matrices = {
            layout.q: (q_rows, hidden, description.qkv_bias),
            layout.k: (kv_rows, hidden, description.qkv_bias),
            layout.v: (kv_rows, hidden, description.qkv_bias),
        }
    return matrices | {
        layout.output: (hidden, q_rows, description.output_bias),
        layout.gate: (ffn, hidden, description.ffn_bias),
        layout.up: (ffn, hidden, description.ffn_bias),
        layout.down: (hidden, ffn, description.ffn_bias),
    }
