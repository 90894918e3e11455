"""Products with plain and quantised matrices against float64, and rows alone against rows in a batch, to the bit: those
of the kernels here, which is_deterministic asks for, and those of many rows that cuBLAS does."""

from typing import NamedTuple

import pytest
import torch
from emulated import DTYPES, close, one_rounding
from integer_weights import FORMATS
from torch import Tensor

from shoal.cuda_ext import cuda_ops, reference
from shoal.cuda_ext.cuda_binding import CudaLibrary
from shoal.cuda_ext.cuda_program import CudaProgram
from shoal.cuda_ext.cuda_weight import fp8_weight
from shoal.cuda_ext.program import Count
from shoal.cuda_ext.quantised import QuantisedGroups, WeightFormat

pytestmark = pytest.mark.usefixtures("chip")

HALVES = [torch.bfloat16, torch.float16]


class Sizes(NamedTuple):
    """Of a product with a matrix; rows of it and of x begin at multiples of eight elements where ``is_aligned``."""

    rows: int
    inputs: int
    outputs: int
    is_aligned: bool

    def wide(self, rows: int) -> tuple[int, int]:
        """The shape of a matrix whose first columns are the inputs."""
        return rows, self.inputs + (-self.inputs % 8 if self.is_aligned else 1)

    def x(self, fresh: torch.Generator, dtype: torch.dtype) -> Tensor:
        return torch.randn(self.wide(self.rows), generator=fresh).to(dtype)[:, : self.inputs]


SIZES = [
    Sizes(*sizes, is_aligned)
    for sizes in [
        (1, 64, 16),
        (1, 1100, 35),
        (3, 7, 1),
        (9, 200, 50),
        (17, 576, 33),
        (13, 5200, 40),
        (40, 72, 20),
        (60, 1104, 20),
        (150, 1104, 300),
    ]
    for is_aligned in (True, False)
]


def linear(
    cuda: CudaLibrary,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    scales: Tensor | None = None,
    *,
    is_deterministic: bool = True,
) -> Tensor:
    """out is every second column of a wider matrix, the others stay NaN."""
    rows, outputs = len(x), len(weight)
    wide = torch.full((rows, outputs + 5), torch.nan, dtype=out_dtype)
    cuda.call(
        "linear", out=wide, x=x, weight=weight, scales=scales, bias=bias, rows=rows, inputs=x.shape[1], outputs=outputs,
        row_stride=x.stride(0), weight_stride=weight.stride(0), out_stride=outputs + 5, dtype=DTYPES[x.dtype],
        weight_dtype=DTYPES[weight.dtype], out_dtype=DTYPES[out_dtype], is_deterministic=is_deterministic,
    )  # fmt: skip
    assert wide[:, outputs:].isnan().all()
    return wide[:, :outputs]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_linear(cuda: CudaLibrary, fresh: torch.Generator, dtype: torch.dtype, sizes: Sizes) -> None:
    x, inputs, outputs = sizes.x(fresh, dtype), sizes.inputs, sizes.outputs
    weight = torch.randn(sizes.wide(outputs), generator=fresh).to(dtype)[:, :inputs]
    bias = torch.randn(outputs, generator=fresh) if sizes.rows % 2 else None
    truth = reference.linear(x.double(), weight.double(), None if bias is None else bias.double())
    size = float(inputs) ** 0.5
    close(linear(cuda, x, weight, bias, torch.float32), truth, 1e-5, 2e-6 * size)
    close(linear(cuda, x, weight, bias, dtype), truth, one_rounding(dtype), 2e-6 * size)


def every_fp8() -> Tensor:
    """All numbers of e4m3 but NaN."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return codes[codes.float().isfinite()]


@pytest.mark.parametrize("dtype", HALVES)
def test_every_fp8_number_is_widened_exactly(cuda: CudaLibrary, dtype: torch.dtype) -> None:
    weight, x = every_fp8()[:, None].expand(-1, 16).contiguous(), torch.eye(16, dtype=dtype)
    assert torch.equal(linear(cuda, x, weight, None, torch.float32).T, weight.float())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_linear_of_fp8(cuda: CudaLibrary, fresh: torch.Generator, dtype: torch.dtype, sizes: Sizes) -> None:
    """With scales of outputs, and rows alone as in their batch, to the bit."""
    x, inputs, outputs, numbers = sizes.x(fresh, dtype), sizes.inputs, sizes.outputs, every_fp8()
    codes = torch.randint(0, len(numbers), sizes.wide(outputs), generator=fresh)
    weight = numbers.view(torch.uint8)[codes].view(torch.float8_e4m3fn)[:, :inputs]
    scales, bias = torch.randn(outputs, generator=fresh), torch.randn(outputs, generator=fresh)
    scaled = weight.double() * scales.double()[:, None]
    truth = reference.linear(x.double(), scaled, bias.double())
    size = x.double().norm(dim=1, keepdim=True) * scaled.norm(dim=1)
    found = linear(cuda, x, weight, bias, torch.float32, scales)
    assert ((found - truth).abs() <= 1e-6 * size + 1e-6).all()
    last = linear(cuda, x[-1:], weight, bias, torch.float32, scales)[0]
    assert torch.equal(last, found[-1])


def test_fp8_weights_are_made_of_plain_ones(emulation: CudaLibrary, fresh: torch.Generator) -> None:
    matrix = torch.randn(20, 72, generator=fresh) * torch.logspace(-9, 3, 20)[:, None]
    matrix[7] = 0
    weight = fp8_weight(matrix)
    assert weight.scales is not None
    wide = weight.storage.double() * weight.scales.double()[:, None]
    largest = matrix.abs().amax(dim=1, keepdim=True).double()
    # Four bits of a number, or half a step of the smallest ones, where 448 is the row's largest.
    assert (
        (wide - matrix).abs() <= (1 + 1e-6) * torch.maximum(matrix.abs() / 16, largest / 448 * 2**-10)
    ).all()
    for dtype in HALVES:
        x, out = torch.randn(3, 72, generator=fresh).to(dtype), torch.empty(3, 20)
        program = CudaProgram(emulation, torch.device("cpu"))
        cuda_ops.linear(program, out, x, weight, None, Count(3))
        program.run()
        size = x.double().norm(dim=1, keepdim=True) * wide.norm(dim=1)
        assert ((out - x.double() @ wide.T).abs() <= 1e-6 * size).all()


def groups_of(fresh: torch.Generator, rows: int, columns: int, form: WeightFormat) -> QuantisedGroups:
    """Any codes, scales and offsets; columns are rounded up to whole groups."""
    count = -(-columns // form.group)
    codes = torch.randint(0, 2**form.bits, (rows, count, form.group), generator=fresh, dtype=torch.uint8)
    scales = torch.randn(rows, count, generator=fresh).half()
    offsets = torch.randn(rows, count, generator=fresh).half() if form.has_offset else None
    return QuantisedGroups(codes, scales, offsets, form.bits)


def pack(cuda: CudaLibrary, groups: QuantisedGroups) -> Tensor:
    form = groups.format
    rows, count, group = groups.codes.shape
    tile_bytes = 16 * 64 * form.bits // 8 + 16 * (64 // group) * 2 * (1 + form.has_offset)
    panels = torch.full((-(-rows // 16), -(-count * group // 64), tile_bytes), 0xAB, dtype=torch.uint8)
    cuda.call(
        "pack_quantised", panels=panels, codes=groups.codes, scales=groups.scales, offsets=groups.offsets,
        rows=rows, groups=count, bits=form.bits, group=group,
    )  # fmt: skip
    return panels


def form_fields(form: WeightFormat) -> dict[str, int]:
    return {"bits": form.bits, "group": form.group, "has_offset": form.has_offset}


def linear_quantised(
    cuda: CudaLibrary,
    x: Tensor,
    panels: Tensor,
    groups: QuantisedGroups,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    *,
    is_deterministic: bool = True,
) -> Tensor:
    out = torch.full((len(x), groups.rows), torch.nan, dtype=out_dtype)
    cuda.call(
        "linear_quantised", out=out, x=x, panels=panels, bias=bias, rows=len(x), inputs=x.shape[1],
        outputs=groups.rows, row_stride=x.stride(0), out_stride=groups.rows, dtype=DTYPES[x.dtype],
        out_dtype=DTYPES[out_dtype], is_deterministic=is_deterministic, **form_fields(groups.format),
    )  # fmt: skip
    return out


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(1, 64, 16), (2, 1120, 35), (11, 96, 20), (13, 5200, 40), (37, 1120, 50), (70, 328, 150)],
)
def test_linear_quantised(
    cuda: CudaLibrary,
    fresh: torch.Generator,
    dtype: torch.dtype,
    form: WeightFormat,
    rows: int,
    inputs: int,
    outputs: int,
) -> None:
    groups = groups_of(fresh, outputs, inputs, form)
    weight = groups.dequantise().double()[:, :inputs]
    x = torch.randn(rows, inputs, generator=fresh).to(dtype)
    bias = torch.randn(outputs, generator=fresh)
    truth = reference.linear(x.double(), weight, bias.double())
    # Relative to what is added up: offsets and codes of both signs cancel.
    size = x.double().norm(dim=1, keepdim=True) * weight.norm(dim=1)
    panels = pack(cuda, groups)
    for out_dtype, rounding in ((torch.float32, 0.0), (dtype, one_rounding(dtype))):
        error = (linear_quantised(cuda, x, panels, groups, bias, out_dtype) - truth).abs()
        assert (error <= 1e-6 * size + 1e-6 + rounding * truth.abs()).all()
    if rows <= 64:
        own = linear_quantised(cuda, x, panels, groups, bias, is_deterministic=False)
        assert ((own - truth).abs() <= 1e-6 * size + 1e-6).all()


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "inputs"), [(torch.bfloat16, 700), (torch.float16, 328), (torch.bfloat16, 1224)]
)
def test_a_row_does_not_depend_on_its_batch(
    cuda: CudaLibrary, fresh: torch.Generator, dtype: torch.dtype, form: WeightFormat, inputs: int
) -> None:
    """To the bit, in kernels for few rows and for many; with fewer and more tiles of inputs than a block has warps."""
    groups = groups_of(fresh, 20, inputs, form)
    panels = pack(cuda, groups)
    plain = groups.dequantise().to(dtype)[:, :inputs]
    x = torch.randn(150, inputs, generator=fresh).to(dtype)
    x[3] = torch.nan
    for count in (1, 8, 9, 16, 35, 65, 150):
        together = linear_quantised(cuda, x[:count], panels, groups)
        plainly = linear(cuda, x[:count], plain, None, torch.float32)
        for row in {0, count // 2, count - 1} - {3}:
            assert torch.equal(linear_quantised(cuda, x[row : row + 1], panels, groups)[0], together[row])
            assert torch.equal(linear(cuda, x[row : row + 1], plain, None, torch.float32)[0], plainly[row])


@pytest.mark.parametrize("rows", [1, 11, 30, 70, 150])
def test_chips_agree_to_the_bit(
    emulation: CudaLibrary, fresh: torch.Generator, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """Those that share out a small matrix's turns among several blocks, those that cannot, and those with wgmma: as the
    emulation rounds, each instruction once."""
    groups = groups_of(fresh, 20, 1224, FORMATS[0])
    panels, plain = pack(emulation, groups), groups.dequantise().bfloat16()[:, :1224]
    x = torch.randn(rows, 1224, generator=fresh).bfloat16()
    results = []
    for chip in ("80", "86", "90", "90:1", "100"):
        monkeypatch.setenv("SHOAL_EMULATED_CHIP", chip)
        results.append(
            (linear_quantised(emulation, x, panels, groups), linear(emulation, x, plain, None, torch.float32))
        )
    for quantised, plainly in results[1:]:
        assert torch.equal(quantised, results[0][0])
        assert torch.equal(plainly, results[0][1])


@pytest.mark.parametrize("chip", ["80"], indirect=True)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("sizes", SIZES[-6:], ids=str)
def test_cublas(cuda: CudaLibrary, fresh: torch.Generator, dtype: torch.dtype, sizes: Sizes) -> None:
    """It has weights, scaled ones of fp8, and adds a bias, that are rounded to 16 bits."""
    assert_many_rows(cuda, fresh, dtype, sizes)


@pytest.mark.parametrize("chip", ["90", "90:1"], indirect=True)
@pytest.mark.parametrize("sizes", SIZES[-6:], ids=str)
def test_many_rows_without_cublas(
    emulation: CudaLibrary, fresh: torch.Generator, monkeypatch: pytest.MonkeyPatch, sizes: Sizes
) -> None:
    """By wgmma, in an order of its own."""
    monkeypatch.setenv("SHOAL_EMULATED_NO_CUBLAS", "1")
    assert_many_rows(emulation, fresh, torch.bfloat16, sizes)


@pytest.mark.parametrize("chip", ["90", "90:1"], indirect=True)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_many_rows_of_integers_without_cublas(
    emulation: CudaLibrary, fresh: torch.Generator, monkeypatch: pytest.MonkeyPatch, form: WeightFormat
) -> None:
    monkeypatch.setenv("SHOAL_EMULATED_NO_CUBLAS", "1")
    groups = groups_of(fresh, 150, 328, form)
    weight, panels = groups.dequantise().double()[:, :328], pack(emulation, groups)
    for rows in (37, 150):
        x = torch.randn(rows, 328, generator=fresh).bfloat16()
        size = x.double().norm(dim=1, keepdim=True) * weight.norm(dim=1)
        found = linear_quantised(emulation, x, panels, groups, is_deterministic=False)
        assert ((found - reference.linear(x.double(), weight, None)).abs() <= 1e-6 * size + 1e-6).all()


def assert_many_rows(cuda: CudaLibrary, fresh: torch.Generator, dtype: torch.dtype, sizes: Sizes) -> None:
    x, inputs, outputs, rounding = sizes.x(fresh, dtype), sizes.inputs, sizes.outputs, one_rounding(dtype)
    plain = torch.randn(sizes.wide(outputs), generator=fresh).to(dtype)[:, :inputs]
    numbers = every_fp8()
    codes = torch.randint(0, len(numbers), sizes.wide(outputs), generator=fresh)
    narrow = numbers.view(torch.uint8)[codes].view(torch.float8_e4m3fn)[:, :inputs]
    bias, scales = torch.randn(outputs, generator=fresh), torch.randn(outputs, generator=fresh)
    for weight, scale in ((plain, None), (narrow, scales)):
        meant = weight.double() if scale is None else weight.double() * scale.double()[:, None]
        size = x.double().norm(dim=1, keepdim=True) * meant.norm(dim=1)
        of_weights = 0.0 if scale is None else rounding
        for added, out_dtype in ((bias, dtype), (None, torch.float32)):
            truth = reference.linear(x.double(), meant, None if added is None else added.double())
            of_out = 0.0 if out_dtype == torch.float32 else rounding
            found = linear(cuda, x, weight, added, out_dtype, scale, is_deterministic=False)
            allowed = (1e-6 + of_weights) * size + 1e-6 + of_out * (truth.abs() + bias.abs())
            assert ((found - truth).abs() <= allowed).all()


@pytest.mark.parametrize("chip", ["80"], indirect=True)
@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(70, 328, 150), (66, 1000, 70)])
def test_cublas_of_integers(
    cuda: CudaLibrary, fresh: torch.Generator, form: WeightFormat, rows: int, inputs: int, outputs: int
) -> None:
    """In one piece, and in several."""
    groups = groups_of(fresh, outputs, inputs, form)
    weight, panels = groups.dequantise().double()[:, :inputs], pack(cuda, groups)
    bias = torch.randn(outputs, generator=fresh)
    for dtype in HALVES:
        x, rounding = torch.randn(rows, inputs, generator=fresh).to(dtype), one_rounding(dtype)
        truth = reference.linear(x.double(), weight, bias.double())
        size = x.double().norm(dim=1, keepdim=True) * weight.norm(dim=1)
        found = linear_quantised(cuda, x, panels, groups, bias, dtype, is_deterministic=False)
        allowed = (1e-6 + rounding) * size + 1e-6 + rounding * (truth.abs() + bias.abs())
        assert ((found - truth).abs() <= allowed).all()


def test_no_rows(cuda: CudaLibrary, fresh: torch.Generator) -> None:
    """A step in which nothing is drawn."""
    groups = groups_of(fresh, 20, 200, FORMATS[0])
    x = torch.randn(0, 200).bfloat16()
    for is_deterministic in (True, False):
        plain = torch.randn(20, 200).bfloat16()
        assert linear(cuda, x, plain, None, torch.float32, is_deterministic=is_deterministic).shape == (0, 20)
        packed = pack(cuda, groups)
        assert linear_quantised(cuda, x, packed, groups, is_deterministic=is_deterministic).shape == (0, 20)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_dequantise_and_embed(cuda: CudaLibrary, fresh: torch.Generator, form: WeightFormat) -> None:
    rows, columns = 37, 168
    groups = groups_of(fresh, rows, columns, form)
    panels, truth = pack(cuda, groups), groups.dequantise()[:, :columns]
    for dtype in HALVES:
        out = torch.full((rows, columns), torch.nan, dtype=dtype)
        sizes = {"rows": rows, "columns": columns, "dtype": DTYPES[dtype]}
        cuda.call("dequantise", out=out, panels=panels, **sizes, **form_fields(form))
        close(out, truth, one_rounding(dtype), 0 if dtype == torch.bfloat16 else 2**-25)
    ids = torch.randint(-5, 50, (29,), generator=fresh)
    embedded = torch.full((29, columns), torch.nan)
    cuda.call(
        "embed", out=embedded, ids=ids, table=panels, tokens=29, rows=rows, dim=columns, first_id=3, scale=0.5,
        **form_fields(form),
    )  # fmt: skip
    close(embedded, reference.embed(ids, truth.double(), 0.5, 3), 1e-6, 1e-6)


def test_formats_that_do_not_exist_are_refused(cuda: CudaLibrary) -> None:
    for bits, group in ((4, 16), (8, 64), (3, 32)):
        with pytest.raises(NotImplementedError):
            cuda.call("dequantise", rows=1, columns=64, bits=bits, group=group, dtype=1)
