"""Linear over packed weights: against float64, and to the bit against itself however it is cut and computed."""

from collections.abc import Iterator

import eager
import pytest
import torch
from torch import Tensor

from shoal.cuda_ext import reference
from shoal.cuda_ext.binding import library
from shoal.cuda_ext.packed_weight import PackedWeight, pack_weight

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (2, 1), (16, 2), (23, 7), (129, 64), (100, 255), (40, 600), (320, 1090)]
"""(outputs, inputs)"""


def randn(fresh: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=fresh)


def truth(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    return reference.linear(x.double(), matrix, bias)


TILES = "avx512_amx"
"""The level whose tiles multiply bfloat16 weights with 16 bits of x's mantissa; the others take all 24."""


def assert_true(found: Tensor, x: Tensor, matrix: Tensor, bias: Tensor | None) -> None:
    assert found.dtype == torch.float32
    expected = truth(x, matrix, bias)
    compiled = library()
    if matrix.dtype == torch.bfloat16 and compiled is not None and compiled.level == TILES:
        sizes = x.double().abs() @ matrix.double().abs().T
        assert ((found - expected).abs() <= 2**-16 * sizes + 1e-5 * expected.abs()).all()
    else:
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-7 * matrix.shape[1])


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_linear(fresh: torch.Generator, dtype: torch.dtype, outputs: int, inputs: int) -> None:
    matrix = randn(fresh, outputs, inputs).to(dtype)
    x, bias = randn(fresh, 40, inputs + 11)[:, 3 : 3 + inputs], randn(fresh, outputs)
    packed = pack_weight(matrix)
    for tokens in (0, 1, 2, 3, 5, 8, 13, 40):
        for added in (None, bias):
            found = eager.linear(x[:tokens], packed, added)
            assert_true(found, x[:tokens], matrix, added)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(23, 7), (200, 577), (1001, 96)])
def test_a_row_does_not_depend_on_the_others_or_on_threads(
    fresh: torch.Generator, dtype: torch.dtype, outputs: int, inputs: int
) -> None:
    packed = pack_weight(randn(fresh, outputs, inputs).to(dtype))
    x, bias = randn(fresh, 150, inputs), randn(fresh, outputs)
    whole = eager.linear(x, packed, bias)
    for threads in (1, 2, 3):
        eager.set_threads(threads)
        assert torch.equal(eager.linear(x, packed, bias), whole)
        for rows in range(1, 34):
            first = int(torch.randint(0, 150 - rows, (), generator=fresh))
            assert torch.equal(eager.linear(x[first : first + rows], packed, bias), whole[first : first + rows])


@pytest.fixture
def levels() -> Iterator[list[str]]:
    compiled = library()
    if compiled is None:
        pytest.skip("no CPU library was built")
    before = compiled.level
    yield [name for name, supported in compiled.levels().items() if supported]
    compiled.use_level(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_agree_to_the_bit(fresh: torch.Generator, levels: list[str], dtype: torch.dtype) -> None:
    matrix, x, bias = randn(fresh, 77, 333).to(dtype), randn(fresh, 45, 333), randn(fresh, 77)
    results = []
    for level in levels:
        if level == TILES and dtype == torch.bfloat16:
            continue
        assert library().use_level(level)  # type: ignore[union-attr]
        packed = pack_weight(matrix)
        results += [
            eager.linear(x, packed, bias),
            torch.cat([eager.linear(row, packed, bias) for row in x.split(1)]),
        ]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_row(fresh: torch.Generator, dtype: torch.dtype) -> None:
    packed, x = pack_weight(randn(fresh, 35, 21).to(dtype)), randn(fresh, 30, 21)
    x[7, 20], x[19, 3] = float("nan"), float("inf")
    found = eager.linear(x, packed)
    finite = found.isfinite().all(dim=1)
    assert (~finite).nonzero().flatten().tolist() == [7, 19]
    assert not found[[7, 19]].isfinite().any()


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (16, 8), (31, 33), (50, 7)])
def test_packing_keeps_every_bit(fresh: torch.Generator, dtype: torch.dtype, rows: int, columns: int) -> None:
    matrix = randn(fresh, rows, columns).to(dtype)
    matrix[0, 0] = float("nan")
    packed = pack_weight(matrix)
    torch.testing.assert_close(packed.unpack(), matrix, rtol=0, atol=0, equal_nan=True)
    pieces = PackedWeight.empty(rows, columns, dtype)
    for first in range(0, rows, 16):
        pieces.write(first, matrix[first : first + 16].float())
    torch.testing.assert_close(pieces.storage, packed.storage, rtol=0, atol=0, equal_nan=True)
    whole_rows, step = -(-rows // 16) * 16, 4 // dtype.itemsize
    assert packed.storage.numel() == whole_rows * -(-columns // step) * step
    padded = packed.storage.transpose(1, 2).reshape(whole_rows, -1)
    assert not padded[rows:].any()
    assert not padded[:, columns:].any()


def test_what_does_not_fit_is_named(fresh: torch.Generator) -> None:
    packed = pack_weight(randn(fresh, 40, 8))
    for first_row, rows in ((8, 16), (0, 20), (32, 16)):
        with pytest.raises(ValueError, match=f"rows {first_row}"):
            packed.write(first_row, randn(fresh, rows, 8))
    with pytest.raises(ValueError, match="40 × 8"):
        packed.write(0, randn(fresh, 40, 9))
    with pytest.raises(ValueError, match="float16"):
        pack_weight(randn(fresh, 3, 3).half())


@pytest.mark.usefixtures("level")
def test_wrong_operands_are_named(fresh: torch.Generator) -> None:
    packed = pack_weight(randn(fresh, 40, 8))
    for x, bias, named in [
        (randn(fresh, 2, 9), None, "fit"),
        (randn(fresh, 2, 8).bfloat16(), None, "float32"),
        (randn(fresh, 8, 2).T, None, "float32 rows"),
        (randn(fresh, 2, 8), randn(fresh, 41), "bias"),
    ]:
        with pytest.raises(ValueError, match=named):
            eager.linear(x, packed, bias)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [5, 48, 577])
def test_embed(fresh: torch.Generator, dtype: torch.dtype, dim: int) -> None:
    matrix = randn(fresh, 30, dim).to(dtype)
    ids = torch.tensor([99, 100, 129, 130, 0, 115, -1, 2**40])
    result = eager.embed(ids, pack_weight(matrix), 1.75, 100)
    assert result.dtype == torch.float32
    assert torch.equal(result, reference.embed(ids, matrix, 1.75, 100))
    assert torch.equal(result[[0, 3, 4, 6, 7]], torch.zeros(5, dim))


def test_without_a_library_torch_multiplies(monkeypatch: pytest.MonkeyPatch, fresh: torch.Generator) -> None:
    for module in ("packed_weight", "program"):
        monkeypatch.setattr(f"shoal.cuda_ext.{module}.library", lambda: None)
    matrix, x = randn(fresh, 30, 9).bfloat16(), randn(fresh, 4, 9)
    packed = pack_weight(matrix)
    assert torch.equal(packed.storage, matrix)
    assert_true(eager.linear(x, packed), x, matrix, None)
    ids = torch.tensor([3, 29, 30])
    assert torch.equal(eager.embed(ids, packed), reference.embed(ids, matrix, 1.0, 0))
