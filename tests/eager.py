"""The operators, run at once: a program of one operator each, with fresh buffers for what it gives."""

from typing import Any

import torch
from torch import Tensor

from shoal.cuda_ext import ops, reference
from shoal.cuda_ext.binding import library
from shoal.cuda_ext.ops import Activation, Activations
from shoal.cuda_ext.packed_weight import PackedWeight
from shoal.cuda_ext.program import Program
from shoal.cuda_ext.quantised import QuantisedGroups, QuantisedRows, QuantisedWeight

set_threads = ops.set_threads

Weight = PackedWeight | QuantisedWeight


def attention_is_rounded() -> bool:
    """Whether paged_attention multiplies pairs of bfloat16 where the cache holds such."""
    compiled = library()
    return compiled is not None and compiled.level in ("avx512_amx", "avx512_bf16")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    program, out = Program(), torch.full((x.numel() // x.shape[-1], x.shape[-1]), torch.nan)
    ops.rms_norm(program, Activations(out), x, weight, eps)
    program.run()
    return out.view(x.shape)


def add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    program, out = Program(), torch.full(residual.shape, torch.nan)
    ops.add_rms_norm(program, Activations(out), residual, x, weight, eps)
    program.run()
    return out


def gated_activation(gate_up: Tensor, kind: Activation) -> Tensor:
    program, out = Program(), torch.full((len(gate_up), gate_up.shape[1] // 2), torch.nan)
    ops.gated_activation(program, Activations(out), gate_up, kind)
    program.run()
    return out


def quantise(x: Tensor) -> QuantisedRows:
    program, out = Program(), QuantisedRows.empty(*x.shape)
    ops.quantise(program, out, x)
    program.run()
    return out


def rope_write_kv(q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, positions: Tensor, *caches: Tensor) -> None:
    """caches: k_cache, v_cache, cache_slots; in rows, however the operator keeps them."""
    k_cache, v_cache, slots = caches
    kept = reference.in_pairs(k_cache, v_cache) if ops.keeps_pairs(k_cache) else (k_cache, v_cache)
    program = Program()
    ops.rope_write_kv(program, q, k, v, cos_sin, positions, *kept, slots)
    program.run()
    if ops.keeps_pairs(k_cache):
        for cache, written in zip((k_cache, v_cache), reference.in_rows(*kept), strict=True):
            cache[...] = written


def paged_attention(q: Tensor, **others: Any) -> Tensor:
    program, out = Program(), torch.full(q.shape, torch.nan)
    record_paged_attention(program, out, q, **others)
    program.run()
    return out


def record_paged_attention(
    program: Program, out: Tensor, q: Tensor, k_cache: Tensor, v_cache: Tensor, **others: Any
) -> None:
    """Caches in rows, however the operator keeps them."""
    if ops.keeps_pairs(k_cache):
        k_cache, v_cache = reference.in_pairs(k_cache, v_cache)
    ops.paged_attention(program, out, q, k_cache, v_cache, **others)


def take_rows(x: Tensor, indices: Tensor) -> Tensor:
    program, out = Program(), torch.full((len(indices), *x.shape[1:]), torch.nan)
    ops.take_rows(program, out, x, indices)
    program.run()
    return out


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """Quantises ``x`` first where the weight wants it."""
    program, out = Program(), torch.full((len(x), weight.rows), torch.nan)
    quantised = quantise(x) if ops.reads_quantised(weight) else None
    ops.linear(program, out, Activations(x, quantised), weight, bias)
    program.run()
    return out


def tile_weights(groups: QuantisedGroups) -> Tensor:
    """float32 [rows, columns]: what tiles take in the place of ``groups.dequantise()`` (csrc/cpu/tile_weights.h)."""
    weights = groups.dequantise()
    if groups.bits == 8:
        return weights.bfloat16().float()
    return (weights.view(torch.int32) + 0x8000 & ~0xFFFF).view(torch.float32)


def embed(ids: Tensor, weight: Weight, scale: float = 1.0, first_id: int = 0) -> Tensor:
    program, out = Program(), torch.full((len(ids), weight.columns), torch.nan)
    ops.embed(program, out, ids, weight, scale, first_id)
    program.run()
    return out


def draw(logits: Tensor, **columns: Tensor) -> Tensor:
    program, ids = Program(), torch.full((len(logits),), -9, dtype=torch.int64)
    ops.draw(program, ids, logits, **columns)
    program.run()
    return ids
