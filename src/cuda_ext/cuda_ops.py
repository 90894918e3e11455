"""The operators of the CUDA library: typed, checked functions that append one to a ``CudaProgram``, as ``ops`` does for
the CPU library. Called by the workers only.

Activations are bfloat16 or float16, one of them in a program; the residual is float32. Rows may be strided, their
elements must lie side by side. In a deterministic program no result for a row depends on the other rows, nor on how a
sequence is cut into chunks; in others products of many rows, and chunks on sm_90a, have orders of their own.
``fault``: int32 [1], which tells of indices that only a kernel saw to be out of range (the statuses of shoal_cuda.h).
"""

import math
from typing import Final

import torch
from torch import Tensor

from shoal.cuda_ext.checks import is_vector, require
from shoal.cuda_ext.cuda_program import CudaProgram, Field
from shoal.cuda_ext.cuda_weight import CudaWeight
from shoal.cuda_ext.ops import ACTIVATIONS, Activation
from shoal.cuda_ext.program import Count

DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 3, torch.float8_e4m3fn: 4}
SECTION: Final = 256
"""Positions that attention sums up by themselves."""
_HALVES: Final = (torch.bfloat16, torch.float16)


def _form(weight: CudaWeight) -> dict[str, Field]:
    form = weight.format
    return {} if form is None else {"bits": form.bits, "group": form.group, "has_offset": form.has_offset}


def embed(
    program: CudaProgram, out: Tensor, ids: Tensor, weight: CudaWeight, scale: float, first_id: int, rows: Count
) -> None:
    """out: float32 [tokens, columns of weight]; ids: int64 [tokens], those outside of [first_id, first_id + rows of
    weight) give rows of zeros."""
    require(is_vector(ids, torch.int64, len(out)), "embed: ids is not int64 [tokens]")
    require(out.dtype == torch.float32 and out.is_contiguous(), "embed: out is not contiguous float32")
    require(weight.storage.dtype != torch.float8_e4m3fn, "embed: there is no kernel for an fp8 table")
    require(out.shape[1] == weight.columns, "embed: out does not fit the weight")
    kind = _form(weight) or {"dtype": DTYPES[weight.storage.dtype]}
    sizes: dict[str, Field] = {"tokens": rows, "rows": weight.rows, "dim": weight.columns, "first_id": first_id}
    program.add("embed", out=out, ids=ids, table=weight.storage, **sizes, **kind, scale=scale)


def rms_norm(program: CudaProgram, out: Tensor, x: Tensor, weight: Tensor, eps: float, rows: Count) -> None:
    """x: [rows, dim] or [rows, heads, dim], also float32; out: as x, contiguous, maybe x itself; weight: float32."""
    dim, inner = x.shape[-1], x.shape[1] if x.dim() == 3 else 1
    require(out.dtype in _HALVES and x.dtype in (out.dtype, torch.float32), "rms_norm: other types")
    require(out.shape == x.shape and out.is_contiguous() and x.stride(-1) == 1, "rms_norm: out does not fit x")
    require(is_vector(weight, torch.float32, dim), "rms_norm: weight is not float32 [dim]")
    program.add(
        "rms_norm", out=out, x=x, weight=weight, outer=rows, inner=inner, dim=dim, outer_stride=x.stride(0),
        inner_stride=x.stride(1) if x.dim() == 3 else 0, x_dtype=DTYPES[x.dtype], dtype=DTYPES[out.dtype], eps=eps,
    )  # fmt: skip


def add_rms_norm(
    program: CudaProgram, out: Tensor, residual: Tensor, x: Tensor, weight: Tensor, eps: float, rows: Count
) -> None:
    """Adds x to residual (float32 [rows, dim]) in place; out: the normalised sum, contiguous."""
    dim = residual.shape[1]
    require(residual.dtype == torch.float32, "add_rms_norm: residual is not float32")
    require(out.dtype == x.dtype and out.dtype in _HALVES, "add_rms_norm: other types")
    require(residual.shape == x.shape == out.shape and out.is_contiguous(), "add_rms_norm: other shapes")
    require(residual.stride(1) == 1 == x.stride(1), "add_rms_norm: a row's elements are apart")
    require(is_vector(weight, torch.float32, dim), "add_rms_norm: weight is not float32 [dim]")
    program.add(
        "add_rms_norm", out=out, residual=residual, x=x, weight=weight, rows=rows, dim=dim,
        residual_stride=residual.stride(0), x_stride=x.stride(0), dtype=DTYPES[x.dtype], eps=eps,
    )  # fmt: skip


def _require_caches(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    require(k_cache.shape == v_cache.shape and k_cache.dtype == v_cache.dtype, "the two caches differ")
    require(k_cache.dtype in (*_HALVES, torch.float8_e4m3fn), "a cache is neither 16-bit floats nor fp8")
    require(k_cache.is_contiguous() and v_cache.is_contiguous(), "a cache is not contiguous")
    require(k_cache.shape[3] == q.shape[2] and q.stride(2) == 1, "q does not fit the cache")
    require(q.dtype in _HALVES, "q is not of 16 bits")


Scales = tuple[Tensor, Tensor]
"""Of an fp8 cache's keys and values: float32 [KV heads] each, what its elements are multiplied with."""


def _scales(scales: Scales | None, k_cache: Tensor) -> dict[str, Field]:
    if scales is None:
        return {}
    require(k_cache.dtype == torch.float8_e4m3fn, "only an fp8 cache has scales")
    for part in scales:
        require(is_vector(part, torch.float32, k_cache.shape[1]), "scales are not float32 [KV heads]")
    return {"k_scales": scales[0], "v_scales": scales[1]}


def rope_write_kv(
    program: CudaProgram,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_slots: Tensor,
    fault: Tensor,
    rows: Count,
    scales: Scales | None = None,
) -> None:
    """Rotates q in place and writes the rotated k, and v, to the cache; tensors as in ``ops.rope_write_kv``. What is
    beyond an fp8 cache's range, 448 times its scale, becomes the greatest that it holds."""
    (most, heads, dim), (blocks, kv_heads, block_size, _) = q.shape, k_cache.shape
    _require_caches(q, k_cache, v_cache)
    require(k.shape == (most, kv_heads, dim) == v.shape, "rope_write_kv: k or v does not fit q and the cache")
    require(q.dtype == k.dtype == v.dtype, "rope_write_kv: q, k and v differ in type")
    require(k.stride(2) == 1 == v.stride(2), "rope_write_kv: a head's elements are apart")
    require(cos_sin.dtype == torch.float32 and cos_sin.is_contiguous(), "rope_write_kv: cos_sin is not float32")
    require(is_vector(positions, torch.int32, most), "rope_write_kv: positions is not int32 [tokens]")
    require(is_vector(cache_slots, torch.int64, most), "rope_write_kv: cache_slots is not int64 [tokens]")
    program.add(
        "rope_write_kv", q=q, k=k, v=v, cos_sin=cos_sin, positions=positions, k_cache=k_cache, v_cache=v_cache,
        cache_slots=cache_slots, fault=fault, tokens=rows, heads=heads, kv_heads=kv_heads, dim=dim,
        rotary_dim=cos_sin.shape[1], max_positions=cos_sin.shape[0], blocks=blocks, block_size=block_size,
        q_token_stride=q.stride(0), q_head_stride=q.stride(1), k_token_stride=k.stride(0), k_head_stride=k.stride(1),
        v_token_stride=v.stride(0), v_head_stride=v.stride(1), dtype=DTYPES[q.dtype],
        cache_dtype=DTYPES[k_cache.dtype], **_scales(scales, k_cache),
    )  # fmt: skip


def workspace_floats(sequences: int, heads: int, dim: int, most_context: int) -> int:
    """What ``paged_attention`` needs to put the sections of single tokens together. The last ones, one a head of each
    sequence, count blocks: they are to be zeros before the first run, and are after each."""
    return sequences * heads * (math.ceil(most_context / SECTION) * (dim + 2) + 1)


def paged_attention(
    program: CudaProgram,
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    workspace: Tensor,
    fault: Tensor,
    scale: float,
    window: int,
    soft_cap: float,
    rows: Count,
    sequences: Count,
    most_tokens: Count,
    most_context: Count,
    scales: Scales | None = None,
) -> None:
    """Causal attention; tensors as in ``ops.paged_attention``. workspace: float32, as ``workspace_floats`` says for the
    greatest counts. No sequence of a run has more new tokens or a longer context than the two last counts."""
    (_, heads, dim), (blocks, kv_heads, block_size, _) = q.shape, k_cache.shape
    table_width = block_tables.shape[1]
    needed = workspace_floats(sequences.most, heads, dim, most_context.most)
    _require_caches(q, k_cache, v_cache)
    require(heads % kv_heads == 0, "paged_attention: q does not fit the cache")
    require(out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous(), "paged_attention: out")
    require(block_tables.dtype == torch.int32 and block_tables.stride(1) == 1, "paged_attention: block_tables")
    require(query_starts.dtype == context_lens.dtype == torch.int32, "paged_attention: lengths are not int32")
    require(is_vector(workspace, torch.float32, workspace.numel()), "paged_attention: workspace is not float32")
    require(workspace.numel() >= needed, f"paged_attention: workspace has less than {needed} floats")
    program.add(
        "paged_attention", out=out, q=q, k_cache=k_cache, v_cache=v_cache, block_tables=block_tables,
        query_starts=query_starts, context_lens=context_lens, workspace=workspace, fault=fault, tokens=rows,
        sequences=sequences, heads=heads, kv_heads=kv_heads, dim=dim, blocks=blocks, block_size=block_size,
        table_width=table_width, table_stride=block_tables.stride(0), q_token_stride=q.stride(0),
        q_head_stride=q.stride(1), window=window, most_tokens=most_tokens, most_context=most_context,
        workspace_floats=workspace.numel(), dtype=DTYPES[q.dtype], cache_dtype=DTYPES[k_cache.dtype],
        is_deterministic=program.is_deterministic, scale=scale, soft_cap=soft_cap, **_scales(scales, k_cache),
    )  # fmt: skip


def gated_activation(program: CudaProgram, out: Tensor, gate_up: Tensor, kind: Activation, rows: Count) -> None:
    """gate_up: [rows, 2 · dim], gates first; out: activation(gate) · up, contiguous."""
    dim = gate_up.shape[1] // 2
    require(out.dtype == gate_up.dtype and out.dtype in _HALVES, "gated_activation: other types")
    require(out.shape == (len(gate_up), dim) and out.is_contiguous(), "gated_activation: out does not fit")
    require(gate_up.stride(1) == 1, "gated_activation: a row's elements are apart")
    kinds = {"kind": ACTIVATIONS[kind], "dtype": DTYPES[out.dtype]}
    program.add(
        "gated_activation", out=out, gate_up=gate_up, rows=rows, dim=dim, row_stride=gate_up.stride(0), **kinds
    )


def linear(
    program: CudaProgram, out: Tensor, x: Tensor, weight: CudaWeight, bias: Tensor | None, rows: Count
) -> None:
    """out: [rows, rows of weight] as x or float32, maybe columns of a wider matrix; bias: float32."""
    outputs, inputs = weight.rows, weight.columns
    require(out.dtype in (x.dtype, torch.float32) and out.stride(1) == 1, "linear: out is of another type")
    require(out.shape == (len(x), outputs) and x.shape[1] == inputs, "linear: x or out does not fit the weight")
    require(x.dtype in _HALVES and x.stride(1) == 1, "linear: x is not rows of 16 bits")
    require(bias is None or is_vector(bias, torch.float32, outputs), "linear: bias is not float32 [out]")
    sizes: dict[str, Field] = {"rows": rows, "inputs": inputs, "outputs": outputs}
    sizes |= {"row_stride": x.stride(0), "out_stride": out.stride(0), "out_dtype": DTYPES[out.dtype]}
    sizes |= {"dtype": DTYPES[x.dtype], "is_deterministic": program.is_deterministic}
    if weight.format is None:
        require(
            weight.storage.dtype in (x.dtype, torch.float8_e4m3fn), "linear: x and the weight differ in type"
        )
        sizes |= {"weight_stride": weight.storage.stride(0), "weight_dtype": DTYPES[weight.storage.dtype]}
        program.add("linear", out=out, x=x, weight=weight.storage, scales=weight.scales, bias=bias, **sizes)
        return
    program.add("linear_quantised", out=out, x=x, panels=weight.storage, bias=bias, **sizes, **_form(weight))
