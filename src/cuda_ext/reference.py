"""The operators in plain torch: the specification that every compiled kernel is tested against, and what runs
where no extension was built. Called by ``ops.py`` and by tests.

Sums are taken in float32, or in float64 where an argument is float64 (tests use that as the truth).
"""

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional


def _accumulation(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(_accumulation(x, weight))
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return wide * torch.rsqrt(mean_square + eps) * weight


def add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    residual += x
    return rms_norm(residual, weight, eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [tokens, heads, dim]; cos, sin: [tokens, 1, half the rotary dims]."""
    half = cos.shape[-1]
    low, high, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)


def rope_write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_slots: Tensor,
) -> None:
    cos, sin = cos_sin[positions.long()].unsqueeze(1).chunk(2, dim=-1)
    q.copy_(_rotate(q, cos, sin))
    block_size = k_cache.shape[2]
    blocks, offsets = cache_slots // block_size, cache_slots % block_size
    k_cache[blocks, :, offsets] = cached(_rotate(k, cos, sin), k_cache.dtype)
    v_cache[blocks, :, offsets] = cached(v, v_cache.dtype)


CACHE_GROUP = 32
"""Elements of an int8 cache under one scale."""
_SCALE_BYTES = 4


def scale_bytes(dim: int) -> int:
    """Of a head of ``dim`` in an int8 cache."""
    return -(-dim // CACHE_GROUP) * _SCALE_BYTES


def cached(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Heads as a cache of ``dtype`` keeps them: of int8, codes and then the bytes of their float32 scales."""
    if dtype != torch.int8:
        return rows.to(dtype)
    dim = rows.shape[-1]
    groups = functional.pad(rows.float(), (0, -dim % CACHE_GROUP)).view(*rows.shape[:-1], -1, CACHE_GROUP)
    largest = groups.abs().amax(-1)
    tiny = largest < 1e-30
    factors = torch.where(tiny, 0.0, torch.tensor(127.0) / largest).unsqueeze(-1)
    codes = (groups * factors).round().to(torch.int8).flatten(-2)[..., :dim]
    return torch.cat([codes, torch.where(tiny, 0.0, largest / 127).view(torch.int8)], dim=-1)


def read(cached: Tensor, wide: torch.dtype) -> Tensor:
    """The heads that ``cached`` made."""
    if cached.dtype != torch.int8:
        return cached.to(wide)
    groups = -(-cached.shape[-1] // (CACHE_GROUP + _SCALE_BYTES))
    dim = cached.shape[-1] - groups * _SCALE_BYTES
    scales = cached[..., dim:].contiguous().view(torch.float32)
    return cached[..., :dim].to(wide) * scales.repeat_interleave(CACHE_GROUP, dim=-1)[..., :dim]


_PAIRED_POSITIONS = 16
"""Of a head that lie together in a cache in pairs."""


def in_pairs(k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Caches [blocks, kv heads, block size, dim] as kernels that multiply pairs keep them: of a head each 16
    positions lie together, keys as [dim / 2, 16, 2], values as [8, dim, 2]."""
    groups = (*k_cache.shape[:2], -1, _PAIRED_POSITIONS)
    keys = k_cache.reshape(*groups, k_cache.shape[3] // 2, 2).transpose(3, 4)
    values = v_cache.reshape(*groups[:3], _PAIRED_POSITIONS // 2, 2, v_cache.shape[3]).transpose(4, 5)
    return keys.reshape(k_cache.shape), values.reshape(v_cache.shape)


def in_rows(k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor]:
    """What ``in_pairs`` was given."""
    groups = (*k_cache.shape[:2], -1)
    keys = k_cache.reshape(*groups, k_cache.shape[3] // 2, _PAIRED_POSITIONS, 2).transpose(3, 4)
    values = v_cache.reshape(*groups, _PAIRED_POSITIONS // 2, v_cache.shape[3], 2).transpose(4, 5)
    return keys.reshape(k_cache.shape), values.reshape(v_cache.shape)


def _gather(cache: Tensor, table: Tensor, length: int) -> Tensor:
    """The first ``length`` positions of a sequence: [kv heads, length, dim]."""
    block_size = cache.shape[2]
    blocks = cache[table[: -(-length // block_size)].long()]
    return blocks.transpose(0, 1).flatten(1, 2)[:, :length]


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int,
    soft_cap: float,
) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype)
    wide = _accumulation(q, k_cache)
    kv_heads = k_cache.shape[1]
    starts = query_starts.tolist()
    for row, context in enumerate(context_lens.tolist()):
        begin, end = starts[row], starts[row + 1]
        if begin == end:
            continue
        keys = read(_gather(k_cache, block_tables[row], context), wide)
        values = read(_gather(v_cache, block_tables[row], context), wide)
        # [kv heads, query heads of one kv head, tokens, dim]
        queries = q[begin:end].to(wide).reshape(end - begin, kv_heads, -1, q.shape[2]).permute(1, 2, 0, 3)
        scores = queries @ keys.unsqueeze(1).transpose(-1, -2) * scale
        if soft_cap:
            scores = torch.tanh(scores / soft_cap) * soft_cap
        seen_from = torch.arange(context - (end - begin), context).unsqueeze(1)
        positions = torch.arange(context)
        hidden = positions > seen_from
        if window:
            hidden |= positions <= seen_from - window
        weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
        out[begin:end] = (weights @ values.unsqueeze(1)).permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)
    return out


def gated_activation(gate_up: Tensor, kind: str) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    active = functional.silu(gate) if kind == "silu" else functional.gelu(gate, approximate="tanh")
    return active * up


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = _accumulation(x, weight)
    return functional.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))


def embed(ids: Tensor, weight: Tensor, scale: float, first_id: int) -> Tensor:
    local = ids - first_id
    inside = (local >= 0) & (local < weight.shape[0])
    rows = weight[torch.where(inside, local, 0)].to(_accumulation(weight)) * scale
    return rows.masked_fill(~inside.unsqueeze(1), 0.0)


def all_reduce(parts: list[Tensor]) -> Tensor:
    """One a rank, added in the order of the ranks."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def _draw_row(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float
) -> int:
    peak = logits.max()
    if not torch.isfinite(peak):
        return -1
    if temperature == 0:
        return int((logits == peak).nonzero()[0])
    weights = torch.exp((logits - peak) / max(temperature, 1e-10))
    weights, ids = weights.sort(descending=True, stable=True)
    kept = torch.ones_like(weights, dtype=torch.bool)
    if 0 < top_k < weights.numel():
        kept[top_k:] = False
    if top_p < 1:
        mass = (weights * kept).double().cumsum(0)
        kept[1:] &= mass[:-1] < mass[-1] * top_p
    kept &= weights >= min(min_p, 1.0)
    ids, order = ids[kept].sort()
    mass = weights[kept][order].double().cumsum(0)
    passed = (mass > mass[-1] * uniform).nonzero()
    return int(ids[passed[0]] if passed.numel() else ids[-1])


def draw(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
) -> Tensor:
    columns = (temperature, top_k, top_p, min_p, uniform)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return torch.tensor([_draw_row(logits[i], *row) for i, row in enumerate(rows)], dtype=torch.int64)


OUTLIERS: Final = 16
GATED_OUTLIERS: Final = 28
"""A group of activations has an outlier where its largest is more than the root of this times its root mean square
(csrc/cpu/quantise.h)."""


def quantise(x: Tensor, row_bytes: int, outliers: int = OUTLIERS) -> Tensor:
    """uint8 [rows, row_bytes]: of each group its codes, their scale, scale · their sum, that of the first 16, 8 · sum
    and 128 · sum; each group's outlier; its place in the group, or 255, up to a multiple of 16 of them."""
    rows, columns = x.shape
    groups = functional.pad(x.float(), (0, -columns % 32)).view(rows, -1, 32)
    squares = _codes(groups)[0].square().sum(2)
    has_outlier = (squares > 0) & (squares < 127 * 127 * 32 // outliers)
    at = functional.one_hot(groups.abs().argmax(2), 32).bool() & has_outlier.unsqueeze(2)
    codes, scales = _codes(groups.masked_fill(at, 0.0))
    sums, first_sums = codes.sum(2), codes[:, :, :16].sum(2)
    integers = torch.stack([first_sums, 8 * sums, 128 * sums], dim=2).to(torch.int32)
    records = [codes.to(torch.int8), torch.stack([scales, scales * sums], dim=2), integers]
    laid = torch.cat([part.contiguous().view(torch.uint8) for part in records], dim=2).flatten(1)
    apart = groups.masked_fill(~at, 0.0).sum(2)
    places = torch.where(has_outlier, at.int().argmax(2), 255).to(torch.uint8)
    places = functional.pad(places, (0, -places.shape[1] % 16), value=255)
    laid = torch.cat([laid, apart.view(torch.uint8), places], dim=1)
    return functional.pad(laid, (0, row_bytes - laid.shape[1]))


def _codes(groups: Tensor) -> tuple[Tensor, Tensor]:
    """[…, 32] and their scales […]."""
    largest = groups.abs().amax(-1)
    tiny = largest < 1e-30
    scales = torch.where(tiny, 0.0, largest / 127)
    inverses = torch.where(tiny, 0.0, torch.tensor(127.0) / largest)
    return (groups * inverses.unsqueeze(-1)).round(), scales
