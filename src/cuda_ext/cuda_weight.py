"""Weights as the CUDA kernels stream them, made once at load from the layouts that the checkpoint's reader gives."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.cuda_ext.cuda_program import CudaProgram
from shoal.cuda_ext.packed_weight import PackedWeight
from shoal.cuda_ext.quantised import PANEL, QuantisedGroups, QuantisedWeight, WeightFormat

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


def plain_weight(program: CudaProgram, matrix: Tensor, dtype: torch.dtype) -> CudaWeight:
    """matrix: [rows, columns]."""
    storage = matrix.to(device=program.device, dtype=dtype).contiguous()
    return CudaWeight(storage, *matrix.shape)


def fp8_weight(matrix: Tensor) -> CudaWeight:
    """matrix: [rows, columns], on the device. Rounded to e4m3, with a scale for each row that makes its largest element
    the format's."""
    rows, columns = matrix.shape
    wide = matrix.float()
    scales = wide.abs().amax(dim=1) / torch.finfo(torch.float8_e4m3fn).max
    # A row of zeros has any scale.
    codes = (wide / torch.where(scales > 0, scales, 1.0)[:, None]).to(torch.float8_e4m3fn)
    return CudaWeight(codes.contiguous(), rows, columns, scales=scales)


def quantised_weight(program: CudaProgram, groups: QuantisedGroups, columns: int) -> CudaWeight:
    """groups: a whole matrix of ``columns``, of which the last group may be padded. Packs with a program of its own."""
    form = groups.format
    rows, count, group = groups.codes.shape
    tiles = (-(-rows // TILE_OUTPUTS), -(-count * group // TILE_INPUTS), tile_bytes(form))
    storage = torch.zeros(tiles, dtype=torch.uint8, device=program.device)
    given = [part for part in (groups.codes, groups.scales, groups.offsets) if part is not None]
    codes, scales, *offsets = (part.to(program.device).contiguous() for part in given)
    packing = CudaProgram(program.library, program.device)
    packing.add(
        "pack_quantised",
        panels=storage,
        codes=codes,
        scales=scales,
        offsets=offsets[0] if offsets else None,
        rows=rows,
        groups=count,
        bits=form.bits,
        group=group,
    )
    packing.run()
    return CudaWeight(storage, rows, columns, form)


def from_cpu(program: CudaProgram, weight: PackedWeight | QuantisedWeight, dtype: torch.dtype) -> CudaWeight:
    """The same matrix; a plain one becomes ``dtype``."""
    if isinstance(weight, PackedWeight):
        return plain_weight(program, weight.unpack(), dtype)
    return quantised_weight(program, unpack(weight), weight.columns)


def unpack(weight: QuantisedWeight) -> QuantisedGroups:
    """The groups of a weight in the CPU library's panels (csrc/cpu/quantised.h)."""
    form = weight.format
    panels, count, _ = weight.storage.shape
    code_bytes = PANEL * form.group * form.bits // 8
    # [panel, group, 4 inputs, output, input]
    lines = weight.storage[:, :, :code_bytes].reshape(panels, count, -1, PANEL, 4)
    if form.bits == 4:
        lines = torch.cat([lines & 15, lines >> 4], dim=2)
    codes = lines.permute(0, 3, 1, 2, 4).reshape(panels * PANEL, count, form.group)
    halves = weight.storage[:, :, code_bytes:].contiguous().view(torch.float16)
    scales, *offsets = (
        halves[:, :, begin : begin + PANEL].transpose(1, 2).reshape(panels * PANEL, count)[: weight.rows]
        for begin in range(0, halves.shape[2], PANEL)
    )
    return QuantisedGroups(codes[: weight.rows], scales, offsets[0] if offsets else None, form.bits)
