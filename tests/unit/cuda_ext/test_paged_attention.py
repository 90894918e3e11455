"""Paged attention against its twin in float64, and to the bit against itself cut and batched otherwise."""

import math
from dataclasses import dataclass, replace

import eager
import pytest
import torch
from integer_weights import FORMATS, random_groups
from torch import Tensor

from shoal.cuda_ext import ops, reference
from shoal.cuda_ext.ops import Activations
from shoal.cuda_ext.program import Program
from shoal.cuda_ext.quantised import pack_quantised

pytestmark = pytest.mark.usefixtures("level")

TOLERANCE = 4e-6
ROUNDED_TOLERANCE = 2 * (2**-8 + 1e-4)
"""Where pairs of bfloat16 are multiplied, of the mean size of the values: a weight is within 8e-5 and then rounded to 8
bits of mantissa, and so is their total."""


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

    def run(self) -> Tensor:
        return eager.paged_attention(**vars(self))

    def truth(self) -> Tensor:
        q, k_cache, v_cache = self.q.double(), self.k_cache, self.v_cache
        if k_cache.dtype != torch.int8:
            k_cache, v_cache = k_cache.double(), v_cache.double()
        doubled = replace(self, q=q, k_cache=k_cache, v_cache=v_cache)
        return reference.paged_attention(**vars(doubled))

    def is_rounded(self) -> bool:
        fits = self.k_cache.dtype != torch.float32 and self.q.shape[-1] % 32 == 0
        return fits and eager.attention_is_rounded()

    def as_it_is_rounded(self) -> "Case":
        """The queries rounded as they are before pairs of bfloat16 are multiplied, with the same factor to the bit, and
        what the codes of an int8 cache stand for."""
        scale, log2e = (torch.tensor(factor, dtype=torch.float32) for factor in (self.scale, math.log2(math.e)))
        per_unit = torch.tensor(self.scale / self.soft_cap).float() if self.soft_cap else scale * log2e
        caches = (reference.read(cache, torch.float32).bfloat16() for cache in (self.k_cache, self.v_cache))
        k_cache, v_cache = (cache.double() for cache in caches)
        q = (self.q * per_unit).bfloat16().double() / per_unit.double()
        return replace(self, q=q, k_cache=k_cache, v_cache=v_cache)


def make_case(
    fresh: torch.Generator,
    rows: list[tuple[int, int]],
    *,
    heads: int = 6,
    kv_heads: int = 2,
    dim: int = 32,
    block: int = 16,
    cache_dtype: torch.dtype = torch.float32,
    window: int = 0,
    soft_cap: float = 0.0,
) -> Case:
    """rows: (new tokens, context after them) a sequence. What no sequence owns in the cache is NaN."""
    needed = [-(-context // block) for _, context in rows]
    blocks = sum(needed) + 3
    order = torch.randperm(blocks, generator=fresh).to(torch.int32)
    tables = torch.zeros(len(rows), max(needed), dtype=torch.int32)
    caches = [torch.full((blocks, kv_heads, block, dim), float("nan")) for _ in range(2)]
    used = 0
    for row, (_, context) in enumerate(rows):
        mine = order[used : used + needed[row]]
        used += needed[row]
        tables[row, : needed[row]] = mine
        for cache in caches:
            for i, index in enumerate(mine.tolist()):
                filled = min(block, context - i * block)
                values = torch.randn(kv_heads, filled, dim, generator=fresh)
                cache[index, :, :filled] = values
    counts = torch.tensor([0] + [count for count, _ in rows])
    tokens = int(counts.sum())
    return Case(
        q=torch.randn(tokens, heads, dim, generator=fresh),
        k_cache=reference.cached(caches[0], cache_dtype),
        v_cache=reference.cached(caches[1], cache_dtype),
        block_tables=tables,
        query_starts=counts.cumsum(0).to(torch.int32),
        context_lens=torch.tensor([context for _, context in rows], dtype=torch.int32),
        scale=dim**-0.5 * 1.3,
        window=window,
        soft_cap=soft_cap,
    )


MIXED = [(1, 1), (1, 130), (17, 17), (5, 201), (1, 64), (1, 65), (70, 140)]


def assert_true(case: Case, tolerance: float = TOLERANCE) -> None:
    actual, truth = case.run(), case.truth()
    assert actual.shape == case.q.shape
    assert actual.dtype == case.q.dtype
    if case.is_rounded():
        rounded = case.as_it_is_rounded()
        error = (actual.double() - rounded.truth()).abs()
        sizes = replace(rounded, v_cache=rounded.v_cache.abs()).truth()
        assert bool((error <= ROUNDED_TOLERANCE * sizes + tolerance).all()), (error / sizes).max()
    else:
        torch.testing.assert_close(actual.double(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (33, 0.0), (0, 2.0), (7, 20.0)])
def test_mixed_chunks_and_decodes(
    fresh: torch.Generator, cache_dtype: torch.dtype, window: int, soft_cap: float
) -> None:
    case = make_case(fresh, MIXED, cache_dtype=cache_dtype, window=window, soft_cap=soft_cap)
    assert_true(case)
    torch.testing.assert_close(case.run().double(), case.truth(), rtol=0, atol=0.05)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("dim", [32, 64, 72])
def test_a_blocks_size_changes_no_bit(fresh: torch.Generator, cache_dtype: torch.dtype, dim: int) -> None:
    """Blocks of 16 may be kept in pairs, those of 8 are not."""
    case = make_case(fresh, MIXED, dim=dim, cache_dtype=cache_dtype, block=16)
    halves = [
        cache.unflatten(2, (2, 8)).transpose(1, 2).flatten(0, 1) for cache in (case.k_cache, case.v_cache)
    ]
    tables = torch.stack([2 * case.block_tables, 2 * case.block_tables + 1], dim=2).flatten(1)
    halved = replace(case, k_cache=halves[0].contiguous(), v_cache=halves[1].contiguous(), block_tables=tables)
    assert torch.equal(case.run(), halved.run())


@pytest.mark.parametrize("dim", [16, 20, 40, 64, 72, 96, 128, 200, 256])
def test_head_sizes(fresh: torch.Generator, dim: int) -> None:
    assert_true(make_case(fresh, [(1, 77), (30, 90)], dim=dim))
    assert_true(make_case(fresh, [(1, 77), (30, 90)], dim=dim, cache_dtype=torch.bfloat16))
    assert_true(make_case(fresh, [(1, 77), (30, 90)], dim=dim, cache_dtype=torch.int8))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 1), (9, 3), (7, 7), (14, 2), (71, 1)])
def test_head_groups(fresh: torch.Generator, heads: int, kv_heads: int) -> None:
    assert_true(make_case(fresh, [(1, 5), (20, 99)], heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize("block", [8, 11, 64, 100, 256])
@pytest.mark.parametrize("window", [0, 50])
def test_block_sizes(fresh: torch.Generator, block: int, window: int) -> None:
    assert_true(make_case(fresh, [(3, 3), (1, 150), (40, 300)], block=block, window=window))


def test_queries_inside_a_fused_matrix(fresh: torch.Generator) -> None:
    case = make_case(fresh, [(9, 20), (1, 3)])
    expected = case.run()
    fused = torch.randn(10, 5 + 6 * 32 + 64, generator=fresh)
    inside = fused[:, 5 : 5 + 6 * 32].view(10, 6, 32)
    inside.copy_(case.q)
    assert torch.equal(replace(case, q=inside).run(), expected)


def rows_of(case: Case, row: int) -> Tensor:
    return case.run()[case.query_starts[row] : case.query_starts[row + 1]]


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


@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (33, 0.0), (70, 15.0), (300, 0.0)])
@pytest.mark.parametrize("dim", [64, 20])
@pytest.mark.parametrize("before", [50, 700])
def test_a_row_does_not_depend_on_batch_or_chunking(
    fresh: torch.Generator, window: int, soft_cap: float, dim: int, before: int
) -> None:
    """Contexts of one section and of several; with several threads a few rows' sections are items of their own."""
    case = make_case(
        fresh,
        [(1, 90), (150, before + 150), (2, 30)],
        window=window,
        soft_cap=soft_cap,
        dim=dim,
        cache_dtype=torch.bfloat16,
    )
    whole = rows_of(case, 1)
    eager.set_threads(3)
    for step in (150, 1, 7, 64, 149):
        parts = [alone(case, 1, first, min(first + step, 150)).run() for first in range(0, 150, step)]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(alone(case, 0, 0, 1).run(), rows_of(case, 0))


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_threads(fresh: torch.Generator, cache_dtype: torch.dtype) -> None:
    case = make_case(fresh, [*MIXED, (200, 500)], dim=64, cache_dtype=cache_dtype)
    expected = case.run()
    for threads in (2, 3):
        eager.set_threads(threads)
        assert torch.equal(case.run(), expected)


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_decode_steps_of_many_sequences(fresh: torch.Generator, cache_dtype: torch.dtype, window: int) -> None:
    """Several sequences are one item of work then, which asks for the next ones' keys while it computes."""
    contexts = [*torch.randint(1, 90, (37,), generator=fresh).tolist(), 1, 64, 65, 300]
    case = make_case(
        fresh, [(1, context) for context in contexts], dim=64, cache_dtype=cache_dtype, window=window
    )
    assert_true(case)
    expected = case.run()
    for threads in (1, 2, 3):
        eager.set_threads(threads)
        assert torch.equal(case.run(), expected)
    alone_in_batch = [alone(case, row, 0, 1).run() for row in range(len(contexts))]
    assert torch.equal(torch.cat(alone_in_batch), expected)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
def test_nan_in_one_sequence_stays_there(fresh: torch.Generator, cache_dtype: torch.dtype) -> None:
    case = make_case(fresh, [(3, 40), (3, 40)], cache_dtype=cache_dtype)
    case.k_cache[case.block_tables[0, 1], 0, 3, 5] = float("nan")
    result = case.run()
    assert result[:3, :3].isnan().all()
    assert result[3:].isfinite().all()


@pytest.mark.parametrize("growth", [0.02, 1.0])
def test_peaks_that_rise_with_the_positions(fresh: torch.Generator, growth: float) -> None:
    """Little by little and by far; the first weights are then nothing beside the last ones."""
    case = make_case(fresh, [(1, 600), (40, 290)], dim=64, cache_dtype=torch.bfloat16)
    case.q[...] = case.q.abs()
    for row, context in enumerate(case.context_lens.tolist()):
        for position in range(context):
            key = case.k_cache[case.block_tables[row, position // 16], :, position % 16]
            key[...] = key.abs() * growth * position / 10
    assert_true(case, tolerance=1e-3)


def test_huge_scores_do_not_overflow(fresh: torch.Generator) -> None:
    """Scores in the thousands: their rounding, times the exponential's slope, is what tells apart here."""
    case = make_case(fresh, [(1, 90), (20, 70)])
    case = replace(case, q=case.q * 1000)
    torch.testing.assert_close(case.run().double(), case.truth(), rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"block_tables": torch.tensor([[0, 99]], dtype=torch.int32)}, "block table"),
        ({"block_tables": torch.tensor([[-1, 0]], dtype=torch.int32)}, "block table"),
        ({"context_lens": torch.tensor([33], dtype=torch.int32)}, "context"),
        ({"context_lens": torch.tensor([1], dtype=torch.int32)}, "context"),
        ({"query_starts": torch.tensor([0, 3], dtype=torch.int32)}, "context"),
    ],
)
def test_what_is_out_of_range_is_refused(fresh: torch.Generator, change: dict[str, Tensor], what: str) -> None:
    case = make_case(fresh, [(2, 20)])
    with pytest.raises(IndexError, match=what):
        replace(case, **change).run()


def test_blocks_before_the_window_are_never_read(fresh: torch.Generator) -> None:
    case = make_case(fresh, [(2, 200)], window=20)
    expected = case.run()
    case.block_tables[0, :11] = 10**6
    assert torch.equal(case.run(), expected)


@pytest.mark.parametrize(("window", "block"), [(0, 16), (50, 16), (0, 48), (0, 20)])
def test_products_before_it_change_nothing(fresh: torch.Generator, window: int, block: int) -> None:
    """Those of many rows ask the memory for what attention reads, of which nothing may be where it is said to be."""
    case = make_case(
        fresh,
        [*((1, context) for context in range(70, 90)), (3, 300), (1, 1)],
        dim=64,
        block=block,
        cache_dtype=torch.bfloat16,
        window=window,
    )
    eager.set_threads(2)
    expected = case.run()
    weight = pack_quantised(random_groups(fresh, FORMATS[0], 600, 320), 320)
    x = torch.randn(len(case.q), 320, generator=fresh)
    product = eager.linear(x, weight)

    def run(**change: Tensor) -> tuple[Tensor, Tensor]:
        changed = replace(case, **change)
        program, out, mixed = Program(), torch.full(product.shape, math.nan), torch.full_like(case.q, math.nan)
        rows = Activations(x, eager.quantise(x) if ops.reads_quantised(weight) else None)
        ops.linear(program, out, rows, weight)
        eager.record_paged_attention(program, mixed, **vars(changed))
        ops.linear(program, out, rows, weight)
        program.run()
        return mixed, out

    for got, wanted in zip(run(), (expected, product), strict=True):
        assert torch.equal(got, wanted)
    for name, wrong in (("block_tables", 2**31 - 1), ("context_lens", 10**6), ("context_lens", -(10**6))):
        with pytest.raises(IndexError):
            run(**{name: torch.full_like(getattr(case, name), wrong)})
    assert torch.equal(run()[0], expected)


def test_nothing_to_do(fresh: torch.Generator) -> None:
    case = make_case(fresh, [(1, 5)])
    nothing = torch.zeros(0, dtype=torch.int32)
    empty = replace(
        case,
        q=case.q[:0],
        block_tables=case.block_tables[:0],
        query_starts=torch.zeros(1, dtype=torch.int32),
        context_lens=nothing,
    )
    assert empty.run().shape == (0, 6, 32)
