"""Tensor parallelism: who computes which part of the model, and how partial results meet.

``split`` is called by ``loop`` before loading and by ``load`` to read only one rank's part; ``form_group`` once a
crew epoch. The decoder sees a ``Group`` and never asks how many ranks there are.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.checkpoint.description import ModelDescription
from shoal.errors import ModelError, StartError

_CUT_UNIT = 32
"""Cuts fall on multiples of this where they can: the edges of quantisation groups."""
_TIMEOUT_S = 30.0
"""For peers that hang: one that dies is noticed at once, by its closed connection."""


class PeerLost(Exception):
    """Another rank is gone or does not answer; this crew epoch is over, the weights are still good."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of the model, as ranges of global indices."""

    rank: int
    tp: int
    q_heads: range
    kv_heads: range
    """The key-value heads that ``q_heads`` read, in equal groups; replicated where ranks outnumber them."""
    ffn: range
    """Columns of the feed-forward layer."""
    vocab: range
    """Token ids whose embedding and logits this rank holds."""
    vocab_widths: tuple[int, ...]
    """How many ids each rank has."""
    cache_share: float
    """This rank's part of all ranks' KV cache."""


def split(description: ModelDescription, tp: int, rank: int) -> Shard:
    """The part of ``rank`` out of ``tp``; heads are cut by whole KV groups, the rest evens out the load."""
    heads = _split_heads(description, tp)
    vocab = _cut_evenly(description.vocab_size, tp)
    q_heads, kv_heads = heads[rank]
    return Shard(
        rank=rank,
        tp=tp,
        q_heads=q_heads,
        kv_heads=kv_heads,
        ffn=_split_ffn(description, heads)[rank],
        vocab=vocab[rank],
        vocab_widths=tuple(map(len, vocab)),
        cache_share=len(kv_heads) / sum(len(kv) for _, kv in heads),
    )


def _split_heads(description: ModelDescription, tp: int) -> list[tuple[range, range]]:
    """(query heads, KV heads) of each rank."""
    num_heads, num_kv_heads = description.num_heads, description.num_kv_heads
    if tp > num_heads:
        raise StartError(
            f"--tp {tp}: the model has {num_heads} attention heads, which cannot be divided among more ranks; "
            f"use --tp {num_heads} or less"
        )
    if num_heads % num_kv_heads:
        raise ModelError(
            f"{num_heads} query heads (num_attention_heads) cannot share {num_kv_heads} KV heads "
            "(num_key_value_heads) equally"
        )
    group = num_heads // num_kv_heads
    if tp <= num_kv_heads:
        return [(range(kv.start * group, kv.stop * group), kv) for kv in _cut_evenly(num_kv_heads, tp)]
    return [
        (range(kv_head * group + part.start, kv_head * group + part.stop), range(kv_head, kv_head + 1))
        for kv_head, ranks in enumerate(_cut_evenly(tp, num_kv_heads))
        for part in _cut_evenly(group, len(ranks))
    ]


def _split_ffn(description: ModelDescription, heads: list[tuple[range, range]]) -> list[range]:
    """Columns so that attention and feed-forward together weigh the same on every rank."""
    head_weight = description.hidden_size * description.head_dim
    attention = [head_weight * 2 * (len(q) + len(kv)) for q, kv in heads]
    column_weight = 3 * description.hidden_size
    fair = (sum(attention) + column_weight * description.ffn_size) / len(heads)
    return _cut_by_weight(description.ffn_size, [fair - weight for weight in attention], _CUT_UNIT)


def _cut_evenly(total: int, parts: int) -> list[range]:
    return _cut_by_weight(total, [1.0] * parts, unit=1)


def _cut_by_weight(total: int, weights: list[float], unit: int) -> list[range]:
    """Consecutive ranges, none empty, about proportional to ``weights``, cut at multiples of ``unit`` if possible."""
    parts = len(weights)
    if total < parts:
        raise StartError(f"--tp {parts}: a dimension of {total} cannot be divided among {parts} ranks")
    if total < unit * parts:
        unit = 1
    wanted = [max(weight, 0.0) for weight in weights]
    cuts = [0]
    for part in range(1, parts):
        nearest = round(total * sum(wanted[:part]) / sum(wanted) / unit) * unit
        most = (total - 1) // unit * unit - (parts - 1 - part) * unit
        cuts.append(min(max(nearest, cuts[-1] + unit), most))
    return [range(begin, end) for begin, end in zip(cuts, [*cuts[1:], total], strict=True)]


class Group(Protocol):
    """The ranks of one crew epoch. Every rank must make the same calls in the same order."""

    def add_up(self, x: Tensor) -> None:
        """Overwrites ``x``, float32 and contiguous, with the sum of every rank's, on every rank."""

    def gather_columns(self, x: Tensor, widths: tuple[int, ...]) -> Tensor | None:
        """All ranks' ``x``, of ``widths`` columns each, side by side on rank 0; None elsewhere."""

    def broadcast(self, x: Tensor) -> None:
        """Overwrites ``x`` with rank 0's."""

    def close(self) -> None:
        """Leaves; peers that still wait for this rank get ``PeerLost``."""


def form_group(tp: int, rank: int, rendezvous: str) -> Group:
    """Waits for all ranks to arrive at the file ``rendezvous``, which must be new."""
    return SoloGroup() if tp == 1 else GlooGroup(tp, rank, rendezvous)


class SoloGroup:
    """One rank: everything is there already."""

    def add_up(self, x: Tensor) -> None:
        pass

    def gather_columns(self, x: Tensor, widths: tuple[int, ...]) -> Tensor | None:
        return x

    def broadcast(self, x: Tensor) -> None:
        pass

    def close(self) -> None:
        pass


class GlooGroup:
    """Ranks of one host, over gloo on the loopback interface. torch allows a process one such group at a time."""

    def __init__(self, tp: int, rank: int, rendezvous: str) -> None:
        self._rank = rank
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        with _peer_errors():
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(rendezvous, tp),  # type: ignore[attr-defined]
                rank=rank,
                world_size=tp,
                timeout=timedelta(seconds=_TIMEOUT_S),
            )

    def add_up(self, x: Tensor) -> None:
        if x.numel():
            with _peer_errors():
                dist.all_reduce(x)

    def gather_columns(self, x: Tensor, widths: tuple[int, ...]) -> Tensor | None:
        if not len(x):
            return x.new_empty(0, sum(widths)) if self._rank == 0 else None
        padded = x.new_zeros(x.shape[0], max(widths))
        padded[:, : x.shape[1]] = x
        parts = [torch.empty_like(padded) for _ in widths] if self._rank == 0 else None
        with _peer_errors():
            dist.gather(padded, parts, dst=0)
        if parts is None:
            return None
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    def broadcast(self, x: Tensor) -> None:
        with _peer_errors():
            dist.broadcast(x, src=0)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def _peer_errors() -> Iterator[None]:
    """gloo reports a dead or silent peer as a RuntimeError (DistBackendError and the like included)."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(f"a tensor-parallel peer is gone: {error}") from error
