"""Paged attention against its twin in float64, and to the bit against itself cut and batched otherwise."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from emulated import DTYPES
from torch import Tensor

from shoal.cuda_ext import reference
from shoal.cuda_ext.cuda_binding import CudaLibrary
from shoal.cuda_ext.cuda_ops import workspace_floats

pytestmark = pytest.mark.usefixtures("chip")

FP8 = torch.float8_e4m3fn


@dataclass
class Case:
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    query_starts: Tensor
    context_lens: Tensor
    scale: float
    window: int = 0
    soft_cap: float = 0.0
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None
    fault: int = 0
    is_deterministic: int = 0

    def run(self, cuda: CudaLibrary) -> Tensor:
        tokens, heads, dim = self.q.shape
        sequences, table_width = self.block_tables.shape
        blocks, kv_heads, block_size, _ = self.k_cache.shape
        most_context = table_width * block_size
        workspace = torch.full((workspace_floats(sequences, heads, dim, most_context),), torch.nan)
        counters = workspace[workspace.numel() - sequences * heads :].zero_()
        out, fault = (
            torch.full((tokens, heads, dim), torch.nan, dtype=self.q.dtype),
            torch.zeros(1, dtype=torch.int32),
        )
        cuda.call(
            "paged_attention", out=out, q=self.q, k_cache=self.k_cache, v_cache=self.v_cache,
            block_tables=self.block_tables, query_starts=self.query_starts, context_lens=self.context_lens,
            workspace=workspace, fault=fault, tokens=tokens, sequences=sequences, heads=heads, kv_heads=kv_heads,
            dim=dim, blocks=blocks, block_size=block_size, table_width=table_width, table_stride=table_width,
            q_token_stride=self.q.stride(0), q_head_stride=self.q.stride(1), window=self.window,
            most_tokens=int(self.query_starts.diff().max()) if sequences else 0, most_context=most_context,
            workspace_floats=workspace.numel(), dtype=DTYPES[self.q.dtype], cache_dtype=DTYPES[self.k_cache.dtype],
            scale=self.scale, soft_cap=self.soft_cap, k_scales=self.k_scales, v_scales=self.v_scales,
            is_deterministic=self.is_deterministic,
        )  # fmt: skip
        assert fault.item() == self.fault
        assert not counters.any()
        return out

    @property
    def multiplied(self) -> torch.dtype:
        """What the tensor cores are given."""
        return torch.float16 if self.k_cache.dtype == FP8 else self.k_cache.dtype

    def truth(self, *, of_sizes: bool = False) -> Tensor:
        """of_sizes: with the values' magnitudes."""
        q = self.q.to(self.multiplied).double()
        keys, values = (
            cache.double() * (1.0 if scales is None else scales.double()[:, None, None])
            for cache, scales in ((self.k_cache, self.k_scales), (self.v_cache, self.v_scales))
        )
        if of_sizes:
            values = values.abs()
        return reference.paged_attention(
            q, keys, values, self.block_tables, self.query_starts, self.context_lens, self.scale, self.window,
            self.soft_cap,
        )  # fmt: skip


def make_case(
    fresh: torch.Generator,
    rows: list[tuple[int, int]],
    *,
    heads: int = 6,
    kv_heads: int = 2,
    dim: int = 32,
    block: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype = torch.bfloat16,
    **more: Any,
) -> Case:
    """rows: (new tokens, context after them) a sequence. What no sequence owns in the cache is NaN."""
    needed = [-(-context // block) for _, context in rows]
    blocks = sum(needed) + 3
    order = torch.randperm(blocks, generator=fresh).to(torch.int32)
    tables = torch.zeros(len(rows), max(needed), dtype=torch.int32)
    caches = [torch.full((blocks, kv_heads, block, dim), torch.nan) for _ in range(2)]
    used = 0
    for row, (_, context) in enumerate(rows):
        mine = order[used : used + needed[row]]
        used += needed[row]
        tables[row, : needed[row]] = mine
        for cache in caches:
            for i, index in enumerate(mine.tolist()):
                filled = min(block, context - i * block)
                cache[index, :, :filled] = torch.randn(kv_heads, filled, dim, generator=fresh)
    counts = torch.tensor([0] + [count for count, _ in rows])
    return Case(
        q=torch.randn(int(counts.sum()), heads, dim, generator=fresh).to(dtype),
        k_cache=caches[0].to(cache_dtype),
        v_cache=caches[1].to(cache_dtype),
        block_tables=tables,
        query_starts=counts.cumsum(0).to(torch.int32),
        context_lens=torch.tensor([context for _, context in rows], dtype=torch.int32),
        scale=dim**-0.5 * 1.3,
        **more,
    )


def assert_true(cuda: CudaLibrary, case: Case) -> None:
    """Queries and weights are rounded to the cache's kind of 16 bits, results to the activations'."""
    allowed = (torch.finfo(case.multiplied).eps + torch.finfo(case.q.dtype).eps) / 2 * case.truth(
        of_sizes=True
    ) + 1e-5
    error = (case.run(cuda).double() - case.truth()).abs()
    assert (error <= allowed).all(), float((error / allowed).max())


def head_scales() -> dict[str, Tensor]:
    """Of two KV heads."""
    return {"k_scales": torch.tensor([0.5, 1.3]), "v_scales": torch.tensor([1.7, 0.01])}


MIXED = [(1, 1), (1, 130), (17, 17), (5, 201), (1, 64), (1, 65), (30, 140)]


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float16, FP8])
@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (33, 0.0), (0, 2.0), (7, 20.0)])
def test_mixed_chunks_and_decodes(
    cuda: CudaLibrary, fresh: torch.Generator, cache_dtype: torch.dtype, window: int, soft_cap: float
) -> None:
    more = {"window": window, "soft_cap": soft_cap, **(head_scales() if cache_dtype == FP8 else {})}
    assert_true(cuda, make_case(fresh, MIXED, cache_dtype=cache_dtype, **more))
    assert_true(cuda, make_case(fresh, MIXED[:4], cache_dtype=cache_dtype, dtype=torch.float16, **more))


@pytest.mark.parametrize("dim", [8, 16, 40, 64, 72, 128, 200, 256])
def test_head_sizes(cuda: CudaLibrary, fresh: torch.Generator, dim: int) -> None:
    for cache_dtype in (torch.bfloat16, torch.float16, FP8)[: 3 if dim % 16 == 0 else 2]:
        assert_true(cuda, make_case(fresh, [(1, 77), (23, 90)], dim=dim, cache_dtype=cache_dtype))


@pytest.mark.parametrize("chip", ["80"], indirect=True)
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float16, FP8])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_blocks_of_other_sizes(
    emulation: CudaLibrary,
    fresh: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    dim: int,
    cache_dtype: torch.dtype,
) -> None:
    """For chips with 99 KiB a block, and for those that large blocks fill: to the same bits. With wgmma as true."""
    case = make_case(fresh, [(1, 77), (45, 400)], dim=dim, cache_dtype=cache_dtype, is_deterministic=1)
    assert_true(emulation, case)
    expected = case.run(emulation)
    for chip in ("80:1", "86:1", "89", "90", "90:1", "100"):
        monkeypatch.setenv("SHOAL_EMULATED_CHIP", chip)
        assert torch.equal(case.run(emulation), expected)
        assert_true(emulation, replace(case, is_deterministic=0))


@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (130, 0.0), (257, 3.0)])
@pytest.mark.parametrize(
    ("dim", "cache_dtype"),
    [(128, torch.bfloat16), (56, torch.float16), (256, torch.bfloat16), (112, FP8), (256, FP8)],
)
def test_long_chunks(
    cuda: CudaLibrary, fresh: torch.Generator, window: int, soft_cap: float, dim: int, cache_dtype: torch.dtype
) -> None:
    """Of several blocks of rows and tiles of positions each; their last ones not full."""
    rows = [(75, 300), (1, 200), (49, 49), (64, 513)]
    more = {"window": window, "soft_cap": soft_cap, **(head_scales() if cache_dtype == FP8 else {})}
    assert_true(cuda, make_case(fresh, rows, dim=dim, cache_dtype=cache_dtype, **more))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 1), (9, 3), (14, 2), (37, 1)])
def test_head_groups(cuda: CudaLibrary, fresh: torch.Generator, heads: int, kv_heads: int) -> None:
    tokens = 1 + 130 * kv_heads // heads
    assert_true(cuda, make_case(fresh, [(1, 5), (tokens, 140)], heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize("block", [8, 11, 64, 256])
@pytest.mark.parametrize("window", [0, 50])
def test_block_sizes_and_several_sections(
    cuda: CudaLibrary, fresh: torch.Generator, block: int, window: int
) -> None:
    rows = [(3, 3), (1, 550), (25, 650), (1, 256), (9, 300)]
    assert_true(cuda, make_case(fresh, rows, block=block, window=window))


def test_many_sequences(cuda: CudaLibrary, fresh: torch.Generator) -> None:
    """More than a warp looks through at once, with empty ones between."""
    rows = [(i % 4, 4 + i) for i in range(70)]
    assert_true(cuda, make_case(fresh, rows, heads=2, kv_heads=1, dim=16))


def test_queries_inside_a_fused_matrix(cuda: CudaLibrary, fresh: torch.Generator) -> None:
    case = make_case(fresh, [(25, 30), (1, 3)])
    expected = case.run(cuda)
    for first in (5, 8):
        fused = torch.randn(26, first + 6 * 32 + 64, generator=fresh).bfloat16()
        inside = fused[:, first : first + 6 * 32].view(26, 6, 32)
        inside.copy_(case.q)
        assert torch.equal(replace(case, q=inside).run(cuda), expected)


def alone(case: Case, row: int, first: int, last: int) -> Case:
    """Tokens [first, last) of one row's chunk, as a batch of their own."""
    begin = int(case.query_starts[row])
    count = int(case.query_starts[row + 1]) - begin
    return replace(
        case,
        q=case.q[begin + first : begin + last],
        block_tables=case.block_tables[row : row + 1],
        query_starts=torch.tensor([0, last - first], dtype=torch.int32),
        context_lens=case.context_lens[row : row + 1] - (count - last),
    )


@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (33, 0.0), (300, 15.0)])
@pytest.mark.parametrize(("dim", "cache_dtype"), [(64, torch.bfloat16), (24, torch.float16), (80, FP8)])
def test_a_row_does_not_depend_on_batch_or_chunking(
    cuda: CudaLibrary, fresh: torch.Generator, window: int, soft_cap: float, dim: int, cache_dtype: torch.dtype
) -> None:
    """A chunk's tokens, one by one as decodes, and cut otherwise."""
    rows = [(1, 90), (40, 560), (2, 30)]
    more = {"window": window, "soft_cap": soft_cap, "is_deterministic": 1}
    more |= head_scales() if cache_dtype == FP8 else {}
    case = make_case(fresh, rows, dim=dim, cache_dtype=cache_dtype, **more)
    starts = case.query_starts.tolist()
    together = case.run(cuda)
    for step in (1, 7, 40):
        parts = [alone(case, 1, first, min(first + step, 40)).run(cuda) for first in range(0, 40, step)]
        assert torch.equal(torch.cat(parts), together[starts[1] : starts[2]])
    assert torch.equal(alone(case, 0, 0, 1).run(cuda), together[:1])


@pytest.mark.parametrize("window", [0, 1500])
@pytest.mark.parametrize(
    ("heads", "dim", "cache_dtype"), [(2, 16, torch.bfloat16), (10, 72, torch.float16), (9, 144, FP8)]
)
def test_single_tokens_after_many_sections(
    cuda: CudaLibrary, fresh: torch.Generator, window: int, heads: int, dim: int, cache_dtype: torch.dtype
) -> None:
    """More than a block has at once and a warp looks through, to the bits of the same tokens as a chunk's."""
    more = {"heads": heads, "kv_heads": 1, "dim": dim, "cache_dtype": cache_dtype}
    case = make_case(fresh, [(1, 2100), (2, 8500), (1, 3)], window=window, is_deterministic=1, **more)
    assert_true(cuda, case)
    assert torch.equal(alone(case, 1, 1, 2).run(cuda), case.run(cuda)[2:3])


def test_nan_in_one_sequence_stays_there(cuda: CudaLibrary, fresh: torch.Generator) -> None:
    for tokens in (3, 24):
        case = make_case(fresh, [(tokens, 60), (3, 40), (1, 40)])
        case.k_cache[case.block_tables[0, 1], 0, 3, 5] = torch.nan
        result = case.run(cuda)
        assert result[:tokens, :3].isnan().all()
        assert result[tokens:].isfinite().all()


def test_blocks_before_the_window_are_never_read(cuda: CudaLibrary, fresh: torch.Generator) -> None:
    for tokens in (2, 30):
        case = make_case(fresh, [(tokens, 200), (1, 500)], window=20)
        expected = case.run(cuda)
        case.block_tables[0, : (200 - tokens + 1 - 20) // 16] = 10**6
        case.block_tables[1, :29] = -1
        assert torch.equal(case.run(cuda), expected)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"block_tables": torch.tensor([[0, 99], [1, 2]], dtype=torch.int32)}, 3),
        ({"block_tables": torch.tensor([[1, 2], [-1, 0]], dtype=torch.int32)}, 3),
        ({"context_lens": torch.tensor([33, 20], dtype=torch.int32)}, 5),
        ({"context_lens": torch.tensor([1, 20], dtype=torch.int32)}, 5),
    ],
)
@pytest.mark.parametrize("group", [3, 40])
def test_what_is_out_of_range_is_told(
    cuda: CudaLibrary, fresh: torch.Generator, change: dict[str, Tensor], fault: int, group: int
) -> None:
    case = make_case(fresh, [(2, 20), (1, 20)], heads=2 * group)
    replace(case, **change, fault=fault).run(cuda)


def test_what_there_is_no_kernel_for_is_refused(cuda: CudaLibrary, fresh: torch.Generator) -> None:
    with pytest.raises(NotImplementedError):
        make_case(fresh, [(1, 5)], dim=20).run(cuda)
    with pytest.raises(NotImplementedError):
        make_case(fresh, [(1, 5)], dim=264).run(cuda)
    with pytest.raises(MemoryError, match="workspace"):
        cuda.call("paged_attention", heads=1, kv_heads=1, dim=16, cache_dtype=1, sequences=1, most_context=9)


def test_nothing_to_do(cuda: CudaLibrary, fresh: torch.Generator) -> None:
    case = make_case(fresh, [(1, 5)])
    empty = replace(
        case,
        q=case.q[:0],
        block_tables=case.block_tables[:0],
        query_starts=torch.zeros(1, dtype=torch.int32),
        context_lens=torch.zeros(0, dtype=torch.int32),
    )
    assert empty.run(cuda).shape == (0, 6, 32)
