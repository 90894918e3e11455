"""Fills one rank's ``Parameters`` from a checkpoint. Called by ``loop`` once in a process's life.

Names and shapes are checked before anything is read. Every tensor is read once, only the rank's rows or columns of
it, straight into the fused matrix where it belongs and in pieces; a matrix is packed as soon as it is whole, the
largest ones piece by piece, so that a load needs little more memory than the parameters themselves.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Final, Generic

import torch
from torch import Tensor

from shoal.checkpoint.description import ModelDescription
from shoal.config import Quantization
from shoal.cuda_ext.fp8 import FP8, Fp8Rows
from shoal.cuda_ext.packed_weight import PANEL
from shoal.cuda_ext.quantised import (
    QuantisedGroups,
    WeightFormat,
    join,
    quantise_weight,
)
from shoal.errors import ModelError, StartError
from shoal.workers.architectures import Layout, choose_layout, expected_shapes, has_no_place
from shoal.workers.layers import (
    AttentionParameters,
    FeedForwardParameters,
    LayerParameters,
    Linear,
    Parameters,
    W,
)
from shoal.workers.parallel import Shard
from shoal.workers.weights.places import Form, Part, Place
from shoal.workers.weights.source import WeightSource

__all__ = ["Parameters", "load_parameters"]

_PIECE_BYTES = 16 << 20
"""About how much of a tensor is converted at once."""

_BITS: Final = {"w8": 8, "w4": 4}
"""Of the layers' matrices when a model is quantised at load; embedding and head take 8."""

Progress = Callable[[int, int], None]
"""Told how many tensors are begun, out of how many."""


def load_parameters(
    source: WeightSource,
    description: ModelDescription,
    shard: Shard,
    place: Place[W],
    progress: Progress,
    quantization: Quantization = "auto",
) -> Parameters[W]:
    """This rank's part of the model: matrices as integers where the file has them so (``auto``) or they are asked for
    (``w8``, ``w4``), as fp8 where the file and the place have that (``auto``), else in the place's ``dtype``; norms and
    biases in float32. Integers need a compiled library."""
    layout = choose_layout(description.family, frozenset(source.names()))
    shapes = expected_shapes(description, layout)
    _check(source, shapes, layout)
    if not place.takes_integers and quantization in _BITS:
        raise StartError(
            f"--quantization {quantization} needs the compiled library, which is not built: install a C++ compiler "
            "and reinstall, or leave the flag out"
        )
    reader = _Reader(source, shapes, place, quantization if place.takes_integers else "none", progress)
    parameters = _Loader(reader, description, shard, layout).load()
    progress(len(shapes), len(shapes))
    return parameters


def _check(source: WeightSource, shapes: dict[str, tuple[int, ...]], layout: Layout) -> None:
    present = set(source.names())
    for name, shape in shapes.items():
        if name not in present:
            raise ModelError(f"tensor {name} is missing: the checkpoint is incomplete or of another family")
        found = tuple(source.shape(name))
        if found != shape:
            raise ModelError(
                f"tensor {name} has shape {list(found)} where the model's configuration needs {list(shape)}"
            )
    surplus = sorted(name for name in present - shapes.keys() if has_no_place(name, layout))
    if surplus:
        raise ModelError(
            f"tensor {surplus[0]} ({len(surplus)} such) has no place in the configured model: "
            "it would be ignored silently"
        )


Rows = tuple[str, range]
"""Which rows of which tensor go into a fused matrix or bias."""


class _Reader(Generic[W]):
    """Copies pieces of tensors into their places, and counts."""

    def __init__(
        self,
        source: WeightSource,
        shapes: dict[str, tuple[int, ...]],
        place: Place[W],
        quantization: Quantization,
        progress: Progress,
    ) -> None:
        self._source = source
        self._quantization = quantization
        self._shapes = shapes
        self._place = place
        self._progress = progress
        self._begun: set[str] = set()

    def norm(self, name: str, offset: float) -> Tensor:
        weight = torch.empty(self._shapes[name], dtype=torch.float32)
        self._copy(weight, name, range(len(weight)))
        return self._place.vector(weight.add_(offset))

    def biases(self, parts: list[Rows], orders: list[Tensor | None] | None = None) -> Tensor:
        """The parts side by side, in float32 as sums are."""
        pieces = [self._stack([part], (), None, torch.float32) for part in parts]
        ordered = zip(pieces, orders or [None] * len(parts), strict=True)
        whole = torch.cat([piece if order is None else piece[order] for piece, order in ordered])
        return self._place.vector(whole)

    def matrix(
        self, parts: list[Rows], columns: range | None = None, orders: list[Tensor | None] | None = None
    ) -> tuple[W, ...]:
        """The parts one below the other, those of one format in one weight. An order is that of a part's rows."""
        formats = [self._format(name, columns) for name, _ in parts]
        ordered = zip(formats, parts, orders or [None] * len(parts), strict=True)
        return tuple(
            self._weight(form, [(part, order) for _, part, order in run], columns)
            for form, run in groupby(ordered, key=itemgetter(0))
        )

    def table(self, name: str, rows: range) -> W:
        """The largest matrices: written in pieces, so that they never exist twice."""
        columns, form = self._shapes[name][1], self._format(name)
        form = None if form == FP8 else form  # there is no such kernel for embeddings
        quantises = form is None and self._quantization in _BITS
        weight = self._place.empty(len(rows), columns, WeightFormat(8, 32, False) if quantises else form)
        if form is not None:
            for begin, piece in self._ranges(name, rows):
                self._place.write(weight, begin, self._source.read_groups(name, _slice(piece)))
            return weight
        for begin, floats in self._pieces(name, rows):
            self._place.write(weight, begin, quantise_weight(floats, 8) if quantises else floats)
        return weight

    @property
    def dtype(self) -> torch.dtype:
        return self._place.dtype

    def cache_scales(self, attention: str, kv_heads: range, of_all: int) -> tuple[Tensor, Tensor] | None:
        """Of the rank's KV heads' keys and values, where the file has either; what it has not is 1."""
        found = [self._source.cache_scale(attention, which, of_all) for which in ("k", "v")]
        if all(scale is None for scale in found):
            return None
        whole = [torch.ones(of_all) if scale is None else scale for scale in found]
        keys, values = (self._place.vector(scale[kv_heads.start : kv_heads.stop]) for scale in whole)
        return keys, values

    def _format(self, name: str, columns: range | None = None) -> Form:
        if self._quantization != "auto":
            return None
        form = self._source.format_of(name, _slice(columns))
        return None if form == FP8 and not self._place.takes_fp8 else form

    def _weight(self, form: Form, parts: list[tuple[Rows, Tensor | None]], columns: range | None) -> W:
        if form == FP8:
            fp8 = Fp8Rows.join([self._fp8(name, rows, columns, order) for (name, rows), order in parts])
            return self._whole(fp8, *fp8.codes.shape)
        if form is not None:
            groups = join([self._groups(name, rows, columns, order) for (name, rows), order in parts])
            return self._whole(groups, groups.rows, groups.columns)
        width = self._shapes[parts[0][0][0]][1] if columns is None else len(columns)
        stacked = self._stack([part for part, _ in parts], (width,), columns, self._place.dtype)
        begin = 0
        for (_, rows), order in parts:
            if order is not None:
                stacked[begin : begin + len(rows)] = stacked[begin : begin + len(rows)][order]
            begin += len(rows)
        if self._quantization in _BITS:
            return self._whole(quantise_weight(stacked, _BITS[self._quantization]), len(stacked), width)
        return self._whole(stacked, *stacked.shape)

    def _whole(self, matrix: Part, rows: int, columns: int) -> W:
        form: Form = FP8 if isinstance(matrix, Fp8Rows) else None
        if isinstance(matrix, QuantisedGroups):
            form = matrix.format
        weight = self._place.empty(rows, columns, form)
        self._place.write(weight, 0, matrix)
        return weight

    def _groups(self, name: str, rows: range, columns: range | None, order: Tensor | None) -> QuantisedGroups:
        self._begin(name)
        groups = self._source.read_groups(name, _slice(rows), _slice(columns))
        return groups if order is None else groups.take(order)

    def _fp8(self, name: str, rows: range, columns: range | None, order: Tensor | None) -> Fp8Rows:
        self._begin(name)
        part = self._source.read_fp8(name, _slice(rows), _slice(columns))
        return part if order is None else part.take(order)

    def _stack(
        self, parts: list[Rows], width: tuple[int, ...], columns: range | None, dtype: torch.dtype
    ) -> Tensor:
        stacked = torch.empty((sum(len(rows) for _, rows in parts), *width), dtype=dtype)
        begin = 0
        for name, rows in parts:
            self._copy(stacked[begin : begin + len(rows)], name, rows, columns)
            begin += len(rows)
        return stacked

    def _copy(self, target: Tensor, name: str, rows: range, columns: range | None = None) -> None:
        for begin, piece in self._pieces(name, rows, columns):
            target[begin : begin + len(piece)] = piece

    def _pieces(self, name: str, rows: range, columns: range | None = None) -> Iterator[tuple[int, Tensor]]:
        """Whole panels of a tensor's rows, and where in ``rows`` they begin."""
        for begin, piece in self._ranges(name, rows, columns):
            yield begin, self._source.read(name, rows=_slice(piece), columns=_slice(columns))

    def _ranges(self, name: str, rows: range, columns: range | None = None) -> Iterator[tuple[int, range]]:
        self._begin(name)
        row_bytes = 4 * math.prod(self._shapes[name][1:] if columns is None else (len(columns),))
        step = max(PANEL, _PIECE_BYTES // row_bytes // PANEL * PANEL)
        for begin in range(0, len(rows), step):
            yield begin, rows[begin : begin + step]

    def _begin(self, name: str) -> None:
        self._begun.add(name)
        self._progress(len(self._begun), len(self._shapes))


@dataclass(frozen=True, slots=True)
class _Loader(Generic[W]):
    """Knows which rows and columns of which tensors make up each parameter."""

    reader: _Reader[W]
    description: ModelDescription
    shard: Shard
    layout: Layout

    def load(self) -> Parameters[W]:
        embedding = self._table(self.layout.embedding)
        return Parameters(
            embedding=embedding,
            layers=tuple(map(self._layer, range(self.description.num_layers))),
            final_norm=self._norm(self.layout.final_norm),
            head=embedding if self.description.tied_head else self._table(self.layout.head),
            dtype=self.reader.dtype,
        )

    def _table(self, name: str) -> W:
        return self.reader.table(f"{name}.weight", self.shard.vocab)

    def _norm(self, name: str) -> Tensor:
        return self.reader.norm(f"{name}.weight", self.description.norm_weight_offset)

    def _layer(self, index: int) -> LayerParameters[W]:
        prefix = self.layout.layer.format(index)
        return LayerParameters(attention=self._attention(prefix), ffn=self._ffn(prefix))

    def _attention(self, prefix: str) -> AttentionParameters[W]:
        layout, description = self.layout, self.description
        columns = _rows(self.shard.q_heads, description.head_dim)
        return AttentionParameters(
            norm=self._norm(prefix + layout.attention_norm),
            qkv=self._qkv(prefix),
            q_norm=self._norm(prefix + layout.q_norm) if description.qk_norm else None,
            k_norm=self._norm(prefix + layout.k_norm) if description.qk_norm else None,
            output=self._row_parallel(prefix + layout.output, columns, description.output_bias),
            post_norm=self._norm(prefix + layout.attention_post_norm) if description.post_norms else None,
            cache_scales=self._cache_scales(prefix),
        )

    def _cache_scales(self, prefix: str) -> tuple[Tensor, Tensor] | None:
        projection = self.layout.q or self.layout.grouped_qkv
        attention = prefix + projection.rpartition(".")[0]
        return self.reader.cache_scales(attention, self.shard.kv_heads, self.description.num_kv_heads)

    def _ffn(self, prefix: str) -> FeedForwardParameters[W]:
        layout, description, columns = self.layout, self.description, self.shard.ffn
        gate_up = [(prefix + layout.gate, columns), (prefix + layout.up, columns)]
        return FeedForwardParameters(
            norm=self._norm(prefix + layout.ffn_norm),
            gate_up=self._column_parallel(gate_up, description.ffn_bias),
            down=self._row_parallel(prefix + layout.down, columns, description.ffn_bias),
            post_norm=self._norm(prefix + layout.ffn_post_norm) if description.post_norms else None,
        )

    def _qkv(self, prefix: str) -> Linear[W]:
        rows = self._grouped_rows(prefix) if self.layout.grouped_qkv else self._separate_rows(prefix)
        return self._column_parallel(rows, self.description.qkv_bias, self.layout.interleaved_rope)

    def _separate_rows(self, prefix: str) -> list[Rows]:
        layout, dim = self.layout, self.description.head_dim
        q_rows, kv_rows = _rows(self.shard.q_heads, dim), _rows(self.shard.kv_heads, dim)
        return [(prefix + layout.q, q_rows), (prefix + layout.k, kv_rows), (prefix + layout.v, kv_rows)]

    def _grouped_rows(self, prefix: str) -> list[Rows]:
        """q, k and v out of one matrix that has them by KV head."""
        name, dim = prefix + self.layout.grouped_qkv, self.description.head_dim
        group = self.description.num_heads // self.description.num_kv_heads
        first_heads = [head + head // group * 2 for head in self.shard.q_heads]
        keys = [kv_head * (group + 2) + group for kv_head in self.shard.kv_heads]
        values = [key + 1 for key in keys]
        return [(name, range(head * dim, (head + 1) * dim)) for head in [*first_heads, *keys, *values]]

    def _halves_order(self, count: int) -> Tensor:
        """Of the rows of query or key heads, from (0, d/2, 1, d/2 + 1, …) to (0, 1, …)."""
        dim = self.description.head_dim
        return torch.arange(count).view(-1, dim // 2, 2).transpose(1, 2).flatten()

    def _column_parallel(self, rows: list[Rows], bias: bool, interleaved_rope: bool = False) -> Linear[W]:
        """Matrices of which this rank computes some of the outputs."""
        orders: list[Tensor | None] = [None] * len(rows)
        if interleaved_rope:
            orders[:2] = [self._halves_order(len(part)) for _, part in rows[:2]]
        weights = self.reader.matrix([(f"{name}.weight", part) for name, part in rows], None, orders)
        biases = self.reader.biases([(f"{name}.bias", part) for name, part in rows], orders) if bias else None
        return Linear(weights, biases)

    def _row_parallel(self, name: str, columns: range, bias: bool) -> Linear[W]:
        """A matrix of which this rank has some of the inputs; the bias is added once, by rank 0."""
        rows = range(self.description.hidden_size)
        return Linear(
            self.reader.matrix([(f"{name}.weight", rows)], columns),
            self.reader.biases([(f"{name}.bias", rows)]) if bias and self.shard.rank == 0 else None,
        )


def _rows(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)


def _slice(part: range | None) -> slice | None:
    return None if part is None else slice(part.start, part.stop)
