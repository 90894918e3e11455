"""The CUDA operators as ``torch.ops.shoal_cuda.…``: what ``registration`` is for the CPU's, by a table of the same
kind. Imported by whoever wants them; the workers never do.

Tensors are on the device that the library is for, the CPU where it is emulated. A weight is the storage of its
``CudaWeight``. Operators that tell of what is out of range take ``fault``, int32 [1], as ``cuda_ops`` does.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from shoal.cuda_ext import cuda_ops as ops
from shoal.cuda_ext.cuda_binding import CudaLibrary
from shoal.cuda_ext.cuda_program import CudaProgram
from shoal.cuda_ext.cuda_weight import TILE_INPUTS, TILE_OUTPUTS, CudaWeight, tile_bytes
from shoal.cuda_ext.ops import Activation
from shoal.cuda_ext.program import Count
from shoal.cuda_ext.quantised import WeightFormat
from shoal.cuda_ext.registration import Operator, empty_embeddings

NAMESPACE = "shoal_cuda"


def _rows(x: Tensor) -> Count:
    return Count(x.shape[0])


def _nothing(*_: Any) -> None:
    return None


def _rows_like(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _rms_norm(program: CudaProgram, out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    ops.rms_norm(program, out, x, weight, eps, _rows(x))


def _normed_sum(_: Tensor, x: Tensor, *__: Any) -> Tensor:
    return x.new_empty(x.shape)


def _add_rms_norm(
    program: CudaProgram, out: Tensor, residual: Tensor, x: Tensor, weight: Tensor, eps: float
) -> None:
    ops.add_rms_norm(program, out, residual, x, weight, eps, _rows(x))


def _scales(k_scales: Tensor | None, v_scales: Tensor | None) -> ops.Scales | None:
    return None if k_scales is None or v_scales is None else (k_scales, v_scales)


def _rope_write_kv(
    program: CudaProgram,
    _: None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_slots: Tensor,
    fault: Tensor,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    scales = _scales(k_scales, v_scales)
    ops.rope_write_kv(
        program, q, k, v, cos_sin, positions, k_cache, v_cache, cache_slots, fault, _rows(q), scales
    )


def _paged_attention(
    program: CudaProgram,
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    fault: Tensor,
    scale: float,
    most_tokens: int,
    window: int = 0,
    soft_cap: float = 0.0,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    (_, heads, dim), most_context = q.shape, block_tables.shape[1] * k_cache.shape[2]
    floats = ops.workspace_floats(block_tables.shape[0], heads, dim, most_context)
    workspace = q.new_zeros(floats, dtype=torch.float32)
    sizes = (_rows(q), _rows(block_tables), Count(most_tokens), Count(most_context))
    ops.paged_attention(
        program, out, q, k_cache, v_cache, block_tables, query_starts, context_lens, workspace, fault, scale,
        window, soft_cap, *sizes, _scales(k_scales, v_scales),
    )  # fmt: skip


def _half_rows(gate_up: Tensor, _: str) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


def _gated_activation(program: CudaProgram, out: Tensor, gate_up: Tensor, kind: Activation) -> None:
    ops.gated_activation(program, out, gate_up, kind, _rows(gate_up))


def _outputs(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _linear(
    program: CudaProgram, out: Tensor, x: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor | None
) -> None:
    outputs, inputs = weight.shape
    ops.linear(program, out, x, CudaWeight(weight, outputs, inputs, scales=scales), bias, _rows(x))


def _format(bits: int, group: int, has_offset: bool = False) -> WeightFormat:
    return WeightFormat(bits, group, has_offset)


def _quantised_outputs(x: Tensor, panels: Tensor, bias: Tensor | None, outputs: int, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], outputs)


def _linear_quantised(
    program: CudaProgram,
    out: Tensor,
    x: Tensor,
    panels: Tensor,
    bias: Tensor | None,
    outputs: int,
    *form: Any,
) -> None:
    weight = CudaWeight(panels, outputs, x.shape[1], _format(*form))
    ops.linear(program, out, x, weight, bias, _rows(x))


def _empty_panels(codes: Tensor, scales: Tensor, offsets: Tensor | None, bits: int) -> Tensor:
    rows, count, group = codes.shape
    form = WeightFormat(bits, group, offsets is not None)
    return codes.new_empty(-(-rows // TILE_OUTPUTS), -(-count * group // TILE_INPUTS), tile_bytes(form))


def _pack_quantised(
    program: CudaProgram, out: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor | None, bits: int
) -> None:
    rows, count, group = codes.shape
    sizes = {"rows": rows, "groups": count, "bits": bits, "group": group}
    program.add("pack_quantised", panels=out, codes=codes, scales=scales, offsets=offsets, **sizes)


def _plain(panels: Tensor, rows: int, columns: int, dtype: torch.dtype, *_: Any) -> Tensor:
    return panels.new_empty(rows, columns, dtype=dtype)


def _dequantise(
    program: CudaProgram, out: Tensor, panels: Tensor, rows: int, columns: int, dtype: torch.dtype, *form: Any
) -> None:
    bits, group, has_offset = form
    sizes = {"rows": rows, "columns": columns, "dtype": ops.DTYPES[dtype]}
    program.add("dequantise", out=out, panels=panels, **sizes, bits=bits, group=group, has_offset=has_offset)


def _embed(
    program: CudaProgram,
    out: Tensor,
    ids: Tensor,
    table: Tensor,
    rows: int,
    columns: int,
    scale: float = 1.0,
    first_id: int = 0,
    *form: Any,
) -> None:
    weight = CudaWeight(table, rows, columns, _format(*form) if table.dtype == torch.uint8 else None)
    ops.embed(program, out, ids, weight, scale, first_id, _rows(ids))


def _ids(logits: Tensor, *_: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


def _draw(program: CudaProgram, out: Tensor, logits: Tensor, *columns: Tensor) -> None:
    names = ("temperature", "top_k", "top_p", "min_p", "uniform")
    given = dict(zip(names, columns, strict=True))
    rows, vocabulary = logits.shape
    sizes = {"rows": rows, "vocabulary": vocabulary, "row_stride": logits.stride(0)}
    program.add("draw", ids=out, logits=logits, **given, **sizes)


OPERATORS = {
    "rms_norm": Operator("(Tensor x, Tensor weight, float eps) -> Tensor", _rows_like, _rms_norm),
    "add_rms_norm": Operator(
        "(Tensor(a!) residual, Tensor x, Tensor weight, float eps) -> Tensor", _normed_sum, _add_rms_norm
    ),
    "rope_write_kv": Operator(
        "(Tensor(a!) q, Tensor k, Tensor v, Tensor cos_sin, Tensor positions, Tensor(b!) k_cache, Tensor(c!) v_cache, "
        "Tensor cache_slots, Tensor(d!) fault, Tensor? k_scales=None, Tensor? v_scales=None) -> ()",
        _nothing,
        _rope_write_kv,
    ),
    "paged_attention": Operator(
        "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor query_starts, Tensor context_lens, "
        "Tensor(a!) fault, float scale, int most_tokens, int window=0, float soft_cap=0.0, Tensor? k_scales=None, "
        "Tensor? v_scales=None) -> Tensor",
        _rows_like,
        _paged_attention,
    ),
    "gated_activation": Operator("(Tensor gate_up, str kind) -> Tensor", _half_rows, _gated_activation),
    "linear": Operator("(Tensor x, Tensor weight, Tensor? scales, Tensor? bias) -> Tensor", _outputs, _linear),
    "linear_quantised": Operator(
        "(Tensor x, Tensor panels, Tensor? bias, SymInt outputs, int bits, int group, bool has_offset) -> Tensor",
        _quantised_outputs,
        _linear_quantised,
    ),
    "pack_quantised": Operator(
        "(Tensor codes, Tensor scales, Tensor? offsets, int bits) -> Tensor", _empty_panels, _pack_quantised
    ),
    "dequantise": Operator(
        "(Tensor panels, SymInt rows, SymInt columns, ScalarType dtype, int bits, int group, bool has_offset) "
        "-> Tensor",
        _plain,
        _dequantise,
    ),
    "embed": Operator(
        "(Tensor ids, Tensor table, SymInt rows, SymInt columns, float scale=1.0, SymInt first_id=0, int bits=0, "
        "int group=0, bool has_offset=False) -> Tensor",
        empty_embeddings,
        _embed,
    ),
    "draw": Operator(
        "(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor uniform) -> Tensor",
        _ids,
        _draw,
    ),
}


@cache
def register(loaded: CudaLibrary) -> torch.library.Library:
    """Makes ``torch.ops.shoal_cuda`` of one library, once a process; it is there as long as what this returns."""
    library = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
    key = "CPU" if loaded.is_emulated else "CUDA"
    for name, operator in OPERATORS.items():
        library.define(name + operator.schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
        library.impl(name, _implementation(loaded, operator), key)  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"{NAMESPACE}::{name}", operator.empty, lib=library)
    return library


def _implementation(loaded: CudaLibrary, operator: Operator) -> Callable[..., Tensor | None]:
    def run(*arguments: Any) -> Tensor | None:
        out = operator.empty(*arguments)
        device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
        program = CudaProgram(loaded, device)
        operator.add(program, out, *arguments)
        program.run()
        return out

    return run
