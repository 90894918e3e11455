"""The parameters that one rank holds, as the decoder reads them; ``load`` fills them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.cuda_ext import ops


@dataclass(frozen=True, slots=True)
class Linear:
    """weight: [out, in] in the compute dtype; bias: [out]. A row-parallel layer's bias is on rank 0 alone."""

    weight: Tensor
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

    embedding: Tensor
    layers: tuple[LayerParameters, ...]
    final_norm: Tensor
    head: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> Iterator[Tensor]:
        """All of them, a tied head once."""
        yield from (self.embedding, self.final_norm)
        if self.head is not self.embedding:
            yield self.head
        for layer in self.layers:
            attention, ffn = layer.attention, layer.ffn
            norms = (attention.norm, attention.q_norm, attention.k_norm, attention.post_norm, ffn.norm)
            linears = (attention.qkv, attention.output, ffn.gate_up, ffn.down)
            biases = (linear.bias for linear in linears)
            yield from (linear.weight for linear in linears)
            yield from (tensor for tensor in (*norms, ffn.post_norm, *biases) if tensor is not None)
