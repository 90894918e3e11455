"""The parameters that one rank holds, as the decoder reads them; ``load`` fills them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from shoal.cuda_ext import ops
from shoal.cuda_ext.cuda_weight import CudaWeight
from shoal.cuda_ext.ops import Activations
from shoal.cuda_ext.packed_weight import PackedWeight
from shoal.cuda_ext.program import Count, Program
from shoal.cuda_ext.quantised import QuantisedWeight, TileRows

HostWeight = PackedWeight | QuantisedWeight
W = TypeVar("W", bound=PackedWeight | QuantisedWeight | CudaWeight)
"""A weight of the CPU library's, or of the CUDA library's."""


@dataclass(frozen=True, slots=True)
class Linear(Generic[W]):
    """A matrix [out, in] in parts, one below the other, each in a format of its own; bias: float32 [out]. A
    row-parallel layer's bias is on rank 0 alone."""

    parts: tuple[W, ...]
    bias: Tensor | None = None

    @property
    def columns(self) -> int:
        return self.parts[0].columns

    @property
    def reads_quantised(self: "Linear[HostWeight]") -> bool:
        """Whether some part multiplies integers."""
        return any(ops.reads_quantised(part) for part in self.parts)

    @property
    def reads_plain(self: "Linear[HostWeight]") -> bool:
        """Whether some part multiplies floats."""
        return not all(ops.reads_quantised(part) for part in self.parts)

    def record(self: "Linear[HostWeight]", program: Program, out: Tensor, x: Activations, rows: Count) -> None:
        """Appends out = x · matrixᵀ + bias; out: float32 [rows, out]."""
        begin = 0
        for part in self.parts:
            end = begin + part.rows
            bias = None if self.bias is None else self.bias[begin:end]
            ops.linear(program, out[:, begin:end], x, part, bias, rows)
            begin = end


@dataclass(frozen=True, slots=True)
class AttentionParameters(Generic[W]):
    """Norm weights are float32; ``qkv`` has the rank's query heads, then key heads, then value heads.
    cache_scales: what an fp8 cache's keys and values are multiplied with, float32 [the rank's KV heads] each."""

    norm: Tensor
    qkv: Linear[W]
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Linear[W]
    post_norm: Tensor | None
    cache_scales: tuple[Tensor, Tensor] | None


@dataclass(frozen=True, slots=True)
class FeedForwardParameters(Generic[W]):
    """``gate_up`` has the rank's gate columns, then as many of up."""

    norm: Tensor
    gate_up: Linear[W]
    down: Linear[W]
    post_norm: Tensor | None

    @property
    def gates_in_product(self: "FeedForwardParameters[HostWeight]") -> bool:
        """Whether one operator makes gates, ups and what ``down`` reads."""
        parts = (*self.gate_up.parts, *self.down.parts)
        return len(parts) == 2 and ops.gates_in_product(parts[0], parts[1])

    def record_gated(
        self: "FeedForwardParameters[HostWeight]",
        program: Program,
        out: TileRows,
        x: Activations,
        kind: ops.Activation,
        rows: Count,
    ) -> None:
        """Appends that operator; out: for ``down``."""
        weight = self.gate_up.parts[0]
        assert isinstance(weight, QuantisedWeight)
        assert x.plain is not None
        ops.gated_linear(program, out, x.plain, weight, self.gate_up.bias, kind, rows)


@dataclass(frozen=True, slots=True)
class LayerParameters(Generic[W]):
    attention: AttentionParameters[W]
    ffn: FeedForwardParameters[W]


@dataclass(frozen=True, slots=True)
class Parameters(Generic[W]):
    """Everything that a rank loads. ``head`` is ``embedding`` itself where the two are tied."""

    embedding: W
    layers: tuple[LayerParameters[W], ...]
    final_norm: Tensor
    head: W
    dtype: torch.dtype
    """Of the matrices that are not quantised."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> Iterator[Tensor]:
        """All of them as they lie in memory."""
        for weight in self.weights():
            yield weight.storage
            if isinstance(weight, CudaWeight) and weight.scales is not None:
                yield weight.scales
        yield from self.vectors()

    def weights(self) -> Iterator[W]:
        """Every matrix, a tied head once."""
        yield self.embedding
        if self.head is not self.embedding:
            yield self.head
        yield from (part for linear in self._linears() for part in linear.parts)

    def vectors(self) -> Iterator[Tensor]:
        """Norms, biases and the cache's scales."""
        yield self.final_norm
        for layer in self.layers:
            attention, ffn = layer.attention, layer.ffn
            norms: tuple[Tensor | None, ...] = (
                attention.norm,
                attention.q_norm,
                attention.k_norm,
                attention.post_norm,
                ffn.norm,
            )
            yield from (norm for norm in (*norms, ffn.post_norm) if norm is not None)
            yield from attention.cache_scales or ()
        yield from (linear.bias for linear in self._linears() if linear.bias is not None)

    def _linears(self) -> Iterator[Linear[W]]:
        for layer in self.layers:
            yield from (layer.attention.qkv, layer.attention.output, layer.ffn.gate_up, layer.ffn.down)
