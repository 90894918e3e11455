"""Tensor parallelism: who computes which part of the model, and how partial results meet.

``split`` is called by ``loop`` before loading and by ``load`` to read only one rank's part; ``form_group`` once a
crew epoch. The decoder sees a ``Group`` and never asks how many ranks there are.
"""

import mmap
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from shoal.checkpoint.description import ModelDescription
from shoal.cuda_ext import ops
from shoal.cuda_ext.binding import PeerLost
from shoal.cuda_ext.program import Count, Program
from shoal.cuda_ext.shared_region import SharedRegion
from shoal.errors import ModelError, StartError

_CUT_UNIT = 32
"""Cuts fall on multiples of this where they can: the edges of quantisation groups."""
_TIMEOUT_S = 30.0
"""For peers that do not come to the rendezvous."""


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
    """The ranks of one crew epoch. Every rank must record and run the same in the same order."""

    def add_up(self, program: Program, x: Tensor, rows: Count) -> None:
        """Appends: overwrites the first rows of ``x``, float32 [rows, columns], with the sum of every rank's, on every
        rank."""

    def gather_columns(
        self, program: Program, x: Tensor, widths: tuple[int, ...], rows: Count
    ) -> Tensor | None:
        """Appends: puts all ranks' ``x``, float32 and of ``widths`` columns each, side by side on rank 0. Returns where
        it will be; None elsewhere."""

    def broadcast(self, ids: NDArray[np.int64]) -> None:
        """Overwrites ``ids`` with rank 0's."""

    def close(self) -> None:
        """Leaves; peers that still wait for this rank get ``PeerLost``."""


def form_group(tp: int, rank: int, rendezvous: str) -> Group:
    """Waits for all ranks to arrive at the file ``rendezvous``, which must be new."""
    return SoloGroup() if tp == 1 else HostGroup(tp, rank, rendezvous)


class SoloGroup:
    """One rank: everything is there already."""

    def add_up(self, program: Program, x: Tensor, rows: Count) -> None:
        pass

    def gather_columns(
        self, program: Program, x: Tensor, widths: tuple[int, ...], rows: Count
    ) -> Tensor | None:
        return x

    def broadcast(self, ids: NDArray[np.int64]) -> None:
        pass

    def close(self) -> None:
        pass


class HostGroup:
    """Ranks of one host, which meet in shared memory."""

    def __init__(self, tp: int, rank: int, rendezvous: str) -> None:
        try:
            self._region = _share_region(tp, rank, rendezvous)
        except (RuntimeError, OSError) as error:
            raise PeerLost(f"a tensor-parallel peer did not come: {error}") from error
        self._ids: _BroadcastIds | None = None

    def add_up(self, program: Program, x: Tensor, rows: Count) -> None:
        ops.all_reduce(program, x, self._region, rows)

    def gather_columns(
        self, program: Program, x: Tensor, widths: tuple[int, ...], rows: Count
    ) -> Tensor | None:
        out = x.new_zeros(len(x), sum(widths)) if self._region.rank == 0 else None
        ops.gather_columns(program, out, x, torch.tensor(widths), self._region, rows)
        return out

    def broadcast(self, ids: NDArray[np.int64]) -> None:
        if self._ids is None or len(ids) > self._ids.rows.most:
            self._ids = _BroadcastIds(self._region, len(ids))
        self._ids.run(ids)

    def close(self) -> None:
        self._region.close()


class _BroadcastIds:
    """Gathering columns, of which only rank 0 has any: an id is two floats, which are copied but not looked at."""

    def __init__(self, region: SharedRegion, most: int) -> None:
        self.rows = Count(most)
        self._ids = np.zeros(most, np.int64)
        self._program = Program()
        floats = torch.from_numpy(self._ids).view(torch.float32).view(most, 2)
        nothing = torch.zeros(most, 0)
        widths = torch.tensor([2] + [0] * (region.ranks - 1))
        out, x = (None, floats) if region.rank == 0 else (floats, nothing)
        ops.gather_columns(self._program, out, x, widths, region, self.rows)

    def run(self, ids: NDArray[np.int64]) -> None:
        count = len(ids)
        self.rows.set(count)
        self._ids[:count] = ids
        self._program.run()
        ids[:] = self._ids[:count]


def _share_region(tp: int, rank: int, rendezvous: str) -> SharedRegion:
    """Rank 0 makes the memory, which has no name and ends with the last process that holds it; the others open it
    through rank 0's file descriptor. A rank tells its pid once it has the memory."""
    store = dist.FileStore(rendezvous, tp)  # type: ignore[attr-defined]
    store.set_timeout(timedelta(seconds=_TIMEOUT_S))
    size, pid = SharedRegion.bytes_for(tp), os.getpid()
    if rank == 0:
        file = os.memfd_create("shoal")
        os.ftruncate(file, size)
        store.set("memory", f"/proc/{pid}/fd/{file}")
    else:
        file = os.open(store.get("memory"), os.O_RDWR | os.O_CLOEXEC)
    try:
        memory = mmap.mmap(file, size)
        store.set(f"pid{rank}", str(pid))
        pids = [int(store.get(f"pid{peer}")) for peer in range(tp)]
    finally:
        os.close(file)
    return SharedRegion(memory, rank, pids)
