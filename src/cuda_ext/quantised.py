"""Integers for weights and activations: how they lie in memory, and how tensors become them.

The weights are made by ``workers.load``, the activations by the operators; ``ops`` hands both to the library.
csrc/cpu/quantised.h has the layouts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.cuda_ext.program import Program, no_twin
from shoal.cuda_ext.weight_memory import allocate

PANEL = 16
"""Outputs that lie side by side."""
GROUP = 32
"""Activations under one scale."""
_GROUP_BYTES = GROUP + 20
"""Of a group of them (csrc/cpu/quantised.h)."""
_OUTLIER_BYTES = 4
_PLACES = 16


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """W8: ``bits`` 8, groups of 16 or 32, codes from −128 to 127. W4: ``bits`` 4, groups of 32, codes from 0 to 15 with
    offsets, from −8 to 7 without. A weight is scale · code + offset."""

    bits: int
    group: int
    has_offset: bool

    def __post_init__(self) -> None:
        if (self.bits, self.group) not in ((8, 16), (8, 32), (4, 32)):
            raise ValueError(f"there are no weights of {self.bits} bits in groups of {self.group}")

    @property
    def zero(self) -> int:
        """What is stored for the code 0: codes are stored unsigned."""
        return 128 if self.bits == 8 else 0 if self.has_offset else 8

    @property
    def block_bytes(self) -> int:
        """One group of one panel."""
        return PANEL * self.group * self.bits // 8 + 2 * PANEL * (1 + self.has_offset)

    def groups(self, columns: int) -> int:
        """Of a row; a whole number of activation groups."""
        return -(-columns // GROUP) * GROUP // self.group


@dataclass(frozen=True, slots=True)
class QuantisedGroups:
    """A matrix as a checkpoint has it. codes: uint8 [rows, groups, group], each plus the format's zero; scales and
    offsets: float16 [rows, groups]."""

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None
    bits: int

    @property
    def format(self) -> WeightFormat:
        return WeightFormat(self.bits, self.codes.shape[2], self.offsets is not None)

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def columns(self) -> int:
        return self.codes.shape[1] * self.codes.shape[2]

    def take(self, rows: Tensor) -> "QuantisedGroups":
        """The given rows, in the given order."""
        offsets = None if self.offsets is None else self.offsets[rows]
        return QuantisedGroups(self.codes[rows], self.scales[rows], offsets, self.bits)

    def dequantise(self) -> Tensor:
        """float32 [rows, columns]."""
        values = (self.codes.float() - self.format.zero) * self.scales.float().unsqueeze(2)
        if self.offsets is not None:
            values += self.offsets.float().unsqueeze(2)
        return values.flatten(1)


def join(parts: list[QuantisedGroups]) -> QuantisedGroups:
    """Matrices of one format, one below the other."""
    offsets = [part.offsets for part in parts if part.offsets is not None]
    return QuantisedGroups(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(offsets) if offsets else None,
        parts[0].bits,
    )


def quantise_weight(matrix: Tensor, bits: int) -> QuantisedGroups:
    """Groups of 32 columns of a float matrix [rows, columns] to the nearest codes: W8 symmetric, W4 between each
    group's least and largest weight. The last group is padded with zeros."""
    rows, columns = matrix.shape
    padded = torch.nn.functional.pad(matrix.float(), (0, -columns % GROUP)).view(rows, -1, GROUP)
    if bits == 8:
        scales = (padded.abs().amax(2) / 127).half()
        codes = _nearest(padded, scales, -127, 127) + 128
        return QuantisedGroups(codes.to(torch.uint8), scales, None, 8)
    low = padded.amin(2)
    offsets = low.half()
    scales = ((padded.amax(2) - low) / 15).half()
    codes = _nearest(padded - offsets.float().unsqueeze(2), scales, 0, 15)
    return QuantisedGroups(codes.to(torch.uint8), scales, offsets, 4)


def _nearest(values: Tensor, scales: Tensor, least: int, most: int) -> Tensor:
    wide = scales.float().unsqueeze(2)
    return torch.where(wide == 0, 0.0, values / wide).round().clamp(least, most)


@dataclass(frozen=True, slots=True)
class QuantisedWeight:
    """A matrix [rows, columns] in panels; rows are outputs, or token ids. ``storage``: uint8."""

    storage: Tensor
    rows: int
    columns: int
    format: WeightFormat

    @classmethod
    def empty(cls, rows: int, columns: int, form: WeightFormat) -> "QuantisedWeight":
        """Zeros, to be written whole."""
        panels = -(-rows // PANEL)
        storage = allocate((panels, form.groups(columns), form.block_bytes), torch.uint8)
        return cls(storage, rows, columns, form)

    def halves(self) -> "tuple[QuantisedWeight, QuantisedWeight]":
        """The first rows and as many behind them, where each half is whole panels; they share this one's memory."""
        rows, panels = self.rows // 2, self.rows // 2 // PANEL
        if panels * 2 * PANEL != self.rows:
            raise ValueError(f"{self.rows} rows have no halves of whole panels")
        return (
            QuantisedWeight(self.storage[:panels], rows, self.columns, self.format),
            QuantisedWeight(self.storage[panels:], rows, self.columns, self.format),
        )

    def write(self, first_row: int, groups: QuantisedGroups) -> None:
        """The rows from ``first_row`` on, a multiple of 16."""
        form = self.format
        if groups.format != form or first_row % PANEL or first_row + groups.rows > self.rows:
            raise ValueError(f"{groups.format} at row {first_row} does not fit {form} of {self.rows} rows")
        if groups.codes.shape[1] != form.groups(self.columns):
            codes, scales, offsets = _padded(groups, form.groups(self.columns))
        else:
            codes, scales, offsets = groups.codes, groups.scales, groups.offsets
        into = self.storage[first_row // PANEL :]
        program = Program()
        program.add(
            "pack_quantised",
            [
                into,
                codes.contiguous(),
                scales.contiguous(),
                None if offsets is None else offsets.contiguous(),
                groups.rows,
                codes.shape[1],
                form.bits,
                form.group,
            ],
            no_twin,
        )
        program.run()


def _padded(groups: QuantisedGroups, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Groups of weight zero behind each row's: activations come in groups of 32, which may be two of the weight's."""
    missing = count - groups.codes.shape[1]
    pad = torch.nn.functional.pad
    codes = pad(groups.codes, (0, 0, 0, missing), value=groups.format.zero)
    offsets = None if groups.offsets is None else pad(groups.offsets, (0, missing))
    return codes, pad(groups.scales, (0, missing)), offsets


def pack_quantised(groups: QuantisedGroups, columns: int) -> QuantisedWeight:
    """groups: a whole matrix of ``columns``, of which the last group may be padded."""
    packed = QuantisedWeight.empty(groups.rows, columns, groups.format)
    packed.write(0, groups)
    return packed


@dataclass(frozen=True, slots=True)
class TileRows:
    """Activations [rows, columns] in bfloat16 as tiles of AMX take them, 16 rows at a time: bfloat16 [tiles, strips of
    32 columns, 16 pairs of columns, 16 rows, 2]; of a single row the pairs of a strip follow each other."""

    storage: Tensor
    columns: int

    @classmethod
    def empty(cls, rows: int, columns: int) -> "TileRows":
        """Zeros, for up to so many rows."""
        strips = -(-columns // GROUP)
        return cls(torch.zeros(-(-rows // PANEL), strips, PANEL, PANEL, 2, dtype=torch.bfloat16), columns)

    @property
    def rows(self) -> int:
        """How many there is room for."""
        return self.storage.shape[0] * PANEL

    def widen(self, rows: int) -> Tensor:
        """float32 [rows, columns] of what was written as so many rows, for tests."""
        if rows == 1:
            return self.storage[0].flatten(1)[:, :GROUP].reshape(1, -1)[:, : self.columns].float()
        return self.storage.permute(0, 3, 1, 2, 4).reshape(self.rows, -1)[:rows, : self.columns].float()


@dataclass(frozen=True, slots=True)
class QuantisedRows:
    """Activations [rows, columns] as codes of 8 bits with one scale for each 32, and outliers apart: uint8 [rows, bytes
    of a row]."""

    storage: Tensor
    columns: int

    @classmethod
    def empty(cls, rows: int, columns: int) -> "QuantisedRows":
        groups = -(-columns // GROUP)
        row_bytes = -(-(groups * (_GROUP_BYTES + _OUTLIER_BYTES) + -(-groups // _PLACES) * _PLACES) // 64) * 64
        return cls(torch.zeros(rows, row_bytes, dtype=torch.uint8), columns)

    def dequantise(self) -> Tensor:
        """float64 [rows, columns], for tests."""
        groups = -(-self.columns // GROUP)
        apart, places = groups * _GROUP_BYTES, groups * (_GROUP_BYTES + _OUTLIER_BYTES)
        records = self.storage[:, :apart].reshape(-1, groups, _GROUP_BYTES)
        scales = records[:, :, GROUP : GROUP + 4].contiguous().view(torch.float32)
        values = records[:, :, :GROUP].view(torch.int8).double() * scales
        outliers = self.storage[:, apart:places].contiguous().view(torch.float32).double()
        at = self.storage[:, places : places + groups].long()
        is_apart = torch.arange(GROUP) == at.unsqueeze(2)
        return torch.where(is_apart, outliers.unsqueeze(2), values).flatten(1)[:, : self.columns]
