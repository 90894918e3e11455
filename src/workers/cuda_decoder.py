"""The decoder on a GPU, or on the emulation of one: the same pass as ``decoder`` records for the CPU, over buffers that
are allocated once.

A step is put on the device's stream, and nobody waits for it here. Steps of single tokens are CUDA graphs, one for each
number of rows (1, 2, 4, 8, 16, 24, …) and of sections of the longest context; rows that are missing to the next such
number are filled up with tokens that nobody reads. Those of contexts that are usual are captured when there is nothing
else to do. Activations are of 16 bits, the residual float32.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.checkpoint.description import ModelDescription
from shoal.cuda_ext import cuda_ops as ops
from shoal.cuda_ext import cuda_step_ops as step_ops
from shoal.cuda_ext.binding import PeerLost
from shoal.cuda_ext.cuda_device import CudaDevice, Graph
from shoal.cuda_ext.cuda_program import CudaProgram
from shoal.cuda_ext.cuda_staging import Staged
from shoal.cuda_ext.cuda_weight import CudaWeight
from shoal.cuda_ext.program import Count
from shoal.messages import TokenLogprob
from shoal.workers.cuda_group import DeviceGroup
from shoal.workers.cuda_inputs import CudaInputs, StepLimits
from shoal.workers.cuda_logprobs import CudaLogprobs
from shoal.workers.inputs import StepInputs
from shoal.workers.kv_cache import KVCache
from shoal.workers.layers import AttentionParameters, FeedForwardParameters, Linear, Parameters
from shoal.workers.parallel import Shard
from shoal.workers.rope import rope_tables
from shoal.workers.slots import Int32s

_FEWEST_CONTEXT: Final = 4 * ops.SECTION
_USUAL_CONTEXT: Final = 4 * _FEWEST_CONTEXT
_GRAPH_ROWS: Final = 8
"""From here on a graph for every eighth number of rows."""
_PEER_LOST: Final = 6
_FAULTS: Final = {
    1: "a position lies outside of the rope table",
    2: "a cache slot lies outside of the cache",
    3: "a block table names a block outside of the cache",
    5: "a sequence has more tokens than its context, or more context than its block table",
}


def graph_rows(rows: int, most: int) -> int:
    """How many rows a step of ``rows`` single tokens is filled up to."""
    few = rows < _GRAPH_ROWS
    padded = 1 << (rows - 1).bit_length() if few else -(-rows // _GRAPH_ROWS) * _GRAPH_ROWS
    return min(padded, most)


class CudaBuffers:
    """All the memory of a rank's steps but weights and cache. Raises MemoryError where the device has not so much."""

    def __init__(
        self,
        device: CudaDevice,
        description: ModelDescription,
        shard: Shard,
        dtype: torch.dtype,
        limits: StepLimits,
    ) -> None:
        self.device = device
        self.limits = limits
        most, sequences, hidden = limits.tokens, limits.sequences, description.hidden_size
        heads, kv_heads, dim = len(shard.q_heads), len(shard.kv_heads), description.head_dim
        self.inputs = CudaInputs(device, limits)
        self.results = Staged(device, {"ids": ((sequences,), torch.int64), "fault": ((1,), torch.int32)})
        self.residual = device.zeros(most, hidden, dtype=torch.float32)
        self.normed, self.delta = (device.zeros(most, hidden, dtype=dtype) for _ in range(2))
        self.heads = device.zeros(most, heads + 2 * kv_heads, dim, dtype=dtype)
        self.mixed, self.normed_q = (device.zeros(most, heads, dim, dtype=dtype) for _ in range(2))
        self.normed_k = device.zeros(most, kv_heads, dim, dtype=dtype)
        self.gate_up = device.zeros(most, 2 * len(shard.ffn), dtype=dtype)
        self.gated = device.zeros(most, len(shard.ffn), dtype=dtype)
        floats = ops.workspace_floats(sequences, heads, dim, limits.context)
        self.workspace = device.zeros(floats, dtype=torch.float32)
        self.states = device.zeros(sequences, hidden, dtype=dtype)
        self.own_logits = device.zeros(sequences, len(shard.vocab), dtype=torch.float32)
        self.logits = self.own_logits
        if shard.tp > 1 and shard.rank == 0:
            self.logits = device.zeros(sequences, description.vocab_size, dtype=torch.float32)
        self.readings = Staged(
            device, {"rows": ((sequences,), torch.int64), "ids": ((sequences,), torch.int64)}
        )
        self.logprobs = None
        if shard.rank == 0:
            self.logprobs = CudaLogprobs(device, self.logits, self.readings.device["ids"])
        self.rope_tables = {
            rope: _sent(device, table) for rope, table in rope_tables(description, limits.context).items()
        }


def _sent(device: CudaDevice, tensor: Tensor) -> Tensor:
    there = device.zeros(*tensor.shape, dtype=tensor.dtype)
    device.send_whole(there, tensor)
    return there


class CudaDecoder:
    """One rank's part of the model on its device, bound to a cache there. ``ids`` (int64) and ``logits`` (float32
    [states, vocabulary]) are of the step that was started last, once it is done."""

    def __init__(
        self,
        description: ModelDescription,
        shard: Shard,
        parameters: Parameters[CudaWeight],
        cache: KVCache,
        group: DeviceGroup,
        buffers: CudaBuffers,
    ) -> None:
        self._buffers = buffers
        self._device = buffers.device
        self._inputs = buffers.inputs
        self._spare_block = cache.num_blocks
        self.logits = buffers.logits
        self.ids = buffers.results.device["ids"]
        self._program = self._device.program()
        _Pass(self._program, description, shard, parameters, cache, group, buffers).record()
        self._read = Count(buffers.limits.sequences)
        self._reading = self._device.program()
        head = _Head(description, parameters, group, buffers)
        head.record(self._program, self._inputs.device["state_rows"], self._inputs.states)
        head.record(self._reading, buffers.readings.device["rows"], self._read)
        self._telling = self._device.program()
        group.tell_ids(self._telling, self.ids, self._inputs.states)
        self._graphs: dict[tuple[int, int], Graph] = {}
        self._coming = _usual_graphs(buffers.limits)

    def start(self, inputs: StepInputs, sources: Int32s) -> None:
        """Puts a step on the stream, from token ids to logits. sources: as ``CudaInputs.load`` wants them."""
        rows = len(inputs.context_lens)
        if rows < len(inputs.token_ids):
            self._inputs.load(inputs, sources, rows, self._spare_block)
            self._program.run()
            return
        padded = graph_rows(rows, self._buffers.limits.sequences)
        self._inputs.load(inputs, sources, padded, self._spare_block)
        most_context = self._inputs.most_context
        most_context.set(_graph_context(most_context.value, most_context.most))
        if padded == self._inputs.states.value:
            self._run_graph(padded, most_context.value)
        else:
            self._program.run()

    def _run_graph(self, rows: int, most_context: int) -> None:
        graph = self._graphs.get((rows, most_context))
        if graph is not None:
            graph.launch()
            return
        # Without a graph the first time: so all kernels are loaded when they are captured.
        self._program.run()
        with self._device.capture() as graph:
            self._program.run()
        self._graphs[rows, most_context] = graph

    def prepare_graph(self) -> bool:
        """Captures the next graph that steps will want, with a step that nobody reads; whether there is one left.
        Nothing may be under way."""
        self._coming = [key for key in self._coming if key not in self._graphs]
        if self._coming:
            rows, most_context = self._coming.pop()
            step = _step_of_nobody(self._spare_block, self._buffers.limits.block_size)
            self._inputs.load(step, _NOBODY, rows, self._spare_block)
            self._inputs.most_context.set(most_context)
            self._run_graph(rows, most_context)
        return bool(self._coming)

    def bring_results(self) -> dict[str, NDArray[np.generic]]:
        """Puts on the stream that all ranks learn what rank 0 has drawn, and a copy of it to the host. Returns where it
        will be."""
        self._telling.run()
        return self._buffers.results.bring()

    @staticmethod
    def check(results: dict[str, NDArray[np.generic]]) -> None:
        """Once the results are there: raises PeerLost where another rank is gone, IndexError where an input was out of
        range."""
        fault = int(results["fault"][0])
        if fault == _PEER_LOST:
            raise PeerLost("a tensor-parallel peer is gone")
        if fault:
            raise IndexError(_FAULTS[fault])

    def hidden(self, tokens: int) -> Tensor:
        """float32 [tokens, hidden] on the host, of the step that was started last. Waits for it."""
        return self._device.fetch(self._buffers.normed[:tokens]).float()

    def read_logprobs(
        self, states: NDArray[np.int64], ids: Sequence[int], tops: Sequence[int]
    ) -> list[TokenLogprob]:
        """Of the tokens ``ids`` after any of that step's T states, each with so many of the best; on other ranks than
        the first none. Waits; the step's own logits are lost."""
        logprobs: list[TokenLogprob] = []
        for begin in range(0, len(ids), self._read.most):
            part = slice(begin, begin + self._read.most)
            count = len(ids[part])
            self._read.set(count)
            filled = self._buffers.readings.fill()
            filled["rows"][:count], filled["ids"][:count] = states[part], ids[part]
            self._buffers.readings.send()
            self._reading.run()
            found = None
            if self._buffers.logprobs is not None:
                self._buffers.logprobs.start(range(count), tops[part])
                found = self._buffers.logprobs.bring()
            self._device.wait()
            if found is not None:
                logprobs += [found.read(place, top) for place, top in enumerate(tops[part])]
        return logprobs


def _graph_context(context: int, most: int) -> int:
    """Powers of four: a block that has nothing to do ends at once, but it has to be started."""
    bucket = _FEWEST_CONTEXT
    while bucket < context:
        bucket *= 4
    return min(bucket, most)


def _usual_graphs(limits: StepLimits) -> list[tuple[int, int]]:
    """Numbers of rows and longest contexts, those last that are wanted first."""
    rows = {graph_rows(count, limits.sequences) for count in range(1, limits.sequences + 1)}
    most = min(_USUAL_CONTEXT, limits.context)
    contexts = {_graph_context(context, limits.context) for context in (1, most)}
    return sorted(
        ((count, context) for count in rows for context in contexts), key=lambda key: (-key[1], -key[0])
    )


_NOBODY: Final = np.full(1, -1, np.int32)
"""The sources of a step of one token that is known."""


def _step_of_nobody(spare_block: int, block_size: int) -> StepInputs:
    """One token, in the block that no sequence owns."""
    zero, one = np.zeros(1, np.int32), np.ones(1, np.int32)
    return StepInputs(
        token_ids=np.zeros(1, np.int64),
        positions=zero,
        cache_slots=np.full(1, spare_block * block_size, np.int64),
        query_starts=np.array([0, 1], np.int32),
        context_lens=one,
        block_tables=np.full((1, 1), spare_block, np.int32),
        state_starts=np.array([0, 1], np.int32),
        state_tokens=np.zeros(1, np.int64),
        sample_indices=np.zeros(1, np.int64),
    )


class _Head:
    """From the states of some rows to their logits."""

    def __init__(
        self,
        description: ModelDescription,
        parameters: Parameters[CudaWeight],
        group: DeviceGroup,
        buffers: CudaBuffers,
    ) -> None:
        self._group = group
        self._cap = description.logit_soft_cap
        self._weight = parameters.head
        self._buffers = buffers

    def record(self, program: CudaProgram, rows: Tensor, count: Count) -> None:
        buffers = self._buffers
        step_ops.take_rows(program, buffers.states, buffers.normed, rows, count)
        ops.linear(program, buffers.own_logits, buffers.states, self._weight, None, count)
        if self._cap:
            step_ops.cap_logits(program, buffers.own_logits, self._cap, count)
        self._group.gather_logits(program, buffers.logits, buffers.own_logits, count)


class _Pass:
    """From token ids to hidden states, over buffers that one layer after the other uses."""

    def __init__(
        self,
        program: CudaProgram,
        description: ModelDescription,
        shard: Shard,
        parameters: Parameters[CudaWeight],
        cache: KVCache,
        group: DeviceGroup,
        buffers: CudaBuffers,
    ) -> None:
        self._program = program
        self._description = description
        self._first_id = shard.vocab.start
        self._group = group
        self._parameters = parameters
        self._cache = cache
        self._buffers = buffers
        self._arrays = buffers.inputs.device
        self._rows = buffers.inputs.tokens
        self._eps = description.norm_eps
        self._fault = buffers.results.device["fault"]

    def record(self) -> None:
        program, buffers, parameters = self._program, self._buffers, self._parameters
        ids, drawn = self._arrays["token_ids"], buffers.results.device["ids"]
        step_ops.feed_tokens(program, ids, drawn, self._arrays["sources"], self._rows)
        scale = self._description.embedding_scale
        ops.embed(program, buffers.residual, ids, parameters.embedding, scale, self._first_id, self._rows)
        self._group.add_up(program, buffers.residual, self._rows)
        for index, layer in enumerate(parameters.layers):
            if index == 0:
                norm = layer.attention.norm
                ops.rms_norm(program, buffers.normed, buffers.residual, norm, self._eps, self._rows)
            else:
                self._add_norm(layer.attention.norm)
            self._attend(layer.attention, index)
            self._add_norm(layer.ffn.norm)
            self._feed_forward(layer.ffn)
        self._add_norm(parameters.final_norm)

    def _attend(self, parameters: AttentionParameters[CudaWeight], layer: int) -> None:
        description, arrays, inputs = self._description, self._arrays, self._buffers.inputs
        window = description.layer_windows[layer]
        caches = (self._cache.keys[layer], self._cache.values[layer])
        scales = parameters.cache_scales if caches[0].dtype == torch.float8_e4m3fn else None
        q, k, v = self._project_heads(parameters)
        ops.rope_write_kv(
            self._program, q, k, v, self._rope_table(window), arrays["positions"], *caches, arrays["cache_slots"],
            self._fault, self._rows, scales,
        )  # fmt: skip
        ops.paged_attention(
            self._program,
            self._buffers.mixed,
            q,
            *caches,
            inputs.block_tables,
            arrays["query_starts"],
            arrays["context_lens"],
            self._buffers.workspace,
            self._fault,
            description.attention_scale,
            window,
            description.attention_soft_cap,
            self._rows,
            inputs.sequences,
            inputs.most_tokens,
            inputs.most_context,
            scales,
        )
        self._finish(parameters.output, self._buffers.mixed.flatten(1), parameters.post_norm)

    def _project_heads(self, parameters: AttentionParameters[CudaWeight]) -> tuple[Tensor, Tensor, Tensor]:
        """q: [T, query heads, dim]; k, v: [T, KV heads, dim]; views of one matrix unless q and k are normed."""
        buffers = self._buffers
        self._multiply(buffers.heads.flatten(1), parameters.qkv, buffers.normed)
        kv_heads = buffers.normed_k.shape[1]
        q, k, v = torch.split(buffers.heads, [buffers.mixed.shape[1], kv_heads, kv_heads], dim=1)
        if parameters.q_norm is not None:
            q = self._norm_heads(buffers.normed_q, q, parameters.q_norm)
        if parameters.k_norm is not None:
            k = self._norm_heads(buffers.normed_k, k, parameters.k_norm)
        return q, k, v

    def _norm_heads(self, out: Tensor, heads: Tensor, weight: Tensor) -> Tensor:
        ops.rms_norm(self._program, out, heads, weight, self._eps, self._rows)
        return out

    def _feed_forward(self, parameters: FeedForwardParameters[CudaWeight]) -> None:
        buffers, activation = self._buffers, self._description.activation
        self._multiply(buffers.gate_up, parameters.gate_up, buffers.normed)
        ops.gated_activation(self._program, buffers.gated, buffers.gate_up, activation, self._rows)
        self._finish(parameters.down, buffers.gated, parameters.post_norm)

    def _finish(self, linear: Linear[CudaWeight], x: Tensor, post_norm: Tensor | None) -> None:
        """What is added to the residual: the ranks' partial sums together, normed where the family does so."""
        delta = self._buffers.delta
        self._multiply(delta, linear, x)
        self._group.add_up(self._program, delta, self._rows)
        if post_norm is not None:
            ops.rms_norm(self._program, delta, delta, post_norm, self._eps, self._rows)

    def _add_norm(self, weight: Tensor) -> None:
        buffers = self._buffers
        ops.add_rms_norm(
            self._program, buffers.normed, buffers.residual, buffers.delta, weight, self._eps, self._rows
        )

    def _multiply(self, out: Tensor, linear: Linear[CudaWeight], x: Tensor) -> None:
        begin = 0
        for part in linear.parts:
            end = begin + part.rows
            bias = None if linear.bias is None else linear.bias[begin:end]
            ops.linear(self._program, out[:, begin:end], x, part, bias, self._rows)
            begin = end

    def _rope_table(self, window: int) -> Tensor:
        local = self._description.local_rope
        return self._buffers.rope_tables[local if window and local is not None else self._description.rope]
