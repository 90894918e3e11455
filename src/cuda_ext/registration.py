"""The operators as ``torch.ops.shoal.…``, for torch.compile, torch.export and opcheck. Imported by whoever wants them;
the workers never do: a call through torch's dispatcher costs many times what a ``Program`` costs.

One table: an operator's schema, the empty result for its arguments, and how it is added to a program. The
implementation for the CPU is a program of that one operator; the fake one, for tensors without data, is the empty
result alone. A weight is the storage of its ``PackedWeight`` or ``QuantisedWeight``. Activations are given as floats;
``quantise`` makes the integers that ``linear_quantised`` takes; with tiles ``linear`` takes quantised weights as well,
and ``linear_quantised`` takes none. ``gated_linear``, whose rows only a ``Program`` hands on, is not here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from shoal.cuda_ext import ops
from shoal.cuda_ext.ops import Activations
from shoal.cuda_ext.packed_weight import PackedWeight
from shoal.cuda_ext.program import Program
from shoal.cuda_ext.quantised import QuantisedGroups, QuantisedRows, QuantisedWeight, WeightFormat

NAMESPACE = "shoal"


@dataclass(frozen=True, slots=True)
class Operator:
    """``empty`` takes the operator's arguments and gives its result, not yet written; None where it only changes its
    arguments. ``add`` takes a program, that result and the arguments. torch leaves out trailing arguments that have
    their schema's default."""

    schema: str
    empty: Callable[..., Tensor | None]
    add: Callable[..., None]


def _nothing(*_: Any) -> None:
    return None


def _rows_like(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _rms_norm(program: Program, out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    ops.rms_norm(program, Activations(out.flatten(0, -2)), x, weight, eps)


def _add_rms_norm(
    program: Program, out: Tensor, residual: Tensor, x: Tensor, weight: Tensor, eps: float
) -> None:
    ops.add_rms_norm(program, Activations(out), residual, x, weight, eps)


def _rope_write_kv(program: Program, _: None, *arguments: Any) -> None:
    ops.rope_write_kv(program, *arguments)


def _half_rows(gate_up: Tensor, _: str) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


def _gated_activation(program: Program, out: Tensor, gate_up: Tensor, kind: ops.Activation) -> None:
    ops.gated_activation(program, Activations(out), gate_up, kind)


def _empty_panels(matrix: Tensor) -> Tensor:
    rows, columns = matrix.shape
    return PackedWeight.empty(rows, columns, matrix.dtype).storage.to(matrix.device)


def _pack_weight(program: Program, out: Tensor, matrix: Tensor) -> None:
    program.add_function(lambda: PackedWeight(out, *matrix.shape).write(0, matrix))


def _outputs(x: Tensor, panels: Tensor, bias: Tensor | None, outputs: int, *_: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs)


def _linear(
    program: Program, out: Tensor, x: Tensor, panels: Tensor, bias: Tensor | None, outputs: int, *form: Any
) -> None:
    ops.linear(program, out, Activations(x), _weight(panels, outputs, x.shape[1], *form), bias)


def _weight(
    panels: Tensor, rows: int, columns: int, bits: int = 0, group: int = 0, has_offset: bool = False
) -> PackedWeight | QuantisedWeight:
    if bits:
        return QuantisedWeight(panels, rows, columns, WeightFormat(bits, group, has_offset))
    return PackedWeight(panels, rows, columns)


def _empty_codes(x: Tensor) -> Tensor:
    return QuantisedRows.empty(*x.shape).storage.to(x.device)


def _quantise(program: Program, out: Tensor, x: Tensor) -> None:
    ops.quantise(program, QuantisedRows(out, x.shape[1]), x)


def _quantised_outputs(
    x: Tensor, panels: Tensor, bias: Tensor | None, inputs: int, outputs: int, *_: int
) -> Tensor:
    return x.new_empty(x.shape[0], outputs, dtype=torch.float32)


def _linear_quantised(
    program: Program,
    out: Tensor,
    x: Tensor,
    panels: Tensor,
    bias: Tensor | None,
    inputs: int,
    outputs: int,
    *form: Any,
) -> None:
    rows = QuantisedRows(x, inputs)
    ops.linear(program, out, Activations(None, rows), _weight(panels, outputs, inputs, *form), bias)


def _groups(codes: Tensor, scales: Tensor, offsets: Tensor | None, bits: int) -> QuantisedGroups:
    return QuantisedGroups(codes, scales, offsets, bits)


def _empty_quantised_panels(codes: Tensor, scales: Tensor, offsets: Tensor | None, bits: int) -> Tensor:
    groups = _groups(codes, scales, offsets, bits)
    return QuantisedWeight.empty(groups.rows, groups.columns, groups.format).storage.to(codes.device)


def _pack_quantised(
    program: Program, out: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor | None, bits: int
) -> None:
    groups = _groups(codes, scales, offsets, bits)
    packed = QuantisedWeight(out, groups.rows, groups.columns, groups.format)
    program.add_function(lambda: packed.write(0, groups))


def empty_embeddings(ids: Tensor, table: Tensor, rows: int, columns: int, *_: Any) -> Tensor:
    """What an embedding of ``columns`` gives."""
    return ids.new_empty(ids.shape[0], columns, dtype=torch.float32)


def _embed(
    program: Program,
    out: Tensor,
    ids: Tensor,
    panels: Tensor,
    rows: int,
    columns: int,
    scale: float = 1.0,
    first_id: int = 0,
    *form: Any,
) -> None:
    ops.embed(program, out, ids, _weight(panels, rows, columns, *form), scale, first_id)


def _ids(logits: Tensor, *_: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


OPERATORS = {
    "rms_norm": Operator("(Tensor x, Tensor weight, float eps) -> Tensor", _rows_like, _rms_norm),
    "add_rms_norm": Operator(
        "(Tensor(a!) residual, Tensor x, Tensor weight, float eps) -> Tensor", _rows_like, _add_rms_norm
    ),
    "rope_write_kv": Operator(
        "(Tensor(a!) q, Tensor k, Tensor v, Tensor cos_sin, Tensor positions, Tensor(b!) k_cache, Tensor(c!) v_cache, "
        "Tensor cache_slots) -> ()",
        _nothing,
        _rope_write_kv,
    ),
    "paged_attention": Operator(
        "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor query_starts, Tensor context_lens, "
        "float scale, int window=0, float soft_cap=0.0) -> Tensor",
        _rows_like,
        ops.paged_attention,
    ),
    "gated_activation": Operator("(Tensor gate_up, str kind) -> Tensor", _half_rows, _gated_activation),
    "pack_weight": Operator("(Tensor matrix) -> Tensor", _empty_panels, _pack_weight),
    "linear": Operator(
        "(Tensor x, Tensor panels, Tensor? bias, SymInt outputs, int bits=0, int group=0, bool has_offset=False) "
        "-> Tensor",
        _outputs,
        _linear,
    ),
    "quantise": Operator("(Tensor x) -> Tensor", _empty_codes, _quantise),
    "linear_quantised": Operator(
        "(Tensor x, Tensor panels, Tensor? bias, SymInt inputs, SymInt outputs, int bits, int group, bool has_offset) "
        "-> Tensor",
        _quantised_outputs,
        _linear_quantised,
    ),
    "pack_quantised": Operator(
        "(Tensor codes, Tensor scales, Tensor? offsets, int bits) -> Tensor",
        _empty_quantised_panels,
        _pack_quantised,
    ),
    "embed": Operator(
        "(Tensor ids, Tensor panels, SymInt rows, SymInt columns, float scale=1.0, SymInt first_id=0, int bits=0, "
        "int group=0, bool has_offset=False) -> Tensor",
        empty_embeddings,
        _embed,
    ),
    "draw": Operator(
        "(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor uniform) -> Tensor",
        _ids,
        ops.draw,
    ),
}


@cache
def register() -> torch.library.Library:
    """Makes ``torch.ops.shoal``, once a process; it is there as long as what this returns."""
    library = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
    for name, operator in OPERATORS.items():
        library.define(name + operator.schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
        library.impl(name, _implementation(operator), "CPU")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"{NAMESPACE}::{name}", operator.empty, lib=library)
    return library


def _implementation(operator: Operator) -> Callable[..., Tensor | None]:
    def run(*arguments: Any) -> Tensor | None:
        out = operator.empty(*arguments)
        program = Program()
        operator.add(program, out, *arguments)
        program.run()
        return out

    return run
