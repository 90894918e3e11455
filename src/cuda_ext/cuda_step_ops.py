"""The operators around a step of a model: how tokens come to it, and from logits to tokens. As ``cuda_ops``."""

from typing import Final, TypedDict, Unpack

import torch
from torch import Tensor

from shoal.cuda_ext.checks import is_vector, require
from shoal.cuda_ext.cuda_ops import DTYPES
from shoal.cuda_ext.cuda_program import CudaProgram
from shoal.cuda_ext.program import Count, Scaled

REGION_HEADER: Final = 4096
"""Bytes before the slots of memory that ranks meet in."""
_PENALTIES = ("repetition", "presence", "frequency")


def feed_tokens(program: CudaProgram, token_ids: Tensor, drawn: Tensor, sources: Tensor, tokens: Count) -> None:
    """token_ids: int64 [tokens], overwritten by drawn[sources[token]] where sources, int32 [tokens], is not below 0;
    drawn: int64 [rows]."""
    require(is_vector(token_ids, torch.int64, len(sources)), "feed_tokens: token_ids is not int64 [tokens]")
    require(is_vector(sources, torch.int32, len(token_ids)), "feed_tokens: sources is not int32 [tokens]")
    require(is_vector(drawn, torch.int64, len(drawn)), "feed_tokens: drawn is not int64 [rows]")
    program.add(
        "feed_tokens", token_ids=token_ids, drawn=drawn, sources=sources, tokens=tokens, rows=len(drawn)
    )


def take_rows(program: CudaProgram, out: Tensor, x: Tensor, rows: Tensor, count: Count) -> None:
    """out: [count, columns], x[rows]; rows: int64 [count], those outside of x are left out."""
    require(out.dtype == x.dtype and out.shape[1] == x.shape[1], "take_rows: out does not fit x")
    require(out.is_contiguous() and x.is_contiguous(), "take_rows: x or out is not contiguous")
    require(is_vector(rows, torch.int64, len(out)), "take_rows: rows is not int64 [count]")
    row_bytes = x.shape[1] * x.itemsize
    program.add("take_rows", out=out, x=x, rows=rows, count=count, x_rows=len(x), row_bytes=row_bytes)


def _require_logits(logits: Tensor) -> None:
    require(logits.dtype == torch.float32 and logits.stride(1) == 1, "logits are not float32 rows")


def cap_logits(program: CudaProgram, logits: Tensor, cap: float, rows: Count) -> None:
    """logits: float32 [rows, vocabulary], become cap · tanh(logits / cap)."""
    _require_logits(logits)
    sizes = {"vocabulary": logits.shape[1], "row_stride": logits.stride(0)}
    program.add("cap_logits", logits=logits, rows=rows, **sizes, cap=cap)


def adjust_logits(
    program: CudaProgram,
    logits: Tensor,
    biases: tuple[Tensor, Tensor, Tensor],
    seen: tuple[Tensor, Tensor, Tensor],
    penalties: tuple[Tensor, Tensor, Tensor],
    rows: Count,
) -> None:
    """logits: float32 [rows, vocabulary], in place. biases and seen: starts int32 [rows + 1], then ids int32 and values
    float32 of all rows one after the other, no id twice in a row. penalties: repetition, presence and frequency,
    float32 [rows]."""
    _require_logits(logits)
    for starts, ids, values in (biases, seen):
        require(
            is_vector(starts, torch.int32, len(logits) + 1), "adjust_logits: starts is not int32 [rows + 1]"
        )
        require(is_vector(ids, torch.int32, len(values)), "adjust_logits: ids is not int32")
        require(is_vector(values, torch.float32, len(ids)), "adjust_logits: values is not float32")
    require(all(is_vector(each, torch.float32, len(logits)) for each in penalties), "adjust_logits: penalties")
    names = [
        "bias_starts",
        "bias_ids",
        "biases",
        "seen_starts",
        "seen_ids",
        "seen_counts",
        "repetition",
        "presence",
        "frequency",
    ]
    arrays = dict(zip(names, (*biases, *seen, *penalties), strict=True))
    sizes = {"vocabulary": logits.shape[1], "row_stride": logits.stride(0)}
    program.add("adjust_logits", logits=logits, **arrays, rows=rows, **sizes)


def mask_logits(program: CudaProgram, logits: Tensor, mask_of: Tensor, masks: Tensor, rows: Count) -> None:
    """logits: float32 [rows, vocabulary], become -inf where the row's mask has a bit; NaN and +inf
    stay. mask_of: int32 [rows], a row of
    masks or -1; masks: uint8 [masks, vocabulary / 8], the lowest bit of a byte first."""
    _require_logits(logits)
    require(is_vector(mask_of, torch.int32, len(logits)), "mask_logits: mask_of is not int32 [rows]")
    require(masks.dtype == torch.uint8 and masks.is_contiguous(), "mask_logits: masks is not contiguous uint8")
    require(masks.shape[1] * 8 >= logits.shape[1], "mask_logits: masks are too short")
    sizes = {"vocabulary": logits.shape[1], "row_stride": logits.stride(0), "mask_bytes": masks.shape[1]}
    program.add("mask_logits", logits=logits, mask_of=mask_of, masks=masks, rows=rows, **sizes)


def draw(
    program: CudaProgram,
    ids: Tensor,
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    rows: Count,
) -> None:
    """One token a row; tensors, results and random numbers as in ``ops.draw``."""
    _require_logits(logits)
    most = len(logits)
    floats = all(is_vector(each, torch.float32, most) for each in (temperature, top_p, min_p))
    require(floats, "draw: temperature, top_p or min_p is not float32 [rows]")
    require(is_vector(ids, torch.int64, most) and is_vector(top_k, torch.int64, most), "draw: ids or top_k")
    require(is_vector(uniform, torch.float64, most), "draw: uniform is not float64 [rows]")
    columns = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "uniform": uniform}
    sizes = {"vocabulary": logits.shape[1], "row_stride": logits.stride(0)}
    program.add("draw", ids=ids, logits=logits, **columns, rows=rows, **sizes)


def _all_rows(logits: Tensor) -> dict[str, int]:
    """The sizes of logits whose rows are named by number."""
    return {"logits_rows": len(logits), "vocabulary": logits.shape[1], "row_stride": logits.stride(0)}


def score_logits(
    program: CudaProgram,
    totals: Tensor,
    top: tuple[Tensor, Tensor],
    logits: Tensor,
    rows: Tensor,
    tops: Tensor,
    count: Count,
) -> None:
    """Of the rows of logits (float32 [any, vocabulary]) that ``rows``, int64 [count], names. totals: float64 [count],
    the logarithm of the sum of exponentials. top: ids, int32, and logits, float32, [count, width] each, of the best
    that are above -inf, as many as tops, int32 [count], says; -1 where there are no more."""
    _require_logits(logits)
    most, (ids, values) = len(rows), top
    require(is_vector(totals, torch.float64, most), "score_logits: totals is not float64 [count]")
    require(is_vector(rows, torch.int64, most), "score_logits: rows is not int64 [count]")
    require(is_vector(tops, torch.int32, most), "score_logits: tops is not int32 [count]")
    require(len(ids) == most and ids.shape == values.shape, "score_logits: top is not [count, width]")
    require(ids.dtype == torch.int32 and values.dtype == torch.float32, "score_logits: top is of other types")
    require(ids.is_contiguous() and values.is_contiguous(), "score_logits: top is not contiguous")
    program.add(
        "score_logits", totals=totals, top_ids=ids, top_values=values, logits=logits, rows=rows, tops=tops, count=count,
        width=ids.shape[1], **_all_rows(logits),
    )  # fmt: skip


def pick_logits(
    program: CudaProgram, values: Tensor, logits: Tensor, rows: Tensor, ids: Tensor, count: Count
) -> None:
    """values: float32 [count], logits[row, ids[row]] of each of rows, int64 [count]; ids: int64 [rows of logits]. What
    is out of range is left out."""
    _require_logits(logits)
    require(is_vector(values, torch.float32, len(rows)), "pick_logits: values is not float32 [count]")
    require(is_vector(rows, torch.int64, len(rows)), "pick_logits: rows is not int64 [count]")
    require(is_vector(ids, torch.int64, len(logits)), "pick_logits: ids is not int64 [rows of logits]")
    program.add(
        "pick_logits", values=values, logits=logits, rows=rows, ids=ids, count=count, **_all_rows(logits)
    )


class Meeting(TypedDict):
    """How ranks meet in an operator. regions: int64 [ranks] on the host, addresses of all ranks' memory: a header and
    two slots; stop: int32 [1], pinned; fault: int32 [1] on the device."""

    regions: Tensor
    stop: Tensor
    fault: Tensor
    rank: int
    ranks: int
    slot_bytes: int


def all_reduce(program: CudaProgram, x: Tensor, rows: Count, **meeting: Unpack[Meeting]) -> None:
    """x: contiguous [rows, columns] of 16 or 32 bits, becomes the sum of every rank's, rank 0's first. What is larger
    than a slot goes in parts."""
    require(x.dtype in DTYPES and x.is_contiguous(), "all_reduce: x")
    count = Scaled(rows, x.shape[1])
    program.add("all_reduce", x=x, count=count, dtype=DTYPES[x.dtype], **meeting)


def gather_columns(
    program: CudaProgram,
    out: Tensor | None,
    x: Tensor,
    widths: Tensor,
    rows: Count,
    **meeting: Unpack[Meeting],
) -> None:
    """Every rank's x, [rows, its width] of four-byte elements, side by side in ``out``, [rows, sum of widths], where
    that is not None. widths: int64 [ranks] on the host."""
    require(x.itemsize == 4 and x.stride(-1) == 1, "gather_columns: x")
    require(x.shape[1] == int(widths[meeting["rank"]]), "gather_columns: x has another width")
    require(out is None or out.shape == (len(x), int(widths.sum())), "gather_columns: out does not fit")
    require(len(x) * int(widths.max()) * 4 <= meeting["slot_bytes"], "gather_columns: a slot is too small")
    strides = {"x_stride": x.stride(0), "out_stride": 0 if out is None else out.stride(0)}
    program.add("gather_columns", out=out, x=x, widths=widths, rows=rows, **strides, **meeting)
