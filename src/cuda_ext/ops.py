"""The operator table of the decoder and the sampler: typed, checked functions that append an operator to a ``Program``.
Called by the workers only.

Each operator runs on the compiled library where that was built, and else on its plain twin in ``reference.py``, which
is its specification. No compiled operator's result for a row depends on the other rows of the call or on the number
of threads. Activations are float32 or ``QuantisedRows``; weights and the cache may be narrower. Tensors are on the CPU
and stay where they are as long as the program lives; rows may be strided, their elements must lie side by side.
``rows`` is how many of the buffers' rows take part in a run; without it, all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeGuard

import torch
from torch import Tensor

from shoal.cuda_ext import reference
from shoal.cuda_ext.binding import library
from shoal.cuda_ext.checks import is_vector, require
from shoal.cuda_ext.packed_weight import PackedWeight
from shoal.cuda_ext.program import Count, Program, Value, no_twin
from shoal.cuda_ext.quantised import GROUP, QuantisedRows, QuantisedWeight, TileRows
from shoal.cuda_ext.shared_region import SharedRegion

Activation = Literal["silu", "gelu_tanh"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_CACHE_DTYPES = {**_DTYPES, torch.int8: 2}
_PAIRS = 3
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


@dataclass(frozen=True, slots=True)
class Activations:
    """Rows as floats [rows, columns], as integers, or both: what the operators that read them need. ``tiles`` are those
    of ``gated_linear``."""

    plain: Tensor | None
    quantised: QuantisedRows | None = None
    tiles: TileRows | None = None

    @property
    def rows(self) -> int:
        """How many the buffers have."""
        if self.tiles is not None:
            return self.tiles.rows
        held = self.plain if self.plain is not None else self._quantised.storage
        return held.shape[0]

    @property
    def columns(self) -> int:
        """Elements of a row."""
        if self.tiles is not None:
            return self.tiles.columns
        return self.plain.shape[1] if self.plain is not None else self._quantised.columns

    @property
    def _quantised(self) -> QuantisedRows:
        if self.quantised is None:
            raise ValueError("activations hold nothing")
        return self.quantised

    def write(self, count: int, values: Tensor, outliers: int = reference.OUTLIERS) -> None:
        """For the torch twins: the first ``count`` rows. outliers: as ``reference.quantise`` has it."""
        if self.plain is not None:
            self.plain[:count] = values.to(self.plain.dtype)
        if self.quantised is not None:
            self.quantised.storage[:count] = reference.quantise(
                values, self.quantised.storage.shape[1], outliers
            )


def _counted(rows: Count | None, most: int) -> Count:
    if rows is None:
        return Count(most)
    require(rows.most <= most, f"{rows.most} rows do not fit a buffer of {most}")
    return rows


def _require_output(name: str, out: Activations, most: int, columns: int) -> None:
    require(out.columns == columns, f"{name}: out has rows of {out.columns}, not {columns}")
    require(out.rows >= most, f"{name}: out has {out.rows} rows, not {most}")
    if out.plain is not None:
        require(out.plain.dtype == torch.float32, f"{name}: out is not float32")
        require(out.plain.is_contiguous(), f"{name}: out is not contiguous")


def set_threads(count: int, cpus: Sequence[int] = ()) -> None:
    """How many threads the operators use, and the processors that those stay on, one a thread (none: any). The compiled
    operators' results do not depend on it. Where they do the work, torch gets one thread: two pools would fight."""
    compiled = library()
    torch.set_num_threads(count if compiled is None else 1)
    if compiled is not None:
        compiled.set_threads(count, cpus)


def rms_norm(
    program: Program, out: Activations, x: Tensor, weight: Tensor, eps: float, rows: Count | None = None
) -> None:
    """x: float32 [rows, dim], or [rows, heads, dim] with out: [rows · heads, dim]; weight: [dim]."""
    dim, inner = x.shape[-1], x.shape[1] if x.dim() == 3 else 1
    rows = _counted(rows, x.shape[0])
    require(x.dtype == torch.float32 and x.stride(-1) == 1, "rms_norm: x is not float32 rows")
    require(is_vector(weight, torch.float32, dim), "rms_norm: weight is not float32 [dim]")
    _require_output("rms_norm", out, x.shape[0] * inner, dim)

    def twin() -> None:
        count = rows.value
        out.write(count * inner, reference.rms_norm(x[:count], weight, eps).reshape(-1, dim))

    strides = (x.stride(0), x.stride(1) if x.dim() == 3 else 0)
    quantised = out.quantised.storage if out.quantised else None
    program.add("rms_norm", [out.plain, quantised, x, weight, rows, inner, dim, *strides, eps], twin)


def add_rms_norm(
    program: Program,
    out: Activations,
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    rows: Count | None = None,
) -> None:
    """Adds x to residual (float32 [rows, dim] both) in place; out: the normalised sum."""
    most, dim = residual.shape
    rows = _counted(rows, most)
    strides, x_strides = residual.stride(), x.stride()
    require(residual.dtype == torch.float32, "add_rms_norm: residual is not float32")
    require(x.dtype == torch.float32, "add_rms_norm: x is not float32")
    require(strides[1] == 1 == x_strides[1], "add_rms_norm: a row's elements are apart")
    require(x.shape == residual.shape, "add_rms_norm: x and residual differ in shape")
    require(is_vector(weight, torch.float32, dim), "add_rms_norm: weight is not float32 [dim]")
    _require_output("add_rms_norm", out, most, dim)

    def twin() -> None:
        count = rows.value
        out.write(count, reference.add_rms_norm(residual[:count], x[:count], weight, eps))

    quantised = out.quantised.storage if out.quantised else None
    values = [out.plain, quantised, residual, x, weight, rows, dim, strides[0], x_strides[0], eps]
    program.add("add_rms_norm", values, twin)


def cache_row_elements(dim: int, dtype: torch.dtype) -> int:
    """Elements that one head of one position takes in a cache: an int8 row's scales, floats, lie behind its codes."""
    return dim + reference.scale_bytes(dim) if dtype == torch.int8 else dim


def _require_caches(k_cache: Tensor, v_cache: Tensor, dim: int) -> None:
    require(k_cache.shape == v_cache.shape and k_cache.dtype == v_cache.dtype, "the two caches differ")
    require(k_cache.dtype in _CACHE_DTYPES, "a cache is neither float32, bfloat16 nor int8")
    require(k_cache.shape[3] == cache_row_elements(dim, k_cache.dtype), "a cache has another head size")
    require(k_cache.is_contiguous() and v_cache.is_contiguous(), "a cache is not contiguous")


def keeps_pairs(cache: Tensor) -> bool:
    """Whether the operators keep this cache as ``reference.in_pairs`` lays it."""
    compiled, (_, _, block_size, dim) = library(), cache.shape
    if compiled is None or cache.dtype != torch.bfloat16:
        return False
    return compiled.pairs_positions(dim, block_size)


def _cache_code(cache: Tensor) -> int:
    return _PAIRS if keeps_pairs(cache) else _CACHE_DTYPES[cache.dtype]


def rope_write_kv(
    program: Program,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_slots: Tensor,
    rows: Count | None = None,
) -> None:
    """Rotates q in place and writes the rotated k, and v, to the cache. A run raises IndexError, with nothing done,
    where a position or a slot is out of range.

    q: [tokens, heads, dim]; k, v: [tokens, kv heads, dim]; cos_sin: float32 [positions, rotary dims], cosines
    then sines; positions: int32 [tokens]; caches: [blocks, kv heads, block size, dim], or of int8
    ``cache_row_elements``; cache_slots: int64
    [tokens], block · block size + offset.
    """
    most, heads, dim = q.shape
    rows = _counted(rows, most)
    blocks, kv_heads, block_size, _ = k_cache.shape
    max_positions, rotary_dim = cos_sin.shape
    q_strides, k_strides, v_strides = q.stride(), k.stride(), v.stride()
    _require_caches(k_cache, v_cache, dim)
    require(k.shape == (most, kv_heads, dim) == v.shape, "rope_write_kv: k or v does not fit q and the cache")
    require(q.dtype == k.dtype == v.dtype == torch.float32, "rope_write_kv: q, k or v is not float32")
    require(q_strides[2] == k_strides[2] == v_strides[2] == 1, "rope_write_kv: a head's elements are apart")
    require(cos_sin.dtype == torch.float32 and cos_sin.is_contiguous(), "rope_write_kv: cos_sin is not float32")
    require(rotary_dim <= dim and rotary_dim % 2 == 0, "rope_write_kv: cos_sin does not fit the head size")
    require(is_vector(positions, torch.int32, most), "rope_write_kv: positions is not int32 [tokens]")
    require(is_vector(cache_slots, torch.int64, most), "rope_write_kv: cache_slots is not int64 [tokens]")

    def twin() -> None:
        part = slice(0, rows.value)
        caches = (k_cache, v_cache, cache_slots[part])
        reference.rope_write_kv(q[part], k[part], v[part], cos_sin, positions[part], *caches)

    program.add(
        "rope_write_kv",
        [
            *(q, k, v, cos_sin, positions, k_cache, v_cache, cache_slots),
            *(rows, heads, kv_heads, dim, rotary_dim, max_positions, blocks, block_size),
            *(*q_strides[:2], *k_strides[:2], *v_strides[:2]),
            _cache_code(k_cache),
        ],
        twin,
    )


def paged_attention(
    program: Program,
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    rows: Count | None = None,
    sequences: Count | None = None,
) -> None:
    """Causal attention of q: [tokens, heads, dim] over the cached sequences (``StepInputs`` names the arrays);
    out: as q, contiguous. A row's result is the same to the bit however its sequence is cut into chunks.

    ``window`` is how many positions a token sees, itself included (0: all before it).
    """
    most, heads, dim = q.shape
    rows, sequences = _counted(rows, most), _counted(sequences, block_tables.shape[0])
    blocks, kv_heads, block_size, _ = k_cache.shape
    most_sequences, table_width = block_tables.shape
    q_strides, table_strides = q.stride(), block_tables.stride()
    _require_caches(k_cache, v_cache, dim)
    require(heads % kv_heads == 0, "paged_attention: q does not fit the cache")
    require(q.dtype == torch.float32, "paged_attention: q is not float32")
    require(q_strides[2] == 1, "paged_attention: a head's elements are apart")
    require(out.dtype == torch.float32 and out.shape == q.shape, "paged_attention: out does not fit q")
    require(out.is_contiguous(), "paged_attention: out is not contiguous")
    require(block_tables.dtype == torch.int32, "paged_attention: block_tables is not int32")
    require(table_width < 2 or table_strides[1] == 1, "paged_attention: a block table's elements are apart")
    require(
        is_vector(query_starts, torch.int32, most_sequences + 1),
        "paged_attention: query_starts: int32 [R + 1]",
    )
    require(
        is_vector(context_lens, torch.int32, most_sequences), "paged_attention: context_lens is not int32 [R]"
    )

    def twin() -> None:
        count, part = rows.value, slice(0, sequences.value)
        out[:count] = reference.paged_attention(
            q[:count], k_cache, v_cache, block_tables[part], query_starts[: part.stop + 1], context_lens[part],
            scale, window, soft_cap,
        )  # fmt: skip

    program.add(
        "paged_attention",
        [
            *(out, q, k_cache, v_cache, block_tables, query_starts, context_lens),
            *(rows, sequences, heads, kv_heads, dim, blocks, block_size, table_width, table_strides[0]),
            *(*q_strides[:2], window, _cache_code(k_cache), scale, soft_cap),
        ],
        twin,
    )


def gated_activation(
    program: Program, out: Activations, gate_up: Tensor, kind: Activation, rows: Count | None = None
) -> None:
    """gate_up: float32 [rows, 2 · dim], gates first; out: activation(gate) · up."""
    most, both = gate_up.shape
    rows = _counted(rows, most)
    strides = gate_up.stride()
    require(gate_up.dtype == torch.float32, "gated_activation: gate_up is not float32")
    require(both % 2 == 0 and strides[1] == 1, "gated_activation: gate_up is not [tokens, 2 · dim]")
    _require_output("gated_activation", out, most, both // 2)

    def twin() -> None:
        gated = reference.gated_activation(gate_up[: rows.value], kind)
        out.write(rows.value, gated, reference.GATED_OUTLIERS)

    quantised = out.quantised.storage if out.quantised else None
    values = [out.plain, quantised, gate_up, rows, both // 2, strides[0], ACTIVATIONS[kind]]
    program.add("gated_activation", values, twin)


def quantise(program: Program, out: QuantisedRows, x: Tensor, rows: Count | None = None) -> None:
    """x: float32 [rows, columns]; a group's scale is its largest magnitude / 127, codes are rounded to nearest even."""
    most, columns = x.shape
    rows = _counted(rows, most)
    require(x.dtype == torch.float32 and x.stride(1) == 1, "quantise: x is not float32 rows")
    require(out.columns == columns and out.storage.shape[0] >= most, "quantise: out does not fit x")

    def twin() -> None:
        Activations(None, out).write(rows.value, x[: rows.value])

    program.add("quantise", [out.storage, x, rows, columns, x.stride(0)], twin)


def linear(
    program: Program,
    out: Tensor,
    x: Activations,
    weight: PackedWeight | QuantisedWeight,
    bias: Tensor | None = None,
    rows: Count | None = None,
) -> None:
    """out: float32 [rows, rows of weight], maybe columns of a wider matrix; bias: float32. Weights that
    ``reads_quantised`` names read ``x.quantised``, the others ``x.plain``, or ``x.tiles`` where there are such.

    Each result is one chain of fused multiply-adds over the columns, or over their groups: the same to the bit at any
    number of rows and threads, and at any level without tiles. Where no library was built it is torch's product, which
    is not.
    """
    most, outputs = out.shape
    rows = _counted(rows, most)
    require(out.dtype == torch.float32 and out.stride(1) == 1, "linear: out is not float32 rows")
    require(outputs == weight.rows, "linear: out does not fit the weight")
    require(x.columns == weight.columns and x.rows >= rows.most, "linear: x does not fit the weight and out")
    require(bias is None or is_vector(bias, torch.float32, outputs), "linear: bias is not float32 [out]")
    if isinstance(weight, QuantisedWeight) and (x.tiles is not None or reads_quantised(weight)):
        _linear_quantised(program, out, x, weight, bias, rows)
        return
    plain = x.plain
    if plain is None:
        raise ValueError("linear: the weight needs x in float32")
    require(plain.dtype == torch.float32 and plain.stride(1) == 1, "linear: x is not float32 rows")

    def twin() -> None:
        assert isinstance(weight, PackedWeight)
        out[: rows.value] = reference.linear(plain[: rows.value], weight.unpack(), bias)

    sizes: list[Value] = [rows, x.columns, outputs, plain.stride(0), out.stride(0)]
    program.add("linear", [out, plain, weight.storage, bias, *sizes, *_kind(weight)], twin)


def reads_quantised(weight: PackedWeight | QuantisedWeight) -> TypeGuard[QuantisedWeight]:
    """Whether ``linear`` multiplies the weight with quantised activations. Where the processor has tiles for bfloat16,
    it makes integers bfloat16 on their way, and takes activations in float32."""
    compiled = library()
    return isinstance(weight, QuantisedWeight) and not (compiled is not None and compiled.has_tiles)


def gates_in_product(gate_up: QuantisedWeight | PackedWeight, down: QuantisedWeight | PackedWeight) -> bool:
    """Whether ``gated_linear`` takes the halves of ``gate_up`` and makes what ``linear`` with ``down`` reads."""
    compiled = library()
    integers = isinstance(gate_up, QuantisedWeight) and isinstance(down, QuantisedWeight)
    return integers and compiled is not None and compiled.has_tiles and gate_up.rows % (2 * GROUP) == 0


def gated_linear(
    program: Program,
    out: TileRows,
    x: Tensor,
    weight: QuantisedWeight,
    bias: Tensor | None,
    kind: Activation,
    rows: Count | None = None,
) -> None:
    """out: activation(gate) · up of x · weightᵀ + bias, whose first half of columns are the gates, as bfloat16; x:
    float32 [rows, columns of weight]. The sums are those of ``linear``, to the bit; the activation is within 2^-15 of
    itself before its product is rounded. For levels with tiles: ``gates_in_product``."""
    most, columns = x.shape
    rows = _counted(rows, most)
    gate, up = weight.halves()
    require(x.dtype == torch.float32 and x.stride(1) == 1, "gated_linear: x is not float32 rows")
    require(columns == weight.columns, "gated_linear: x does not fit the weight")
    require(gate.rows % GROUP == 0, f"gated_linear: {gate.rows} gates are not groups of {GROUP}")
    require(out.columns == gate.rows and out.rows >= most, "gated_linear: out does not fit the weight and x")
    require(
        bias is None or is_vector(bias, torch.float32, weight.rows), "gated_linear: bias is not float32 [out]"
    )
    biases = (None, None) if bias is None else bias.chunk(2)
    form = weight.format
    sizes: list[Value] = [rows, columns, gate.rows, x.stride(0), ACTIVATIONS[kind]]
    pointers = [out.storage, x, gate.storage, up.storage, *biases]
    program.add("gated_linear", [*pointers, *sizes, form.bits, form.group, form.has_offset], no_twin)


def _kind(weight: PackedWeight | QuantisedWeight) -> list[Value]:
    """dtype, or bits, group and whether there are offsets."""
    if isinstance(weight, QuantisedWeight):
        form = weight.format
        return [0, form.bits, form.group, form.has_offset]
    return [_DTYPES[weight.dtype], 0, 0, 0]


def _linear_quantised(
    program: Program,
    out: Tensor,
    x: Activations,
    weight: QuantisedWeight,
    bias: Tensor | None,
    rows: Count,
) -> None:
    held = x.quantised if reads_quantised(weight) else x.tiles
    if held is None:
        raise ValueError("linear: a quantised weight needs quantised x")
    form = weight.format
    sizes: list[Value] = [rows, x.columns, weight.rows, out.stride(0), form.bits, form.group, form.has_offset]
    program.add("linear_quantised", [out, held.storage, weight.storage, bias, *sizes], no_twin)


def embed(
    program: Program,
    out: Tensor,
    ids: Tensor,
    weight: PackedWeight | QuantisedWeight,
    scale: float = 1.0,
    first_id: int = 0,
    rows: Count | None = None,
) -> None:
    """out: float32 [tokens, columns of weight]; ids: int64 [tokens], those outside of [first_id, first_id + rows of
    weight) give rows of zeros."""
    most = out.shape[0]
    rows = _counted(rows, most)
    require(is_vector(ids, torch.int64, most), "embed: ids is not int64 [tokens]")
    require(out.shape[1] == weight.columns and out.is_contiguous(), "embed: out does not fit the weight")

    def twin() -> None:
        assert isinstance(weight, PackedWeight)
        out[: rows.value] = reference.embed(ids[: rows.value], weight.unpack(), scale, first_id)

    sizes: list[Value] = [rows, weight.rows, weight.columns, first_id]
    program.add("embed", [out, ids, weight.storage, *sizes, *_kind(weight), scale], twin)


def take_rows(program: Program, out: Tensor, x: Tensor, indices: Tensor, count: Count | None = None) -> None:
    """out: x[indices], contiguous; x: [rows, …], whose rows are contiguous; indices: int64 [count], those outside of x
    are left out."""
    most = indices.shape[0]
    count = _counted(count, most)
    row_bytes = x[0].numel() * x.itemsize
    require(is_vector(indices, torch.int64, most), "take_rows: indices is not int64 [count]")
    require(out.dtype == x.dtype and out.shape[1:] == x.shape[1:], "take_rows: out does not fit x")
    require(out.shape[0] >= most and out.is_contiguous(), "take_rows: out is not contiguous [count, …]")
    require(x[0].is_contiguous(), "take_rows: a row of x is not contiguous")

    def twin() -> None:
        taken = indices[: count.value]
        inside = (taken >= 0) & (taken < len(x))
        out[: count.value][inside] = x[taken[inside]]

    sizes = [x.shape[0], row_bytes, x.stride(0) * x.itemsize]
    program.add("take_rows", [out, x, indices, count, *sizes], twin)


def all_reduce(program: Program, x: Tensor, region: SharedRegion, rows: Count | None = None) -> None:
    """Overwrites x, float32 [rows, columns], contiguous, with the sum of every rank's: rank 0's + rank 1's + …, the
    same to the bit on every rank. Every rank runs it with the same rows."""
    most, columns = x.shape
    rows = _counted(rows, most)
    require(x.dtype == torch.float32 and x.is_contiguous(), "all_reduce: x is not contiguous float32")

    def twin() -> None:
        part = x[: rows.value]
        part.copy_(reference.all_reduce(region.exchange(part.flatten())).view_as(part))

    program.add("all_reduce", [x, region.memory, region.member, rows, columns], twin)


def gather_columns(
    program: Program,
    out: Tensor | None,
    x: Tensor,
    widths: Tensor,
    region: SharedRegion,
    rows: Count | None = None,
) -> None:
    """out: float32 [rows, sum of widths], every rank's x side by side; None on a rank that does without.

    x: float32 [rows, this rank's width]; widths: int64, one a rank. Every rank runs it with the same rows and widths.
    """
    most, width = x.shape
    rows = _counted(rows, most)
    total, widest = int(widths.sum()), int(widths.max())
    require(is_vector(widths, torch.int64, region.ranks), "gather_columns: widths is not int64 [ranks]")
    require(int(widths.min()) >= 0 and width == widths[region.rank], "gather_columns: x has another width")
    require(x.dtype == torch.float32 and x.is_contiguous(), "gather_columns: x is not contiguous float32")
    if out is not None:
        require(out.dtype == torch.float32 and out.is_contiguous(), "gather_columns: out is not float32 rows")
        require(out.shape == (most, total), "gather_columns: out does not fit widths")

    def twin() -> None:
        padded = torch.zeros(rows.value, widest)
        padded[:, :width] = x[: rows.value]
        parts = [part.view_as(padded) for part in region.exchange(padded.flatten())]
        if out is not None:
            columns = [part[:, :count] for part, count in zip(parts, widths.tolist(), strict=True)]
            out[: rows.value] = torch.cat(columns, dim=1)

    program.add("gather_columns", [out, x, widths, region.memory, region.member, rows], twin)


def draw(
    program: Program,
    ids: Tensor,
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    rows: Count | None = None,
) -> None:
    """ids: one token a row, int64 [rows]; -1 where a row's logits hold NaN or +inf, or only -inf.

    logits: float32 [rows, vocabulary]; temperature, top_p, min_p: float32 [rows]; top_k: int64 [rows];
    uniform: float64 [rows], in [0, 1). Temperature 0 takes the best token, the lowest id among equals; top_k
    0, top_p 1 and min_p 0 are off. The filters apply in this order after the temperature, and the token is
    where the kept tokens' distribution function, in order of their ids, passes ``uniform``.
    """
    most, vocabulary = logits.shape
    rows = _counted(rows, most)
    require(logits.dtype == torch.float32 and logits.stride(1) == 1, "draw: logits is not float32 rows")
    require(is_vector(ids, torch.int64, most), "draw: ids is not int64 [rows]")
    require(is_vector(temperature, torch.float32, most), "draw: temperature is not float32 [rows]")
    require(is_vector(top_k, torch.int64, most), "draw: top_k is not int64 [rows]")
    require(is_vector(top_p, torch.float32, most), "draw: top_p is not float32 [rows]")
    require(is_vector(min_p, torch.float32, most), "draw: min_p is not float32 [rows]")
    require(is_vector(uniform, torch.float64, most), "draw: uniform is not float64 [rows]")

    def twin() -> None:
        count = rows.value
        columns = (temperature[:count], top_k[:count], top_p[:count], min_p[:count], uniform[:count])
        ids[:count] = reference.draw(logits[:count], *columns)

    pointers = [ids, logits, temperature, top_k, top_p, min_p, uniform]
    program.add("draw", [*pointers, rows, vocabulary, logits.stride(0)], twin)
