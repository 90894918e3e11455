"""The parameters that one rank holds, as the decoder reads them; ``load`` fills them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.cuda_ext import ops
from shoal.cuda_ext.ops import Activations
from shoal.cuda_ext.packed_weight import PackedWeight
from shoal.cuda_ext.program import Count, Program
from shoal.cuda_ext.quantised import QuantisedWeight

Weight = PackedWeight | QuantisedWeight


@dataclass(frozen=True, slots=True)
class Linear:
    """A matrix [out, in] in parts, one below the other, each in a format of its own; bias: float32 [out]. A
    row-parallel layer's bias is on rank 0 alone."""

    parts: tuple[Weight, ...]
    bias: Tensor | None = None

    @property
    def columns(self) -> int:
        return self.parts[0].columns

    @property
    def reads_quantised(self) -> bool:
        """Whether some part multiplies integers."""
        return any(isinstance(part, QuantisedWeight) for part in self.parts)

    @property
    def reads_plain(self) -> bool:
        """Whether some part multiplies floats."""
        return any(isinstance(part, PackedWeight) for part in self.parts)

    def record(self, program: Program, out: Tensor, x: Activations, rows: Count) -> None:
        """Appends out = x · matrixᵀ + bias; out: float32 [rows, out]."""
        begin = 0
        for part in self.parts:
            end = begin + part.rows
            bias = None if self.bias is None else self.bias[begin:end]
            ops.linear(program, out[:, begin:end], x, part, bias, rows)
            begin = end


@dataclass(frozen=True, slots=True)
class AttentionParameters:
    """Norm weights are float32; ``qkv`` has the rank's query heads, then key heads, then value heads."""

    norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Linear
    post_norm: Tensor | None


@dataclass(frozen=True, slots=True)
class FeedForwardParameters:
    """``gate_up`` has the rank's gate columns, then as many of up."""

    norm: Tensor
    gate_up: Linear
    down: Linear
    post_norm: Tensor | None


@dataclass(frozen=True, slots=True)
class LayerParameters:
    attention: AttentionParameters
    ffn: FeedForwardParameters


@dataclass(frozen=True, slots=True)
class Parameters:
    """Everything that a rank loads. ``head`` is ``embedding`` itself where the two are tied."""

    embedding: Weight
    layers: tuple[LayerParameters, ...]
    final_norm: Tensor
    head: Weight
    dtype: torch.dtype
    """Of the matrices that are not quantised."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> Iterator[Tensor]:
        """All of them as they lie in memory."""
        yield from (weight.storage for weight in self.weights())
        yield from self.vectors()

    def weights(self) -> Iterator[Weight]:
        """Every matrix, a tied head once."""
        yield self.embedding
        if self.head is not self.embedding:
            yield self.head
        yield from (part for linear in self._linears() for part in linear.parts)

    def vectors(self) -> Iterator[Tensor]:
        """Norms and biases."""
        yield self.final_norm
        for layer in self.layers:
            attention, ffn = layer.attention, layer.ffn
            norms = (attention.norm, attention.q_norm, attention.k_norm, attention.post_norm, ffn.norm)
            yield from (norm for norm in (*norms, ffn.post_norm) if norm is not None)
        yield from (linear.bias for linear in self._linears() if linear.bias is not None)

    def _linears(self) -> Iterator[Linear]:
        for layer in self.layers:
            yield from (layer.attention.qkv, layer.attention.output, layer.ffn.gate_up, layer.ffn.down)
