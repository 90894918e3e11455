"""Matrices of fp8 (e4m3) whose rows are scaled, as checkpoints have them; ``cuda_weight`` brings them to a device."""

from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

FP8: Final = "fp8"
Fp8 = Literal["fp8"]
"""The format of such a weight, where others have a ``WeightFormat``."""


@dataclass(frozen=True, slots=True)
class Fp8Rows:
    """codes: float8_e4m3fn [rows, columns] without NaN; scales: float32 [rows], what each row is multiplied with."""

    codes: Tensor
    scales: Tensor

    @staticmethod
    def join(parts: "list[Fp8Rows]") -> "Fp8Rows":
        """One below the other."""
        codes = torch.cat([part.codes.view(torch.uint8) for part in parts])
        return Fp8Rows(codes.view(torch.float8_e4m3fn), torch.cat([part.scales for part in parts]))

    def take(self, rows: Tensor) -> "Fp8Rows":
        """Those, in that order."""
        codes = self.codes.view(torch.uint8)[rows]
        return Fp8Rows(codes.view(torch.float8_e4m3fn), self.scales[rows])


def has_nan(codes: Tensor) -> bool:
    """codes: float8_e4m3fn."""
    return bool((codes.view(torch.uint8) & 0x7F == 0x7F).any())


def round_rows(matrix: Tensor) -> Fp8Rows:
    """matrix: [rows, columns]. Rounded to e4m3, with a scale for each row that makes its largest element the
    format's."""
    wide = matrix.float()
    scales = wide.abs().amax(dim=1) / torch.finfo(torch.float8_e4m3fn).max
    # A row of zeros has any scale.
    codes = (wide / torch.where(scales > 0, scales, 1.0)[:, None]).to(torch.float8_e4m3fn)
    return Fp8Rows(codes.contiguous(), scales)
