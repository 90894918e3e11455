"""The operator table of the decoder and the sampler: typed, checked wrappers. Called by the workers only.

Each operator runs on the compiled library where that was built, and else on its plain twin in ``reference.py``, which
is its specification. No compiled operator's result for a row depends on the other rows of the call or on the number
of threads. Activations are float32; weights and the cache may be bfloat16. Tensors are on the CPU; rows may be
strided, their elements must lie side by side.
"""

from typing import Literal

import torch
from torch import Tensor

from shoal.cuda_ext import reference
from shoal.cuda_ext.binding import library
from shoal.cuda_ext.packed_weight import PackedWeight

Activation = Literal["silu", "gelu_tanh"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _is_vector(x: Tensor, dtype: torch.dtype, length: int) -> bool:
    return x.dtype == dtype and x.shape == (length,) and x.is_contiguous()


def set_threads(count: int) -> None:
    """How many threads the operators use, torch's products included. The compiled operators' results do not
    depend on it."""
    torch.set_num_threads(count)
    compiled = library()
    if compiled is not None:
        compiled.set_threads(count)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: [..., dim]; weight: [dim]."""
    compiled = library()
    if compiled is None:
        return reference.rms_norm(x, weight, eps)
    dim = x.shape[-1]
    _require(x.dtype == torch.float32, "rms_norm: x is not float32")
    _require(_is_vector(weight, torch.float32, dim), "rms_norm: weight is not float32 [dim]")
    out = torch.empty(x.shape)
    if x.dim() not in (2, 3) or x.stride(-1) != 1:
        x = x.contiguous().view(-1, dim)
    strides = x.stride()
    compiled.rms_norm(
        out.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        x.shape[0],
        x.shape[1] if len(strides) == 3 else 1,
        dim,
        strides[0],
        strides[1] if len(strides) == 3 else 0,
        eps,
    )
    return out


def add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Adds x to residual ([tokens, dim] both) in place and returns the normalised sum."""
    compiled = library()
    if compiled is None:
        return reference.add_rms_norm(residual, x, weight, eps)
    tokens, dim = residual.shape
    strides, x_strides = residual.stride(), x.stride()
    _require(residual.dtype == torch.float32, "add_rms_norm: residual is not float32")
    _require(x.dtype == torch.float32, "add_rms_norm: x is not float32")
    _require(strides[1] == 1 == x_strides[1], "add_rms_norm: a row's elements are apart")
    _require(x.shape == residual.shape, "add_rms_norm: x and residual differ in shape")
    _require(_is_vector(weight, torch.float32, dim), "add_rms_norm: weight is not float32 [dim]")
    out = torch.empty(tokens, dim)
    compiled.add_rms_norm(
        out.data_ptr(),
        residual.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        tokens,
        dim,
        strides[0],
        x_strides[0],
        eps,
    )
    return out


def _require_caches(k_cache: Tensor, v_cache: Tensor) -> None:
    _require(k_cache.shape == v_cache.shape and k_cache.dtype == v_cache.dtype, "the two caches differ")
    _require(k_cache.dtype in _DTYPES, "a cache is neither float32 nor bfloat16")
    _require(k_cache.is_contiguous() and v_cache.is_contiguous(), "a cache is not contiguous")


def rope_write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_slots: Tensor,
) -> None:
    """Rotates q in place and writes the rotated k, and v, to the cache. Raises IndexError, with nothing done,
    where a position or a slot is out of range.

    q: [tokens, heads, dim]; k, v: [tokens, kv heads, dim]; cos_sin: float32 [positions, rotary dims], cosines
    then sines; positions: int32 [tokens]; caches: [blocks, kv heads, block size, dim]; cache_slots: int64
    [tokens], block · block size + offset.
    """
    compiled = library()
    if compiled is None:
        reference.rope_write_kv(q, k, v, cos_sin, positions, k_cache, v_cache, cache_slots)
        return
    tokens, heads, dim = q.shape
    blocks, kv_heads, block_size, cache_dim = k_cache.shape
    max_positions, rotary_dim = cos_sin.shape
    q_strides, k_strides, v_strides = q.stride(), k.stride(), v.stride()
    _require_caches(k_cache, v_cache)
    _require(
        k.shape == (tokens, kv_heads, dim) == v.shape, "rope_write_kv: k or v does not fit q and the cache"
    )
    _require(cache_dim == dim, "rope_write_kv: the cache has another head size")
    _require(q.dtype == k.dtype == v.dtype == torch.float32, "rope_write_kv: q, k or v is not float32")
    _require(q_strides[2] == k_strides[2] == v_strides[2] == 1, "rope_write_kv: a head's elements are apart")
    _require(
        cos_sin.dtype == torch.float32 and cos_sin.is_contiguous(), "rope_write_kv: cos_sin is not float32"
    )
    _require(rotary_dim <= dim and rotary_dim % 2 == 0, "rope_write_kv: cos_sin does not fit the head size")
    _require(_is_vector(positions, torch.int32, tokens), "rope_write_kv: positions is not int32 [tokens]")
    _require(_is_vector(cache_slots, torch.int64, tokens), "rope_write_kv: cache_slots is not int64 [tokens]")
    compiled.rope_write_kv(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        cos_sin.data_ptr(),
        positions.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        cache_slots.data_ptr(),
        tokens,
        heads,
        kv_heads,
        dim,
        rotary_dim,
        max_positions,
        blocks,
        block_size,
        *q_strides[:2],
        *k_strides[:2],
        *v_strides[:2],
        _DTYPES[k_cache.dtype],
    )


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
) -> Tensor:
    """Causal attention of q: [tokens, heads, dim] over the cached sequences (``StepInputs`` names the arrays).
    A row's result is the same to the bit however its sequence is cut into chunks.

    ``window`` is how many positions a token sees, itself included (0: all before it).
    """
    compiled = library()
    if compiled is None:
        return reference.paged_attention(
            q, k_cache, v_cache, block_tables, query_starts, context_lens, scale, window, soft_cap
        )
    tokens, heads, dim = q.shape
    blocks, kv_heads, block_size, cache_dim = k_cache.shape
    sequences, table_width = block_tables.shape
    q_strides, table_strides = q.stride(), block_tables.stride()
    _require_caches(k_cache, v_cache)
    _require(cache_dim == dim and heads % kv_heads == 0, "paged_attention: q does not fit the cache")
    _require(q.dtype == torch.float32, "paged_attention: q is not float32")
    _require(q_strides[2] == 1, "paged_attention: a head's elements are apart")
    _require(block_tables.dtype == torch.int32, "paged_attention: block_tables is not int32")
    _require(table_width < 2 or table_strides[1] == 1, "paged_attention: a block table's elements are apart")
    _require(
        _is_vector(query_starts, torch.int32, sequences + 1), "paged_attention: query_starts: int32 [R + 1]"
    )
    _require(_is_vector(context_lens, torch.int32, sequences), "paged_attention: context_lens is not int32 [R]")
    out = torch.empty(tokens, heads, dim)
    compiled.paged_attention(
        out.data_ptr(),
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        block_tables.data_ptr(),
        query_starts.data_ptr(),
        context_lens.data_ptr(),
        tokens,
        sequences,
        heads,
        kv_heads,
        dim,
        blocks,
        block_size,
        table_width,
        table_strides[0],
        *q_strides[:2],
        window,
        _DTYPES[k_cache.dtype],
        scale,
        soft_cap,
    )
    return out


def gated_activation(gate_up: Tensor, kind: Activation) -> Tensor:
    """gate_up: [tokens, 2 · dim], gates first; returns activation(gate) · up."""
    compiled = library()
    if compiled is None:
        return reference.gated_activation(gate_up, kind)
    tokens, both = gate_up.shape
    strides = gate_up.stride()
    _require(gate_up.dtype == torch.float32, "gated_activation: gate_up is not float32")
    _require(both % 2 == 0 and strides[1] == 1, "gated_activation: gate_up is not [tokens, 2 · dim]")
    out = torch.empty(tokens, both // 2)
    compiled.gated_activation(
        out.data_ptr(),
        gate_up.data_ptr(),
        tokens,
        both // 2,
        strides[0],
        _ACTIVATIONS[kind],
    )
    return out


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x: float32 [tokens, columns of weight] → float32 [tokens, rows of weight]; bias: float32.

    Each result is one chain of fused multiply-adds over the columns: the same to the bit at any number of
    tokens and threads and at any level. Where no library was built it is torch's product, which is not.
    """
    compiled = library()
    if compiled is None or weight.is_plain:
        return reference.linear(x, weight.unpack(), bias)
    tokens, inputs = x.shape
    outputs = weight.rows
    x_strides = x.stride()
    _require(x.dtype == torch.float32, "linear: x is not float32")
    _require(inputs == weight.columns, "linear: x does not fit the weight")
    _require(x_strides[1] == 1, "linear: a row's elements are apart")
    _require(bias is None or _is_vector(bias, torch.float32, outputs), "linear: bias is not float32 [out]")
    out = torch.empty(tokens, outputs)
    compiled.linear(
        out.data_ptr(),
        x.data_ptr(),
        weight.storage.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        tokens,
        inputs,
        outputs,
        x_strides[0],
        _DTYPES[weight.dtype],
    )
    return out


def embed(ids: Tensor, weight: PackedWeight, scale: float = 1.0, first_id: int = 0) -> Tensor:
    """float32 [tokens, dim]; ids outside of [first_id, first_id + rows of weight) give rows of zeros."""
    compiled = library()
    if compiled is None or weight.is_plain:
        return reference.embed(ids, weight.unpack(), scale, first_id)
    tokens = ids.shape[0]
    _require(_is_vector(ids, torch.int64, tokens), "embed: ids is not int64 [tokens]")
    out = torch.empty(tokens, weight.columns)
    compiled.embed(
        out.data_ptr(),
        ids.data_ptr(),
        weight.storage.data_ptr(),
        tokens,
        weight.rows,
        weight.columns,
        first_id,
        _DTYPES[weight.dtype],
        scale,
    )
    return out


def draw(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
) -> Tensor:
    """One token id a row, int64 [rows]; -1 where a row's logits hold NaN or +inf, or only -inf.

    logits: float32 [rows, vocabulary]; temperature, top_p, min_p: float32 [rows]; top_k: int64 [rows];
    uniform: float64 [rows], in [0, 1). Temperature 0 takes the best token, the lowest id among equals; top_k
    0, top_p 1 and min_p 0 are off. The filters apply in this order after the temperature, and the token is
    where the kept tokens' distribution function, in order of their ids, passes ``uniform``.
    """
    compiled = library()
    if compiled is None:
        return reference.draw(logits, temperature, top_k, top_p, min_p, uniform)
    rows, vocabulary = logits.shape
    _require(logits.dtype == torch.float32 and logits.stride(1) == 1, "draw: logits is not float32 rows")
    _require(_is_vector(temperature, torch.float32, rows), "draw: temperature is not float32 [rows]")
    _require(_is_vector(top_k, torch.int64, rows), "draw: top_k is not int64 [rows]")
    _require(_is_vector(top_p, torch.float32, rows), "draw: top_p is not float32 [rows]")
    _require(_is_vector(min_p, torch.float32, rows), "draw: min_p is not float32 [rows]")
    _require(_is_vector(uniform, torch.float64, rows), "draw: uniform is not float64 [rows]")
    ids = torch.empty(rows, dtype=torch.int64)
    compiled.draw(
        ids.data_ptr(),
        logits.data_ptr(),
        temperature.data_ptr(),
        top_k.data_ptr(),
        top_p.data_ptr(),
        min_p.data_ptr(),
        uniform.data_ptr(),
        rows,
        vocabulary,
        logits.stride(0),
    )
    return ids
