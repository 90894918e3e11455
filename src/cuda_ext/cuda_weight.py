"""Weights as the CUDA kernels stream them, made at load from what the checkpoint's reader gives."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.cuda_ext.cuda_device import CudaDevice
from shoal.cuda_ext.fp8 import FP8, Fp8, Fp8Rows, round_rows
from shoal.cuda_ext.quantised import QuantisedGroups, WeightFormat

TILE_OUTPUTS = 16
TILE_INPUTS = 64


@dataclass(frozen=True, slots=True)
class CudaWeight:
    """A matrix [rows, columns]; rows are outputs, or token ids. ``storage`` is the plain matrix, of bfloat16, float16
    or fp8 (e4m3), whose rows then have ``scales``, float32; or where there is a format the tiles of
    csrc/cuda/quantised.h."""

    storage: Tensor
    rows: int
    columns: int
    format: WeightFormat | None = None
    scales: Tensor | None = None


def tile_bytes(form: WeightFormat) -> int:
    """Codes, scales and offsets of one tile of 16 × 64."""
    scales = TILE_OUTPUTS * (TILE_INPUTS // form.group) * 2
    return TILE_OUTPUTS * TILE_INPUTS * form.bits // 8 + scales * (1 + form.has_offset)


def empty_weight(
    device: CudaDevice, rows: int, columns: int, form: WeightFormat | Fp8 | None, dtype: torch.dtype
) -> CudaWeight:
    """Zeros. form: None for a plain matrix of ``dtype``. Raises MemoryError where the device has not so much."""
    if form == FP8:
        scales = device.zeros(rows, dtype=torch.float32)
        return CudaWeight(device.zeros(rows, columns, dtype=torch.float8_e4m3fn), rows, columns, scales=scales)
    if form is None:
        return CudaWeight(device.zeros(rows, columns, dtype=dtype), rows, columns)
    tiles = (-(-rows // TILE_OUTPUTS), -(-columns // TILE_INPUTS), tile_bytes(form))
    return CudaWeight(device.zeros(*tiles, dtype=torch.uint8), rows, columns, form)


def write_matrix(device: CudaDevice, weight: CudaWeight, first_row: int, matrix: Tensor) -> None:
    """matrix: some rows of a plain weight's, on the host."""
    rows = weight.storage[first_row : first_row + len(matrix)]
    device.send_whole(rows, matrix.to(rows.dtype))


def fp8_weight(matrix: Tensor) -> CudaWeight:
    """matrix: [rows, columns], on the device; rounded."""
    rounded = round_rows(matrix)
    rows, columns = matrix.shape
    return CudaWeight(rounded.codes, rows, columns, scales=rounded.scales)


def write_fp8(device: CudaDevice, weight: CudaWeight, first_row: int, part: Fp8Rows) -> None:
    """part: some rows of an fp8 weight's, on the host."""
    assert weight.scales is not None
    rows = slice(first_row, first_row + len(part.codes))
    device.send_whole(weight.storage[rows].view(torch.uint8), part.codes.view(torch.uint8))
    device.send_whole(weight.scales[rows], part.scales)


def write_groups(device: CudaDevice, weight: CudaWeight, first_row: int, groups: QuantisedGroups) -> None:
    """groups: rows from a multiple of 16 on, on the host; the last group may be padded."""
    form = groups.format
    if form != weight.format or first_row % TILE_OUTPUTS or first_row + groups.rows > weight.rows:
        raise ValueError(f"{form} at row {first_row} does not fit {weight.format} of {weight.rows} rows")
    given = [part for part in (groups.codes, groups.scales, groups.offsets) if part is not None]
    there = [device.zeros(*part.shape, dtype=part.dtype) for part in given]
    for to, part in zip(there, given, strict=True):
        device.send_whole(to, part)
    codes, scales, *offsets = there
    packing = device.program()
    packing.add(
        "pack_quantised",
        panels=weight.storage[first_row // TILE_OUTPUTS :],
        codes=codes,
        scales=scales,
        offsets=offsets[0] if offsets else None,
        rows=groups.rows,
        groups=groups.codes.shape[1],
        bits=form.bits,
        group=form.group,
    )
    packing.run()
    device.wait()  # the parts are given back
