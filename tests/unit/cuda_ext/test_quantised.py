"""Integer weights, with integer activations and on tiles of bfloat16: against float64 products of what they stand for,
and to the bit against themselves however a product is cut and computed."""

from collections.abc import Iterator

import eager
import pytest
import torch
from integer_weights import FORMATS, random_groups
from torch import Tensor

from shoal.cuda_ext import ops, reference
from shoal.cuda_ext.binding import library
from shoal.cuda_ext.ops import Activations
from shoal.cuda_ext.program import Program, no_twin
from shoal.cuda_ext.quantised import (
    QuantisedGroups,
    QuantisedRows,
    QuantisedWeight,
    WeightFormat,
    join,
    pack_quantised,
    quantise_weight,
)

SHAPES = [(1, 32), (16, 64), (23, 32), (129, 96), (100, 256), (40, 608), (320, 1088)]
"""(outputs, inputs)"""


def randn(fresh: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=fresh)


def activations(fresh: torch.Generator, rows: int, columns: int) -> Tensor:
    """With outliers, which lie apart: here and there, and in two columns of one group in every other row."""
    is_outlier = torch.rand(rows, columns, generator=fresh) < 0.005
    for row in range(0, rows, 2):
        is_outlier[row, min(row % 4 * 3, columns - 1)] = True
    return torch.where(is_outlier, 30.0, 1.0) * randn(fresh, rows, columns)


def has_tiles() -> bool:
    compiled = library()
    return compiled is not None and compiled.has_tiles


def truth(x: Tensor, groups: QuantisedGroups, bias: Tensor | None) -> Tensor:
    """In float64, from what is multiplied in the place of activations and weights."""
    if has_tiles():
        return reference.linear(x.bfloat16().double(), eager.tile_weights(groups).double(), bias)
    return reference.linear(eager.quantise(x).dequantise(), groups.dequantise().double(), bias)


@pytest.fixture
def levels() -> Iterator[list[str]]:
    compiled = library()
    if compiled is None:
        pytest.skip("no CPU library was built")
    before = compiled.level
    yield [name for name, supported in compiled.levels().items() if supported]
    compiled.use_level(before)


def use(level: str) -> None:
    compiled = library()
    assert compiled is not None
    assert compiled.use_level(level)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("columns", [1, 15, 32, 33, 100, 577])
def test_quantise_is_its_twin(fresh: torch.Generator, columns: int) -> None:
    x = activations(fresh, 9, columns + 5)[:, 2 : 2 + columns] * torch.logspace(-20, 20, 9).unsqueeze(1)
    x[1, 0] = 100 * x[1].abs().max()
    x[3] = 0
    rows = eager.quantise(x)
    assert torch.equal(rows.storage, reference.quantise(x, rows.storage.shape[1]))
    groups = torch.nn.functional.pad(x, (0, -columns % 32)).view(9, -1, 32)
    largest, second = groups.abs().double().topk(2, dim=2).values.split(1, dim=2)
    crests = largest / groups.double().square().mean(2, keepdim=True).sqrt().clamp(min=1e-30)
    assert (crests > 4.2).any()
    assert (crests < 3.8).any()
    # Outliers are what they were, and the next largest decides how coarse the other codes are.
    most = torch.where(crests > 4.2, second, largest) / 253 + 1e-30
    most = torch.where((crests > 4.2) & (groups.abs() == largest), 0.0, most)
    assert ((rows.dequantise() - x).abs() <= most.flatten(1)[:, :columns]).all()


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(fresh: torch.Generator, bad: float) -> None:
    x = randn(fresh, 3, 96)
    x[1, 40] = bad
    packed = pack_quantised(random_groups(fresh, FORMATS[0], 33, 96), 96)
    found = eager.linear(x, packed)
    assert not found[1].isfinite().any()
    assert found[[0, 2]].isfinite().all()


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_linear(fresh: torch.Generator, form: WeightFormat, outputs: int, inputs: int) -> None:
    groups = random_groups(fresh, form, outputs, inputs)
    packed = pack_quantised(groups, inputs)
    x, bias = activations(fresh, 23, inputs + 11)[:, 3 : 3 + inputs], randn(fresh, outputs)
    for tokens in (0, 1, 2, 3, 5, 8, 13, 23):
        for added in (None, bias):
            found = eager.linear(x[:tokens], packed, added)
            expected = truth(x[:tokens], groups, added)
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6 * inputs)


@pytest.mark.usefixtures("level")
def test_the_largest_sums_fit(fresh: torch.Generator) -> None:
    """All weights and all activations at their extremes, of every sign."""
    for form in FORMATS:
        for code in (0, (1 << form.bits) - 1):
            groups = random_groups(fresh, form, 16, 64)
            groups.codes.fill_(code)
            for sign in (1.0, -1.0):
                x = torch.full((3, 64), sign)
                expected = truth(x, groups, None)
                found = eager.linear(x, pack_quantised(groups, 64))
                torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_row_does_not_depend_on_the_others_or_on_threads(fresh: torch.Generator, form: WeightFormat) -> None:
    packed = pack_quantised(random_groups(fresh, form, 333, 192), 192)
    x, bias = activations(fresh, 150, 192), randn(fresh, 333)
    whole = eager.linear(x, packed, bias)
    for threads in (1, 2, 3):
        eager.set_threads(threads)
        assert torch.equal(eager.linear(x, packed, bias), whole)
        for rows in range(1, 20):
            first = int(torch.randint(0, 150 - rows, (), generator=fresh))
            part = slice(first, first + rows)
            assert torch.equal(eager.linear(x[part], packed, bias), whole[part])


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_many_rows_give_what_few_give(fresh: torch.Generator, form: WeightFormat) -> None:
    """Whole and ragged tiles, even and odd numbers of tiles and panels, several items."""
    for outputs, inputs, most in ((75, 610, 139), (96, 1000, 113), (17, 300, 530)):
        packed = pack_quantised(random_groups(fresh, form, outputs, inputs), inputs)
        x, bias = activations(fresh, most, inputs), randn(fresh, outputs)
        few = torch.cat([eager.linear(part, packed, bias) for part in x.split(37)])
        for rows in (most, most - 10, 100):
            assert torch.equal(eager.linear(x[:rows], packed, bias), few[:rows])


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_levels_agree_to_the_bit(fresh: torch.Generator, levels: list[str], form: WeightFormat) -> None:
    """Those without tiles, which round otherwise."""
    groups, x, bias = random_groups(fresh, form, 77, 320), activations(fresh, 45, 320), randn(fresh, 77)
    results = []
    for level in levels:
        use(level)
        if has_tiles():
            continue
        packed = pack_quantised(groups, 320)
        results.append(eager.linear(x, packed, bias))
        results.append(torch.cat([eager.linear(row, packed, bias) for row in x.split(1)]))
    assert len(results) >= 2
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.usefixtures("level")
def test_weights_of_another_level_are_refused(fresh: torch.Generator) -> None:
    if has_tiles():
        pytest.skip("what refuses them there is ops: test_wrong_operands_are_named")
    packed, x, form = (
        pack_quantised(random_groups(fresh, FORMATS[0], 40, 64), 64),
        randn(fresh, 2, 64),
        FORMATS[0],
    )
    sizes = [2, 64, 40, 64, 40, 0, form.bits, form.group, form.has_offset]
    program = Program()
    program.add("linear", [torch.empty(2, 40), x, packed.storage, None, *sizes], no_twin)
    with pytest.raises(IndexError, match="another level"):
        program.run()


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_embed(fresh: torch.Generator, form: WeightFormat) -> None:
    groups = random_groups(fresh, form, 30, 96)
    ids = torch.tensor([99, 100, 129, 130, 0, 115, -1, 2**40])
    result = eager.embed(ids, pack_quantised(groups, 96), 1.75, 100)
    assert torch.equal(result, reference.embed(ids, groups.dequantise(), 1.75, 100))


@pytest.mark.usefixtures("level")
def test_norms_and_activations_quantise_what_they_give(fresh: torch.Generator) -> None:
    """The same bytes as quantising their plain results."""
    x, weight, gate_up = activations(fresh, 7, 100), randn(fresh, 100), activations(fresh, 7, 200)
    residual = randn(fresh, 7, 100)
    plain, gated = reference.OUTLIERS, reference.GATED_OUTLIERS
    for record, outliers in (
        (lambda program, out: ops.rms_norm(program, out, x, weight, 1e-5), plain),
        (lambda program, out: ops.add_rms_norm(program, out, residual.clone(), x, weight, 1e-5), plain),
        (lambda program, out: ops.gated_activation(program, out, gate_up, "silu"), gated),
    ):
        both = Activations(torch.empty(7, 100), QuantisedRows.empty(7, 100))
        alone = Activations(None, QuantisedRows.empty(7, 100))
        program = Program()
        record(program, both)
        record(program, alone)
        program.run()
        assert both.plain is not None
        assert both.quantised is not None
        assert alone.quantised is not None
        row_bytes = both.quantised.storage.shape[1]
        assert torch.equal(both.quantised.storage, reference.quantise(both.plain, row_bytes, outliers))
        assert torch.equal(alone.quantised.storage, both.quantised.storage)


@pytest.mark.parametrize(("bits", "most"), [(8, 0.004), (4, 0.07)])
def test_weights_are_quantised_to_the_nearest_code(fresh: torch.Generator, bits: int, most: float) -> None:
    matrix = randn(fresh, 20, 70)
    matrix[3] = 0
    groups = quantise_weight(matrix, bits)
    found = groups.dequantise()[:, :70]
    spread = torch.nn.functional.pad(matrix, (0, 26)).view(20, 3, 32).abs().amax(2).max()
    assert (found - matrix).abs().max() < most * spread * (1 if bits == 8 else 2)
    assert torch.equal(found[3], torch.zeros(70))


@pytest.mark.usefixtures("level")
def test_packing_does_not_depend_on_threads(fresh: torch.Generator) -> None:
    for form in FORMATS:
        groups = random_groups(fresh, form, 1007, 512)
        eager.set_threads(1)
        alone = pack_quantised(groups, 512).storage
        for threads in (2, 3, 5):
            eager.set_threads(threads)
            for _ in range(4):
                assert torch.equal(pack_quantised(groups, 512).storage, alone)


def test_parts_are_joined_reordered_and_written_in_pieces(fresh: torch.Generator) -> None:
    if library() is None:
        pytest.skip("no CPU library was built")
    form = WeightFormat(8, 16, False)
    first, second = random_groups(fresh, form, 32, 48), random_groups(fresh, form, 5, 48)
    whole = join([first, second])
    assert torch.equal(whole.dequantise(), torch.cat([first.dequantise(), second.dequantise()]))
    order = torch.randperm(37, generator=fresh)
    assert torch.equal(whole.take(order).dequantise(), whole.dequantise()[order])
    pieces = QuantisedWeight.empty(37, 48, form)
    pieces.write(0, first)
    pieces.write(32, second)
    assert torch.equal(pieces.storage, pack_quantised(whole, 48).storage)
    for bad in (
        lambda: pieces.write(1, second),
        lambda: pieces.write(48, second),
        lambda: pieces.write(0, random_groups(fresh, FORMATS[0], 5, 64)),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            bad()


def test_wrong_operands_are_named(fresh: torch.Generator) -> None:
    if library() is None:
        pytest.skip("no CPU library was built")
    packed = pack_quantised(random_groups(fresh, FORMATS[0], 40, 64), 64)
    x, out = randn(fresh, 2, 64), torch.empty(2, 40)
    wrong = Activations(None, QuantisedRows.empty(2, 64)) if has_tiles() else Activations(x)
    with pytest.raises(ValueError, match="needs"):
        ops.linear(Program(), out, wrong, packed)
    with pytest.raises(ValueError, match="fit"):
        ops.linear(Program(), out, Activations(None, QuantisedRows.empty(2, 32)), packed)
    with pytest.raises(ValueError, match="bits"):
        WeightFormat(4, 16, True)
