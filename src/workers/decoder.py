"""The one decoder: every family's forward pass, driven by its ``ModelDescription``. Called by ``runner``.

Activations are float32 throughout; only weights and the cache may be narrower. Keys and values are always read back
from the cache, also those of the tokens being computed, so chunking changes nothing.
"""

import torch
from torch import Tensor

from shoal.checkpoint.description import ModelDescription, Rope
from shoal.cuda_ext import ops
from shoal.workers.inputs import StepInputs
from shoal.workers.kv_cache import KVCache
from shoal.workers.layers import AttentionParameters, FeedForwardParameters, Parameters
from shoal.workers.parallel import Group, Shard
from shoal.workers.rope import cos_sin_table


class Decoder:
    """One rank's part of the model, bound to its cache and to its peers of one crew epoch."""

    def __init__(
        self,
        description: ModelDescription,
        shard: Shard,
        parameters: Parameters,
        cache: KVCache,
        group: Group,
        session_len: int,
    ) -> None:
        self._description = description
        self._shard = shard
        self._parameters = parameters
        self._cache = cache
        self._group = group
        self._tables = _rope_tables(description, session_len)

    @property
    def vocab_size(self) -> int:
        """Columns of ``logits``."""
        return self._description.vocab_size

    def hidden(self, inputs: StepInputs) -> Tensor:
        """float32 [T, hidden], after the final norm, on every rank."""
        layers = self._parameters.layers
        residual = self._embed(inputs.token_ids)
        hidden = self._norm(residual, layers[0].attention.norm)
        next_norms = [layer.attention.norm for layer in layers[1:]] + [self._parameters.final_norm]
        for index, (layer, next_norm) in enumerate(zip(layers, next_norms, strict=True)):
            delta = self._attend(hidden, layer.attention, index, inputs)
            hidden = self._add_norm(residual, delta, layer.ffn.norm)
            delta = self._feed_forward(hidden, layer.ffn)
            hidden = self._add_norm(residual, delta, next_norm)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor | None:
        """float32 [S, vocabulary] of S hidden states on rank 0, None on the others."""
        logits = ops.linear(hidden, self._parameters.head)
        cap = self._description.logit_soft_cap
        if cap:
            logits = torch.tanh(logits / cap) * cap
        return self._group.gather_columns(logits, self._shard.vocab_widths)

    def _embed(self, token_ids: Tensor) -> Tensor:
        """float32 [T, hidden]."""
        first_id = self._shard.vocab.start
        rows = ops.embed(token_ids, self._parameters.embedding, self._description.embedding_scale, first_id)
        return self._group.add_up(rows)

    def _attend(
        self, hidden: Tensor, parameters: AttentionParameters, layer: int, inputs: StepInputs
    ) -> Tensor:
        description = self._description
        window = description.layer_windows[layer]
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        q, k, v = self._project_heads(hidden, parameters)
        ops.rope_write_kv(q, k, v, self._rope_table(window), inputs.positions, keys, values, inputs.cache_slots)
        mixed = ops.paged_attention(
            q,
            keys,
            values,
            inputs.block_tables,
            inputs.query_starts,
            inputs.context_lens,
            description.attention_scale,
            window,
            description.attention_soft_cap,
        )
        return self._finish(parameters.output(mixed.flatten(1)), parameters.post_norm)

    def _project_heads(self, hidden: Tensor, parameters: AttentionParameters) -> tuple[Tensor, Tensor, Tensor]:
        """q: [T, query heads, dim]; k, v: [T, KV heads, dim]; views of one matrix unless q and k are normed."""
        num_q, num_kv = len(self._shard.q_heads), len(self._shard.kv_heads)
        num_heads = num_q + 2 * num_kv
        heads = parameters.qkv(hidden).view(len(hidden), num_heads, self._description.head_dim)
        q, k, v = heads[:, :num_q], heads[:, num_q:-num_kv], heads[:, -num_kv:]
        if parameters.q_norm is not None:
            q = ops.rms_norm(q, parameters.q_norm, self._description.norm_eps)
        if parameters.k_norm is not None:
            k = ops.rms_norm(k, parameters.k_norm, self._description.norm_eps)
        return q, k, v

    def _feed_forward(self, hidden: Tensor, parameters: FeedForwardParameters) -> Tensor:
        gated = ops.gated_activation(parameters.gate_up(hidden), self._description.activation)
        return self._finish(parameters.down(gated), parameters.post_norm)

    def _finish(self, partial: Tensor, post_norm: Tensor | None) -> Tensor:
        """What is added to the residual: the ranks' partial sums together, normed where the family does so."""
        delta = self._group.add_up(partial)
        if post_norm is None:
            return delta
        return ops.rms_norm(delta, post_norm, self._description.norm_eps)

    def _norm(self, residual: Tensor, weight: Tensor) -> Tensor:
        return ops.rms_norm(residual, weight, self._description.norm_eps)

    def _add_norm(self, residual: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
        return ops.add_rms_norm(residual, delta, weight, self._description.norm_eps)

    def _rope_table(self, window: int) -> Tensor:
        local = self._description.local_rope
        return self._tables[local if window and local is not None else self._description.rope]


def _rope_tables(description: ModelDescription, session_len: int) -> dict[Rope, Tensor]:
    ropes = (description.rope, description.local_rope)
    return {rope: cos_sin_table(rope, description.head_dim, session_len) for rope in ropes if rope is not None}
