"""Gates, ups and their product in one operator, for levels with tiles: of the sums that ``linear`` gives, to the bit,
what float64 makes, rounded to bfloat16."""

import math

import eager
import pytest
import torch
from integer_weights import FORMATS, random_groups
from torch import Tensor

from shoal.cuda_ext import ops, reference
from shoal.cuda_ext.binding import library
from shoal.cuda_ext.ops import Activation, Activations
from shoal.cuda_ext.program import Count, Program
from shoal.cuda_ext.quantised import (
    QuantisedWeight,
    TileRows,
    WeightFormat,
    pack_quantised,
)


def randn(fresh: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=fresh)


def weight_of(fresh: torch.Generator, form: WeightFormat, gates: int, inputs: int) -> QuantisedWeight:
    return pack_quantised(random_groups(fresh, form, 2 * gates, inputs), inputs)


def gated_linear(
    x: Tensor,
    weight: QuantisedWeight,
    kind: Activation,
    bias: Tensor | None = None,
    into: TileRows | None = None,
) -> TileRows:
    """Garbage where nothing is to be read."""
    out = into or TileRows.empty(len(x), weight.rows // 2)
    program = Program()
    ops.gated_linear(program, out, x, weight, bias, kind)
    program.run()
    return out


def down(rows: TileRows, count: int, weight: QuantisedWeight, bias: Tensor | None = None) -> Tensor:
    program, out = Program(), torch.full((count, weight.rows), torch.nan)
    ops.linear(program, out, Activations(None, tiles=rows), weight, bias)
    program.run()
    return out


def assert_nearest(found: Tensor, gate_up: Tensor, kind: Activation) -> None:
    """found: bfloat16 numbers, each the nearest to what float64 makes of gate_up, [rows, 2 · gates], or hardly farther
    away than that: activations are within 2^-15 of themselves, or 2^-126 of their gate, before they are rounded."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    twice = gate if kind == "silu" else 2 * math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    truth = gate * torch.sigmoid(twice) * up
    half_a_unit = torch.exp2(truth.abs().clamp(min=1e-37).log2().floor() - 8)
    allowed = half_a_unit + truth.abs() * 2**-15 + (gate * up).abs().clamp(min=1) * 2**-125
    assert ((found.double() - truth).abs() <= allowed).all()


@pytest.fixture(autouse=True)
def needs_tiles() -> None:
    compiled = library()
    if compiled is None or not compiled.has_tiles:
        pytest.skip("there are no tiles")


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("gates", "inputs"), [(32, 32), (96, 70), (352, 608)])
def test_values_are_the_nearest(
    fresh: torch.Generator, form: WeightFormat, kind: Activation, gates: int, inputs: int
) -> None:
    groups = random_groups(fresh, form, 2 * gates, inputs)
    weight, narrower = pack_quantised(groups, inputs), weight_of(fresh, form, 19, gates)
    x, bias = randn(fresh, 520, inputs + 11)[:, 3 : 3 + inputs], randn(fresh, 2 * gates)
    for rows in (1, 2, 15, 16, 17, 33, 97, 120, 520):
        for added in (None, bias):
            found = gated_linear(x[:rows], weight, kind, added)
            assert_nearest(found.widen(rows), eager.linear(x[:rows], weight, added), kind)
            assert torch.equal(down(found, rows, narrower), eager.linear(found.widen(rows), narrower))
    weights = eager.tile_weights(groups)[:, :inputs].double()
    truth = reference.gated_activation(reference.linear(x.bfloat16().double(), weights, bias), kind)
    torch.testing.assert_close(found.widen(520).double(), truth, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("rows", [1, 20, 130])
def test_activations_of_any_size(fresh: torch.Generator, kind: Activation, rows: int) -> None:
    """Of biases alone, as x is zero."""
    gates = 4096
    sizes = torch.exp2(torch.randint(-40, 8, (gates,), generator=fresh))
    bias = torch.cat([randn(fresh, gates) * sizes, randn(fresh, gates)])
    bias[:8] = torch.tensor([0.0, -0.0, 1e-38, -1e-38, 1e30, -1e30, 89.0, -89.0])
    weight = weight_of(fresh, FORMATS[0], gates, 32)
    found = gated_linear(torch.zeros(rows, 32), weight, kind, bias).widen(rows)
    assert torch.equal(found, found[:1].expand(rows, -1))
    assert_nearest(found[0], bias, kind)
    bias[:gates], bias[gates:] = torch.tensor([float("nan"), float("inf")]).repeat(gates // 2), 1.0
    found = gated_linear(torch.zeros(rows, 32), weight, kind, bias).widen(rows)
    assert found[:, ::2].isnan().all()
    assert (found[:, 1::2] == float("inf")).all()
    bias[:gates] = -float("inf")
    assert not gated_linear(torch.zeros(rows, 32), weight, kind, bias).widen(rows).isfinite().any()


def test_a_row_depends_on_nothing_else(fresh: torch.Generator) -> None:
    """Neither on other rows nor on threads, nor on what its buffer held before."""
    weight, narrower = weight_of(fresh, FORMATS[0], 160, 608), weight_of(fresh, FORMATS[5], 25, 160)
    x, bias = randn(fresh, 530, 608), randn(fresh, 50)
    rows = gated_linear(x, weight, "silu")
    whole = down(rows, 530, narrower, bias)
    for threads in (1, 2, 3):
        eager.set_threads(threads)
        for count in (*range(1, 20), 1, 135, 150, 530):
            first = int(torch.randint(0, 531 - count, (), generator=fresh))
            part = slice(first, first + count)
            gated_linear(x[part], weight, "silu", into=rows)
            assert torch.equal(down(rows, count, narrower, bias), whole[part])


def test_counts_are_of_the_run(fresh: torch.Generator) -> None:
    weight, narrower = weight_of(fresh, FORMATS[0], 64, 96), weight_of(fresh, FORMATS[0], 16, 64)
    x, rows, out, count = randn(fresh, 40, 96), TileRows.empty(40, 64), torch.zeros(40, 32), Count(40)
    program = Program()
    ops.gated_linear(program, rows, x, weight, None, "gelu_tanh", count)
    ops.linear(program, out, Activations(None, tiles=rows), narrower, None, count)
    program.run()
    whole = out.clone()
    for value in (1, 0, 23):
        count.set(value)
        out.zero_()
        program.run()
        assert torch.equal(out[:value], whole[:value])
        assert not out[value:].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(fresh: torch.Generator, bad: float) -> None:
    weight, narrower = weight_of(fresh, FORMATS[0], 32, 96), weight_of(fresh, FORMATS[0], 32, 32)
    for rows in (3, 20):
        x = randn(fresh, rows, 96)
        x[1, 40] = bad
        found = down(gated_linear(x, weight, "silu"), rows, narrower)
        assert found.isfinite().all(dim=1).logical_not().tolist() == [row == 1 for row in range(rows)]


def test_which_weights_it_takes(fresh: torch.Generator) -> None:
    narrower = weight_of(fresh, FORMATS[0], 32, 48)
    assert ops.gates_in_product(weight_of(fresh, FORMATS[0], 64, 96), narrower)
    assert not ops.gates_in_product(weight_of(fresh, FORMATS[0], 48, 96), narrower)
    with pytest.raises(ValueError, match="groups of 32"):
        gated_linear(randn(fresh, 2, 96), weight_of(fresh, FORMATS[0], 48, 96), "silu")
    with pytest.raises(ValueError, match="halves"):
        gated_linear(randn(fresh, 2, 96), weight_of(fresh, FORMATS[0], 40, 96), "silu")
    with pytest.raises(ValueError, match="out does not fit"):
        gated_linear(
            randn(fresh, 17, 96), weight_of(fresh, FORMATS[0], 64, 96), "silu", None, TileRows.empty(16, 64)
        )
    with pytest.raises(ValueError, match="x does not fit"):
        gated_linear(randn(fresh, 2, 64), weight_of(fresh, FORMATS[0], 64, 96), "silu")


def test_other_levels_refuse_it(fresh: torch.Generator) -> None:
    compiled = library()
    assert compiled is not None
    weight, before = weight_of(fresh, FORMATS[0], 64, 96), compiled.level
    assert compiled.use_level("scalar")
    try:
        assert not ops.gates_in_product(weight, weight_of(fresh, FORMATS[0], 16, 64))
        with pytest.raises(IndexError, match="another level"):
            gated_linear(randn(fresh, 2, 96), weight, "silu")
        with pytest.raises(ValueError, match="quantised x"):
            down(TileRows.empty(2, 96), 2, weight)
    finally:
        assert compiled.use_level(before)
