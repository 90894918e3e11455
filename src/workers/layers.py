"""The parameters that one rank holds, as the decoder reads them; ``load`` fills them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.cuda_ext import ops
from shoal.cuda_ext.packed_weight import PackedWeight


@dataclass(frozen=True, slots=True)
class Linear:
    """weight: [out, in]; bias: float32 [out]. A row-parallel layer's bias is on rank 0 alone."""

    weight: PackedWeight
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


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

    embedding: PackedWeight
    layers: tuple[LayerParameters, ...]
    final_norm: Tensor
    head: PackedWeight

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices; activations are float32."""
        return self.embedding.dtype

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> Iterator[Tensor]:
        """All of them as they lie in memory."""
        yield from (weight.storage for weight in self.weights())
        yield from self.vectors()

    def weights(self) -> Iterator[PackedWeight]:
        """Every matrix, a tied head once."""
        yield self.embedding
        if self.head is not self.embedding:
            yield self.head
        yield from (linear.weight for linear in self._linears())

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
