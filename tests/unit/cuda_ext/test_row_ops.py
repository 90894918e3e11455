"""Norms, activations and rope against their twins in float64, with odd sizes and strided rows."""

import eager
import pytest
import torch
from torch import Tensor

from shoal.cuda_ext import ops, reference
from shoal.cuda_ext.packed_weight import pack_weight

pytestmark = pytest.mark.usefixtures("level")

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}


def assert_close(actual: Tensor, truth: Tensor, tolerance: float = 0.0) -> None:
    """Within the rounding of the result's dtype, unless a tolerance is given."""
    tolerance = tolerance or TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), truth.double(), rtol=tolerance, atol=tolerance)


def randn(fresh: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=fresh)


def strided_rows(fresh: torch.Generator, rows: int, columns: int) -> Tensor:
    """Rows of a wider matrix, at an odd offset: neither aligned nor contiguous."""
    return randn(fresh, rows, columns + 11)[:, 3 : 3 + columns]


@pytest.mark.parametrize("dim", [1, 7, 16, 33, 64, 576, 1027])
def test_rms_norm(fresh: torch.Generator, dim: int) -> None:
    x, weight = strided_rows(fresh, 5, dim), randn(fresh, dim)
    truth = reference.rms_norm(x.double(), weight, 1e-5)
    assert_close(eager.rms_norm(x, weight, 1e-5), truth)


def test_rms_norm_of_heads_inside_a_fused_matrix(fresh: torch.Generator) -> None:
    fused, weight = randn(fresh, 7, 5 * 24 + 48), randn(fresh, 24)
    heads = fused[:, : 5 * 24].view(7, 5, 24)
    truth = reference.rms_norm(heads.double(), weight, 1e-6)
    result = eager.rms_norm(heads, weight, 1e-6)
    assert result.shape == heads.shape
    assert_close(result, truth)


def test_rms_norm_of_any_number_of_dimensions(fresh: torch.Generator) -> None:
    weight = randn(fresh, 20)
    for shape in [(2, 3, 20), (7, 20), (0, 20)]:
        x = randn(fresh, *shape)
        assert_close(eager.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("dim", [3, 32, 577])
def test_add_rms_norm(fresh: torch.Generator, dim: int) -> None:
    residual, x = strided_rows(fresh, 6, dim), strided_rows(fresh, 6, dim)
    weight, expected_residual = randn(fresh, dim), residual + x
    truth = reference.rms_norm(expected_residual.double(), weight, 1e-5)
    result = eager.add_rms_norm(residual, x, weight, 1e-5)
    assert torch.equal(residual, expected_residual)
    assert_close(result, truth)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dim", [1, 19, 64, 1536])
def test_gated_activation(fresh: torch.Generator, kind: ops.Activation, dim: int) -> None:
    gate_up = strided_rows(fresh, 4, 2 * dim) * 4
    assert_close(eager.gated_activation(gate_up, kind), reference.gated_activation(gate_up.double(), kind))


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gated_activation_far_from_zero(kind: ops.Activation) -> None:
    gates = torch.tensor([-1e30, -300.0, -100.0, -20.0, -0.0, 0.0, 20.0, 100.0, 300.0, 1e30, float("nan")])
    gate_up = torch.cat((gates, torch.ones_like(gates))).unsqueeze(0)
    result = eager.gated_activation(gate_up, kind)[0]
    assert torch.isnan(result[-1])
    torch.testing.assert_close(result[:-1], gates[:-1].clamp_min(0), rtol=1e-6, atol=1e-6)


def rope_case(
    fresh: torch.Generator, dim: int, rotary_dim: int, cache_dtype: torch.dtype, block: int
) -> tuple[Tensor, ...]:
    tokens, heads, kv_heads = 9, 6, 2
    fused = randn(fresh, tokens, (heads + 2 * kv_heads) * dim)
    q, k, v = fused.view(tokens, -1, dim).split((heads, kv_heads, kv_heads), dim=1)
    angles = torch.rand(50, rotary_dim // 2, generator=fresh) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
    positions = torch.randint(0, 50, (tokens,), generator=fresh, dtype=torch.int32)
    caches = [randn(fresh, 7, kv_heads, block, dim).to(cache_dtype) for _ in range(2)]
    slots = torch.randperm(7 * block, generator=fresh)[:tokens]
    return (q, k, v, cos_sin, positions, *caches, slots)


@pytest.mark.parametrize(
    ("dim", "rotary_dim", "block"), [(64, 64, 16), (16, 16, 8), (34, 34, 9), (80, 20, 32), (256, 256, 256)]
)
@pytest.mark.parametrize("cache_dtype", DTYPES)
def test_rope_write_kv(
    fresh: torch.Generator, dim: int, rotary_dim: int, block: int, cache_dtype: torch.dtype
) -> None:
    q, k, v, cos_sin, positions, k_cache, v_cache, slots = rope_case(fresh, dim, rotary_dim, cache_dtype, block)
    truth = [x.double() for x in (q, k, v)]
    truth_caches = [k_cache.double(), v_cache.double()]
    reference.rope_write_kv(*truth, cos_sin, positions, *truth_caches, slots)
    eager.rope_write_kv(q, k, v, cos_sin, positions, k_cache, v_cache, slots)
    assert_close(q, truth[0])
    assert_close(k_cache, truth_caches[0])
    assert torch.equal(v_cache, truth_caches[1].to(cache_dtype))


@pytest.mark.parametrize("dim", [32, 34, 80])
def test_an_int8_cache_keeps_codes_and_their_scales(fresh: torch.Generator, dim: int) -> None:
    q, k, v, cos_sin, positions, *_, slots = rope_case(fresh, dim, dim, torch.float32, 8)
    v[2] = 0
    v[3, :, :32] *= 1000  # large neighbours under another scale cost the rest of the head nothing
    row = dim + 4 * -(-dim // 32)
    caches = [torch.zeros(7, 2, 8, row, dtype=torch.int8) for _ in range(4)]
    reference.rope_write_kv(q.clone(), k.clone(), v, cos_sin, positions, *caches[:2], slots)
    eager.rope_write_kv(q, k, v, cos_sin, positions, *caches[2:], slots)
    assert torch.equal(caches[1], caches[3])
    found, expected = (reference.read(cache, torch.float64) for cache in (caches[2], caches[0]))
    assert_close(found, expected, 0.02)
    values = reference.read(caches[3], torch.float64)[slots // 8, :, slots % 8]
    steps = torch.nn.functional.pad(v, (0, -dim % 32)).unflatten(-1, (-1, 32)).abs().amax(-1).double() / 127
    assert ((values - v).abs() <= 0.51 * steps.repeat_interleave(32, dim=-1)[..., :dim] + 1e-30).all()


@pytest.mark.parametrize(("position", "slot"), [(50, 0), (-1, 0), (0, 7 * 16), (0, -1)])
def test_rope_write_kv_refuses_what_is_out_of_range(fresh: torch.Generator, position: int, slot: int) -> None:
    q, k, v, cos_sin, positions, k_cache, v_cache, slots = rope_case(fresh, 32, 32, torch.float32, 16)
    positions[-1], slots[-1] = position, slot
    before = q.clone(), k_cache.clone()
    with pytest.raises(IndexError, match="outside"):
        eager.rope_write_kv(q, k, v, cos_sin, positions, k_cache, v_cache, slots)
    assert torch.equal(q, before[0])
    assert torch.equal(k_cache, before[1])


def test_nan_reaches_the_result_of_its_row_only(fresh: torch.Generator) -> None:
    x = randn(fresh, 3, 40)
    x[1, 17] = float("nan")
    for result in (
        eager.rms_norm(x, torch.ones(40), 1e-5),
        eager.add_rms_norm(torch.zeros(3, 40), x, torch.ones(40), 1e-5),
        eager.gated_activation(x, "silu"),
    ):
        assert result.isnan().any(dim=1).tolist() == [False, True, False]


def test_rounding_to_bfloat16_is_torchs(fresh: torch.Generator) -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (64, 1024), generator=fresh, dtype=torch.int32)
    values = torch.cat(
        (bits.view(torch.float32), torch.tensor([[float("inf"), -float("inf"), 3.4e38, 1.0] * 256]))
    )
    caches = (
        torch.zeros(65, 1, 1, 1024, dtype=torch.bfloat16),
        torch.zeros(65, 1, 1, 1024, dtype=torch.bfloat16),
    )
    heads = values.unsqueeze(1)
    cos_sin = torch.cat((torch.ones(1, 512), torch.zeros(1, 512)), dim=1)
    eager.rope_write_kv(
        heads, heads, heads, cos_sin, torch.zeros(65, dtype=torch.int32), *caches, torch.arange(65)
    )
    written = caches[1].view(65, 1024)
    torch.testing.assert_close(written, values.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_results_do_not_depend_on_threads(fresh: torch.Generator) -> None:
    x, weight = randn(fresh, 301, 577), randn(fresh, 577)
    gate_up, ids = randn(fresh, 301, 1000), torch.randint(0, 301, (301,), generator=fresh)
    packed = pack_weight(x)

    def run(threads: int) -> list[Tensor]:
        eager.set_threads(threads)
        return [
            eager.rms_norm(x, weight, 1e-5),
            eager.add_rms_norm(x.clone(), x, weight, 1e-5),
            eager.gated_activation(gate_up, "silu"),
            eager.embed(ids, packed),
        ]

    alone = run(1)
    for threads in (2, 3):
        assert all(torch.equal(a, b) for a, b in zip(alone, run(threads), strict=True))


def test_wrong_shapes_and_types_are_named(fresh: torch.Generator) -> None:
    x = randn(fresh, 2, 8)
    with pytest.raises(ValueError, match="weight"):
        eager.rms_norm(x, torch.ones(9), 1e-5)
    with pytest.raises(ValueError, match="weight"):
        eager.rms_norm(x, torch.ones(8, dtype=torch.bfloat16), 1e-5)
    with pytest.raises(ValueError, match="residual"):
        eager.add_rms_norm(x.bfloat16(), x, torch.ones(8), 1e-5)
    with pytest.raises(ValueError, match="x is not float32"):
        eager.rms_norm(x.bfloat16(), torch.ones(8), 1e-5)
    with pytest.raises(ValueError, match="gate_up"):
        eager.gated_activation(x.bfloat16(), "silu")
    with pytest.raises(ValueError, match="ids"):
        eager.embed(torch.zeros(2, dtype=torch.int32), pack_weight(x))


@pytest.mark.parametrize("shape", [(9, 7), (9, 5, 24)])
def test_take_rows(fresh: torch.Generator, shape: tuple[int, ...]) -> None:
    """Any of them, in any order, out of a wider matrix; none where an index is outside."""
    x = randn(fresh, shape[0], shape[1] + 3, *shape[2:])[:, : shape[1]]
    indices = torch.tensor([8, 0, 3, 3, -1, 9])
    taken = eager.take_rows(x, indices)
    assert torch.equal(taken[:4], x[indices[:4]])
    assert taken[4:].isnan().all()
    assert eager.take_rows(x, indices[:0]).shape == (0, *shape[1:])
