"""Norms, rope, gated activations and the embedding against their twins in float64."""

import pytest
import torch
from emulated import DTYPES, close, one_rounding
from torch import Tensor

from shoal.cuda_ext import reference
from shoal.cuda_ext.cuda_binding import CudaLibrary

HALVES = [torch.bfloat16, torch.float16]


def random(fresh: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=fresh).to(dtype)


def rms_norm(cuda: CudaLibrary, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """x: [outer, inner, dim]"""
    outer, inner, dim = x.shape
    out = torch.full((outer, inner, dim), torch.nan, dtype=dtype)
    cuda.call(
        "rms_norm", out=out, x=x, weight=weight, outer=outer, inner=inner, dim=dim, outer_stride=x.stride(0),
        inner_stride=x.stride(1), x_dtype=DTYPES[x.dtype], dtype=DTYPES[dtype], eps=1e-5,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("dim", [1, 7, 64, 200, 512, 576, 1000, 4097])
def test_rms_norm(cuda: CudaLibrary, fresh: torch.Generator, dtype: torch.dtype, dim: int) -> None:
    weight = random(fresh, dim)
    for x in (random(fresh, 3, 2, dim), random(fresh, 3, 2, dim, dtype=dtype)):
        truth = reference.rms_norm(x.double(), weight.double(), 1e-5)
        close(rms_norm(cuda, x, weight, dtype), truth, one_rounding(dtype), 1e-6)


def test_rms_norm_of_heads_inside_a_fused_matrix(cuda: CudaLibrary, fresh: torch.Generator) -> None:
    weight = random(fresh, 40)
    for first in (0, 3, 8):
        fused = random(fresh, 5, 300, dtype=torch.bfloat16)
        x = fused[:, first : first + 160].view(5, 4, 40)
        apart = rms_norm(cuda, x.contiguous(), weight, torch.bfloat16)
        assert torch.equal(rms_norm(cuda, x, weight, torch.bfloat16), apart)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("dim", [5, 64, 576, 2309])
def test_add_rms_norm(cuda: CudaLibrary, fresh: torch.Generator, dtype: torch.dtype, dim: int) -> None:
    rows, weight = 5, random(fresh, dim)
    residual, x = random(fresh, rows, dim), random(fresh, rows, dim, dtype=dtype)
    out, expected = torch.full((rows, dim), torch.nan, dtype=dtype), residual.double()
    truth = reference.add_rms_norm(expected, x.double(), weight.double(), 1e-6)
    cuda.call(
        "add_rms_norm", out=out, residual=residual, x=x, weight=weight, rows=rows, dim=dim, residual_stride=dim,
        x_stride=dim, dtype=DTYPES[dtype], eps=1e-6,
    )  # fmt: skip
    close(residual, expected, 1e-7, 1e-7)
    close(out, truth, one_rounding(dtype), 1e-6)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dim", [1, 40, 1032, 1001])
def test_gated_activation(
    cuda: CudaLibrary, fresh: torch.Generator, dtype: torch.dtype, kind: str, dim: int
) -> None:
    gate_up = random(fresh, 4, 2 * dim + 3, dtype=dtype)[:, : 2 * dim] * 4
    gate_up[0, 0], gate_up[1, 0] = -90.0, 90.0
    out = torch.full((4, dim), torch.nan, dtype=dtype)
    cuda.call(
        "gated_activation", out=out, gate_up=gate_up, rows=4, dim=dim, row_stride=gate_up.stride(0),
        kind=["silu", "gelu_tanh"].index(kind), dtype=DTYPES[dtype],
    )  # fmt: skip
    close(out, reference.gated_activation(gate_up.double(), kind), one_rounding(dtype), 2e-5)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("dim", [3, 64, 1001])
def test_embed(cuda: CudaLibrary, fresh: torch.Generator, dtype: torch.dtype, dim: int) -> None:
    table = random(fresh, 19, dim, dtype=dtype)
    ids = torch.randint(80, 140, (25,), generator=fresh)
    out = torch.full((25, dim), torch.nan)
    cuda.call(
        "embed", out=out, ids=ids, table=table, tokens=25, rows=19, dim=dim, first_id=100, dtype=DTYPES[dtype],
        scale=1.7,
    )  # fmt: skip
    close(out, reference.embed(ids, table.double(), 1.7, 100), 1e-7, 0)


class Cached:
    """q, k and v of some tokens inside of one matrix, and where they go."""

    def __init__(
        self, fresh: torch.Generator, dtype: torch.dtype, cache_dtype: torch.dtype, dim: int, rotary: int
    ) -> None:
        self.heads, self.kv_heads, self.dim, self.tokens = 5, 2, dim, 11
        fused = random(fresh, self.tokens, 9, dim, dtype=dtype)
        self.q, self.k, self.v = fused.split([5, 2, 2], dim=1)
        angles = random(fresh, 50, rotary // 2)
        self.cos_sin = torch.cat([angles.cos(), angles.sin()], 1)
        self.positions = torch.randint(0, 50, (self.tokens,), generator=fresh, dtype=torch.int32)
        self.slots = torch.randperm(4 * 6, generator=fresh)[: self.tokens]
        self.caches = [torch.zeros(4, 2, 6, dim).to(cache_dtype) for _ in range(2)]
        self.fault = torch.zeros(1, dtype=torch.int32)

    def write(self, cuda: CudaLibrary, k_scales: Tensor | None = None, v_scales: Tensor | None = None) -> None:
        q, k, v = self.q, self.k, self.v
        cuda.call(
            "rope_write_kv", q=q, k=k, v=v, cos_sin=self.cos_sin, positions=self.positions,
            k_cache=self.caches[0], v_cache=self.caches[1], cache_slots=self.slots, fault=self.fault,
            tokens=self.tokens, heads=self.heads, kv_heads=self.kv_heads, dim=self.dim,
            rotary_dim=self.cos_sin.shape[1], max_positions=50, blocks=4, block_size=6,
            q_token_stride=q.stride(0), q_head_stride=q.stride(1), k_token_stride=k.stride(0),
            k_head_stride=k.stride(1), v_token_stride=v.stride(0), v_head_stride=v.stride(1),
            dtype=DTYPES[q.dtype], cache_dtype=DTYPES[self.caches[0].dtype], k_scales=k_scales, v_scales=v_scales,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (20, 12), (7, 0)])
def test_rope_write_kv(
    cuda: CudaLibrary,
    fresh: torch.Generator,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    dim: int,
    rotary: int,
) -> None:
    case = Cached(fresh, dtype, cache_dtype, dim, rotary)
    q, k, v = case.q.double(), case.k.double(), case.v.double()
    truths = [torch.zeros(4, 2, 6, dim, dtype=torch.float64) for _ in range(2)]
    reference.rope_write_kv(q, k, v, case.cos_sin.double(), case.positions, *truths, case.slots)
    scales = torch.tensor([[0.5, 3.0], [2.0, 0.25]])
    case.write(cuda, *scales)
    close(case.q, q, one_rounding(dtype), 1e-6)
    for cache, truth, of_heads in zip(case.caches, truths, scales, strict=True):
        tolerance = one_rounding(dtype) + one_rounding(cache_dtype)
        wide = cache.double() * of_heads[:, None, None]
        close(wide, truth, tolerance, 1e-6 if cache_dtype != torch.float8_e4m3fn else 3e-3)
    assert case.fault.item() == 0


@pytest.mark.parametrize(
    ("name", "value", "fault"), [("positions", 50, 1), ("positions", -1, 1), ("slots", 24, 2)]
)
def test_what_is_out_of_range_is_left_out_and_told(
    cuda: CudaLibrary, fresh: torch.Generator, name: str, value: int, fault: int
) -> None:
    case = Cached(fresh, torch.bfloat16, torch.bfloat16, 16, 16)
    getattr(case, name)[4] = value
    before = case.q[4].clone()
    case.write(cuda)
    assert case.fault.item() == fault
    assert torch.equal(case.q[4], before)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_number_of_16_bits_is_widened_exactly(cuda: CudaLibrary, dtype: torch.dtype) -> None:
    table = torch.arange(1 << 16).to(torch.uint16).view(dtype).view(64, 1024)
    out = torch.empty(64, 1024)
    cuda.call(
        "embed", out=out, ids=torch.arange(64), table=table, tokens=64, rows=64, dim=1024, dtype=DTYPES[dtype],
        scale=1.0,
    )  # fmt: skip
    torch.testing.assert_close(out, table.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_every_number_is_rounded_as_torch_does(cuda: CudaLibrary, cache_dtype: torch.dtype) -> None:
    """Half-precision numbers, and bfloat16 ones, on their way into a cache; beyond fp8's range: its largest."""
    for dtype in HALVES:
        case = Cached(torch.Generator(), dtype, cache_dtype, 8, 0)
        case.tokens, case.dim, case.heads, case.kv_heads = 24, 1024, 0, 1
        values = torch.arange(1 << 16).to(torch.uint16).view(dtype)
        for part in values.split(24 * 1024):
            rows = torch.zeros(24, 1, 1024, dtype=dtype)
            rows.view(-1)[: len(part)] = part
            case.q = case.k = case.v = rows
            case.positions, case.slots = torch.zeros(24, dtype=torch.int32), torch.arange(24)
            case.caches = [torch.zeros(4, 1, 6, 1024).to(cache_dtype) for _ in range(2)]
            case.write(cuda)
            wide = rows.float()
            if cache_dtype == torch.float8_e4m3fn:
                wide = wide.clamp(-448, 448)
            expected = wide.to(cache_dtype).float().flatten()
            torch.testing.assert_close(
                case.caches[1].float().flatten(), expected, rtol=0, atol=0, equal_nan=True
            )
