"""The one decoder: every family's forward pass, driven by its ``ModelDescription``. Called by ``runner``.

The pass is recorded once, as two ``Program``s over fixed buffers: from token ids to hidden states, and from hidden
states to logits. A step fills the inputs and runs them. Activations are float32, or quantised where the next weight
is; keys and values are always read back from the cache, also those of the tokens being computed, so chunking changes
nothing.
"""

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.checkpoint.description import ModelDescription
from shoal.cuda_ext import ops
from shoal.cuda_ext.ops import Activations
from shoal.cuda_ext.program import Count, Program
from shoal.cuda_ext.quantised import QuantisedRows, TileRows
from shoal.workers.inputs import StepBuffers, StepInputs
from shoal.workers.kv_cache import KVCache
from shoal.workers.layers import AttentionParameters, FeedForwardParameters, HostWeight, Linear, Parameters
from shoal.workers.parallel import Group, Shard
from shoal.workers.rope import rope_tables

_FEWEST_STATES: Final = 8


class Decoder:
    """One rank's part of the model, bound to its cache and to its peers of one crew epoch."""

    def __init__(
        self,
        description: ModelDescription,
        shard: Shard,
        parameters: Parameters[HostWeight],
        cache: KVCache,
        group: Group,
        session_len: int,
    ) -> None:
        self._description = description
        self._shard = shard
        self._parameters = parameters
        self._cache = cache
        self._group = group
        self._tables = rope_tables(description, session_len)
        self._pass: _Pass | None = None
        self._head: _Head | None = None

    @property
    def vocab_size(self) -> int:
        """Columns of ``logits``."""
        return self._description.vocab_size

    def prepare_blocks(self, last: int) -> bool:
        """Of the cache, those that come after ``last``: ``KVCache.prepare``."""
        return self._cache.prepare(last)

    def compute(self, inputs: StepInputs) -> None:
        """Runs a step, whose N states are there until the next one."""
        if self._pass is None or not self._pass.inputs.holds(inputs):
            before = self._pass.inputs if self._pass else None
            self._pass = _Pass(self, StepBuffers.for_step(inputs, before))
        self._pass.inputs.load(inputs)
        self._pass.program.run()

    @property
    def hidden(self) -> NDArray[np.float32]:
        """[N, hidden]: the states that the last step wanted, after the final norm, on every rank."""
        assert self._pass is not None
        return self._pass.states[: self._pass.inputs.states.value]

    def logits(self, states: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """[S, vocabulary] of S of the N states on rank 0, None on the others; overwritten by the next call."""
        assert self._pass is not None
        count, head = len(states), self._head
        if head is None or head.final is not self._pass.final or count > head.rows.most:
            held = _FEWEST_STATES if head is None else head.rows.most
            head = self._head = _Head(self, self._pass.final, max(count, held))
        head.rows.set(count)
        head.states[:count] = states
        head.program.run()
        return None if head.gathered is None else head.gathered[:count]


class _Head:
    """The recorded way from the states of a pass to the logits: this rank's columns, then all of them on rank 0."""

    def __init__(self, decoder: Decoder, final: Tensor, most: int) -> None:
        """final: float32 [at least N, hidden]; at most ``most`` of its rows at a time."""
        description, weight = decoder._description, decoder._parameters.head
        self.final = final
        self.rows = Count(most)
        self.states = np.zeros(most, np.int64)
        hidden = _zeros(most, description.hidden_size)
        self.logits = _zeros(most, weight.rows)
        self.program = Program()
        linear = Linear((weight,))
        x = Activations(hidden, _quantised(most, description.hidden_size, linear))
        ops.take_rows(self.program, hidden, final, torch.from_numpy(self.states), self.rows)
        if x.quantised is not None:
            ops.quantise(self.program, x.quantised, hidden, self.rows)
        linear.record(self.program, self.logits, x, self.rows)
        if description.logit_soft_cap:
            self.program.add_function(lambda: self._cap(description.logit_soft_cap))
        gathered = decoder._group.gather_columns(
            self.program, self.logits, decoder._shard.vocab_widths, self.rows
        )
        self.gathered: NDArray[np.float32] | None = None if gathered is None else gathered.numpy()

    def _cap(self, cap: float) -> None:
        logits = self.logits[: self.rows.value]
        torch.tanh(logits.div_(cap), out=logits)
        logits.mul_(cap)


class _Pass:
    """The recorded way from token ids to hidden states, and the buffers that it goes through: one layer after the
    other uses the same ones.

    Of the last layer all tokens' keys and values are needed, but of what comes after them only the states that the step
    wants: of a prompt one. From there on ``_rows``, ``_starts`` and ``_residual`` are those of the states.
    """

    def __init__(self, decoder: Decoder, inputs: StepBuffers) -> None:
        self.inputs = inputs
        self.program = Program()
        self._decoder = decoder
        self._description = decoder._description
        self._rows, self._starts = inputs.tokens, inputs.query_starts
        most, width = inputs.tokens.most, self._description.hidden_size
        shard, dim = decoder._shard, self._description.head_dim
        self._residual, self._delta = _zeros(most, width), _zeros(most, width)
        self._heads = _zeros(most, len(shard.q_heads) + 2 * len(shard.kv_heads), dim)
        self._mixed = _zeros(most, len(shard.q_heads), dim)
        self._gate_up, self._gated = _zeros(most, 2 * len(shard.ffn)), TileRows.empty(most, len(shard.ffn))
        self._normed_q = _zeros(most, len(shard.q_heads), dim)
        self._state_q = _zeros(most, len(shard.q_heads), dim)
        self._normed_k = _zeros(most, len(shard.kv_heads), dim)
        self._activations: dict[tuple[int, bool, bool], Activations] = {}
        self.final = _zeros(most, width)
        self.states: NDArray[np.float32] = self.final.numpy()
        self._record()

    def _record(self) -> None:
        decoder, parameters = self._decoder, self._decoder._parameters
        layers = parameters.layers
        scale, first_id = self._description.embedding_scale, decoder._shard.vocab.start
        ids = self.inputs.token_ids
        ops.embed(self.program, self._residual, ids, parameters.embedding, scale, first_id, self._rows)
        decoder._group.add_up(self.program, self._residual, self._rows)
        hidden = self._inputs_of(layers[0].attention.qkv)
        ops.rms_norm(
            self.program,
            hidden,
            self._residual,
            layers[0].attention.norm,
            self._description.norm_eps,
            self._rows,
        )
        for index, layer in enumerate(layers):
            self._attend(hidden, layer.attention, index)
            hidden = self._inputs_of(layer.ffn.gate_up)
            self._add_norm(hidden, layer.ffn.norm)
            self._feed_forward(hidden, layer.ffn)
            if index + 1 < len(layers):
                following = layers[index + 1].attention
                hidden = self._inputs_of(following.qkv)
                self._add_norm(hidden, following.norm)
        self._add_norm(Activations(self.final), parameters.final_norm)

    def _attend(self, hidden: Activations, parameters: AttentionParameters[HostWeight], layer: int) -> None:
        decoder, description, inputs = self._decoder, self._description, self.inputs
        window = description.layer_windows[layer]
        keys, values = decoder._cache.keys[layer], decoder._cache.values[layer]
        q, k, v = self._project_heads(hidden, parameters)
        ops.rope_write_kv(
            self.program, q, k, v, self._rope_table(window), inputs.positions, keys, values, inputs.cache_slots,
            self._rows,
        )  # fmt: skip
        if layer + 1 == len(decoder._parameters.layers):
            q = self._take_states(q)
        ops.paged_attention(
            self.program,
            self._mixed,
            q,
            keys,
            values,
            inputs.block_tables,
            self._starts,
            inputs.context_lens,
            description.attention_scale,
            window,
            description.attention_soft_cap,
            self._rows,
            inputs.sequences,
        )
        mixed = self._mixed.flatten(1)
        quantised = self._inputs_of(parameters.output).quantised
        if quantised is not None:
            ops.quantise(self.program, quantised, mixed, self._rows)
        self._finish(parameters.output, Activations(mixed, quantised), parameters.post_norm)

    def _take_states(self, q: Tensor) -> Tensor:
        """Leaves the tokens behind whose states nobody wants; q of the others."""
        inputs, residual = self.inputs, torch.zeros_like(self._residual)
        for out, x in ((self._state_q, q), (residual, self._residual)):
            ops.take_rows(self.program, out, x, inputs.state_tokens, inputs.states)
        self._rows, self._starts, self._residual = inputs.states, inputs.state_starts, residual
        return self._state_q

    def _project_heads(
        self, hidden: Activations, parameters: AttentionParameters[HostWeight]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q: [T, query heads, dim]; k, v: [T, KV heads, dim]; views of one matrix unless q and k are normed."""
        num_q, num_kv = self._mixed.shape[1], self._normed_k.shape[1]
        parameters.qkv.record(self.program, self._heads.flatten(1), hidden, self._rows)
        q, k, v = torch.split(self._heads, [num_q, num_kv, num_kv], dim=1)
        if parameters.q_norm is not None:
            q = self._norm_heads(self._normed_q, q, parameters.q_norm)
        if parameters.k_norm is not None:
            k = self._norm_heads(self._normed_k, k, parameters.k_norm)
        return q, k, v

    def _norm_heads(self, out: Tensor, heads: Tensor, weight: Tensor) -> Tensor:
        rows = Activations(out.flatten(0, 1))
        ops.rms_norm(self.program, rows, heads, weight, self._description.norm_eps, self._rows)
        return out

    def _feed_forward(self, hidden: Activations, parameters: FeedForwardParameters[HostWeight]) -> None:
        kind = self._description.activation
        if parameters.gates_in_product:
            parameters.record_gated(self.program, self._gated, hidden, kind, self._rows)
            self._finish(parameters.down, Activations(None, tiles=self._gated), parameters.post_norm)
            return
        parameters.gate_up.record(self.program, self._gate_up, hidden, self._rows)
        gated = self._inputs_of(parameters.down)
        ops.gated_activation(self.program, gated, self._gate_up, kind, self._rows)
        self._finish(parameters.down, gated, parameters.post_norm)

    def _finish(self, linear: Linear[HostWeight], x: Activations, post_norm: Tensor | None) -> None:
        """What is added to the residual: the ranks' partial sums together, normed where the family does so."""
        linear.record(self.program, self._delta, x, self._rows)
        self._decoder._group.add_up(self.program, self._delta, self._rows)
        if post_norm is not None:
            eps = self._description.norm_eps
            ops.rms_norm(self.program, Activations(self._delta), self._delta, post_norm, eps, self._rows)

    def _add_norm(self, out: Activations, weight: Tensor) -> None:
        eps = self._description.norm_eps
        ops.add_rms_norm(self.program, out, self._residual, self._delta, weight, eps, self._rows)

    def _inputs_of(self, linear: Linear[HostWeight]) -> Activations:
        """The buffers for what ``linear`` reads."""
        key = (linear.columns, linear.reads_plain, linear.reads_quantised)
        if key not in self._activations:
            most = self._rows.most
            self._activations[key] = Activations(
                _zeros(most, linear.columns) if linear.reads_plain else None,
                _quantised(most, linear.columns, linear),
            )
        return self._activations[key]

    def _rope_table(self, window: int) -> Tensor:
        local = self._description.local_rope
        return self._decoder._tables[local if window and local is not None else self._description.rope]


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


def _quantised(rows: int, columns: int, linear: Linear[HostWeight]) -> QuantisedRows | None:
    return QuantisedRows.empty(rows, columns) if linear.reads_quantised else None
