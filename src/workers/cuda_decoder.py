"""The decoder over the CUDA library, on a chip or emulated: the same pass as ``decoder`` records for the CPU.

Activations are bfloat16, the residual float32; hidden states and logits come back to the host in float32. One rank.
"""

from typing import Final

import torch
from torch import Tensor

from shoal.checkpoint.description import ModelDescription
from shoal.cuda_ext import cuda_ops as ops
from shoal.cuda_ext.cuda_binding import CudaLibrary
from shoal.cuda_ext.cuda_program import CudaProgram
from shoal.cuda_ext.cuda_weight import CudaWeight, from_cpu
from shoal.cuda_ext.program import Count
from shoal.workers.inputs import StepBuffers, StepInputs
from shoal.workers.kv_cache import KVCache
from shoal.workers.layers import AttentionParameters, FeedForwardParameters, Linear, Parameters, Weight
from shoal.workers.rope import rope_tables

_DTYPE: Final = torch.bfloat16
_FEWEST_STATES: Final = 8
_FAULTS: Final = {
    1: "a position lies outside of the rope table",
    2: "a cache slot lies outside of the cache",
    3: "a block table names a block outside of the cache",
    5: "a sequence has more tokens than its context, or more context than its block table",
}


class CudaDecoder:
    """A whole model on one device, bound to a cache there."""

    def __init__(
        self,
        description: ModelDescription,
        parameters: Parameters,
        cache: KVCache,
        session_len: int,
        library: CudaLibrary,
        device: torch.device,
    ) -> None:
        self.description = description
        self.parameters = parameters
        self.library = library
        self.device = device
        self.block_size = cache.block_size
        self.keys, self.values = (_on_device(part, device) for part in (cache.keys, cache.values))
        tables = rope_tables(description, session_len)
        self._tables = {rope: table.to(device) for rope, table in tables.items()}
        self._weights: dict[int, CudaWeight] = {}
        self._vectors: dict[int, Tensor] = {}
        self._pass: _Pass | None = None
        self._head: _Head | None = None

    @property
    def vocab_size(self) -> int:
        """Columns of ``logits``."""
        return self.description.vocab_size

    def hidden(self, inputs: StepInputs) -> Tensor:
        """float32 [T, hidden], after the final norm. Raises IndexError where an input is out of range."""
        if self._pass is None or not self._pass.inputs.holds(inputs):
            before = self._pass.inputs if self._pass else None
            self._pass = _Pass(self, StepBuffers.for_step(inputs, before))
        return self._pass.run(inputs)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [S, vocabulary] of S hidden states; overwritten by the next call where the device is the CPU."""
        count = len(hidden)
        if self._head is None or count > self._head.rows.most:
            self._head = _Head(self, max(count, _FEWEST_STATES))
        return self._head.run(hidden)

    def program(self) -> CudaProgram:
        return CudaProgram(self.library, self.device)

    def zeros(self, *shape: int, dtype: torch.dtype = _DTYPE) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def weight(self, weight: Weight) -> CudaWeight:
        """As the device has it; made once."""
        if id(weight) not in self._weights:
            self._weights[id(weight)] = from_cpu(self.program(), weight, _DTYPE)
        return self._weights[id(weight)]

    def vector(self, vector: Tensor) -> Tensor:
        """A norm's weight or a bias; copied once."""
        if id(vector) not in self._vectors:
            self._vectors[id(vector)] = vector.to(self.device)
        return self._vectors[id(vector)]

    def rope_table(self, window: int) -> Tensor:
        local = self.description.local_rope
        return self._tables[local if window and local is not None else self.description.rope]


class _Head:
    """From hidden states to logits."""

    def __init__(self, decoder: CudaDecoder, most: int) -> None:
        weight = decoder.weight(decoder.parameters.head)
        self.rows = Count(most)
        self._cap = decoder.description.logit_soft_cap
        self._hidden = decoder.zeros(most, weight.columns)
        self._logits = decoder.zeros(most, weight.rows, dtype=torch.float32)
        self._program = decoder.program()
        ops.linear(self._program, self._logits, self._hidden, weight, None, self.rows)

    def run(self, hidden: Tensor) -> Tensor:
        self.rows.set(len(hidden))
        self._hidden[: len(hidden)] = hidden
        self._program.run()
        logits = self._logits[: len(hidden)]
        if self._cap:
            logits = torch.tanh(logits / self._cap) * self._cap
        return logits.cpu()


class _Pass:
    """From token ids to hidden states, over buffers that one layer after the other uses."""

    def __init__(self, decoder: CudaDecoder, inputs: StepBuffers) -> None:
        self.inputs = inputs
        self._decoder = decoder
        self._description = decoder.description
        self._eps = decoder.description.norm_eps
        self._rows = inputs.tokens
        self._program = decoder.program()
        description, most = self._description, inputs.tokens.most
        heads, kv_heads, dim = description.num_heads, description.num_kv_heads, description.head_dim
        most_context = inputs.block_tables.shape[1] * decoder.block_size
        self._most_tokens, self._most_context = Count(most), Count(most_context)
        names = ("token_ids", "positions", "cache_slots", "query_starts", "context_lens", "block_tables")
        self._mirrors = [(getattr(inputs, name), getattr(inputs, name).to(decoder.device)) for name in names]
        self._on_device = {name: there for name, (_, there) in zip(names, self._mirrors, strict=True)}
        self._residual = decoder.zeros(most, description.hidden_size, dtype=torch.float32)
        self._normed, self._delta = (decoder.zeros(most, description.hidden_size) for _ in range(2))
        self._heads = decoder.zeros(most, heads + 2 * kv_heads, dim)
        self._mixed = decoder.zeros(most, heads, dim)
        self._normed_q, self._normed_k = decoder.zeros(most, heads, dim), decoder.zeros(most, kv_heads, dim)
        self._gate_up = decoder.zeros(most, 2 * description.ffn_size)
        self._gated = decoder.zeros(most, description.ffn_size)
        self._fault = decoder.zeros(1, dtype=torch.int32)
        floats = ops.workspace_floats(inputs.sequences.most, heads, dim, most_context)
        self._workspace = decoder.zeros(floats, dtype=torch.float32)
        self._record()

    def run(self, inputs: StepInputs) -> Tensor:
        self.inputs.load(inputs)
        for here, there in self._mirrors:
            if there is not here:
                there.copy_(here)
        self._most_tokens.set(int(inputs.query_starts.diff().max()) if len(inputs.context_lens) else 0)
        self._most_context.set(int(inputs.context_lens.max()) if len(inputs.context_lens) else 0)
        self._program.run()
        hidden = self._normed[: len(inputs.token_ids)].float().cpu()
        if fault := int(self._fault):
            self._fault.zero_()
            raise IndexError(_FAULTS[fault])
        return hidden

    def _record(self) -> None:
        decoder, parameters, description = self._decoder, self._decoder.parameters, self._description
        embedding, ids = decoder.weight(parameters.embedding), self._on_device["token_ids"]
        ops.embed(self._program, self._residual, ids, embedding, description.embedding_scale, 0, self._rows)
        for index, layer in enumerate(parameters.layers):
            if index == 0:
                weight = decoder.vector(layer.attention.norm)
                ops.rms_norm(self._program, self._normed, self._residual, weight, self._eps, self._rows)
            else:
                self._add_norm(layer.attention.norm)
            self._attend(layer.attention, index)
            self._add_norm(layer.ffn.norm)
            self._feed_forward(layer.ffn)
        self._add_norm(parameters.final_norm)

    def _attend(self, parameters: AttentionParameters, layer: int) -> None:
        decoder, description, inputs = self._decoder, self._description, self._on_device
        window = description.layer_windows[layer]
        caches = (decoder.keys[layer], decoder.values[layer])
        q, k, v = self._project_heads(parameters)
        ops.rope_write_kv(
            self._program, q, k, v, decoder.rope_table(window), inputs["positions"], *caches, inputs["cache_slots"],
            self._fault, self._rows,
        )  # fmt: skip
        ops.paged_attention(
            self._program,
            self._mixed,
            q,
            *caches,
            inputs["block_tables"],
            inputs["query_starts"],
            inputs["context_lens"],
            self._workspace,
            self._fault,
            description.attention_scale,
            window,
            description.attention_soft_cap,
            self._rows,
            self.inputs.sequences,
            self._most_tokens,
            self._most_context,
        )
        self._finish(parameters.output, self._mixed.flatten(1), parameters.post_norm)

    def _project_heads(self, parameters: AttentionParameters) -> tuple[Tensor, Tensor, Tensor]:
        """q: [T, query heads, dim]; k, v: [T, KV heads, dim]; views of one matrix unless q and k are normed."""
        self._multiply(self._heads.flatten(1), parameters.qkv, self._normed)
        counts = [self._mixed.shape[1], self._normed_k.shape[1], self._normed_k.shape[1]]
        q, k, v = torch.split(self._heads, counts, dim=1)
        if parameters.q_norm is not None:
            q = self._norm_heads(self._normed_q, q, parameters.q_norm)
        if parameters.k_norm is not None:
            k = self._norm_heads(self._normed_k, k, parameters.k_norm)
        return q, k, v

    def _norm_heads(self, out: Tensor, heads: Tensor, weight: Tensor) -> Tensor:
        ops.rms_norm(self._program, out, heads, self._decoder.vector(weight), self._eps, self._rows)
        return out

    def _feed_forward(self, parameters: FeedForwardParameters) -> None:
        self._multiply(self._gate_up, parameters.gate_up, self._normed)
        ops.gated_activation(
            self._program, self._gated, self._gate_up, self._description.activation, self._rows
        )
        self._finish(parameters.down, self._gated, parameters.post_norm)

    def _finish(self, linear: Linear, x: Tensor, post_norm: Tensor | None) -> None:
        """What is added to the residual, normed where the family does so."""
        self._multiply(self._delta, linear, x)
        if post_norm is not None:
            weight = self._decoder.vector(post_norm)
            ops.rms_norm(self._program, self._delta, self._delta, weight, self._eps, self._rows)

    def _add_norm(self, weight: Tensor) -> None:
        vector = self._decoder.vector(weight)
        ops.add_rms_norm(
            self._program, self._normed, self._residual, self._delta, vector, self._eps, self._rows
        )

    def _multiply(self, out: Tensor, linear: Linear, x: Tensor) -> None:
        begin = 0
        bias = None if linear.bias is None else self._decoder.vector(linear.bias)
        for part in linear.parts:
            end = begin + part.rows
            part_bias = None if bias is None else bias[begin:end]
            ops.linear(self._program, out[:, begin:end], x, self._decoder.weight(part), part_bias, self._rows)
            begin = end


def _on_device(part: Tensor, device: torch.device) -> Tensor:
    return part if device.type == "cpu" else torch.zeros(part.shape, dtype=part.dtype, device=device)
