"""How a weight matrix lies in memory so that the processor streams it. Made by ``workers.load``, read by ``ops``."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from shoal.cuda_ext.binding import library
from shoal.cuda_ext.program import Program, no_twin
from shoal.cuda_ext.weight_memory import allocate

PANEL = 16
"""Rows that lie side by side."""
_WORD_BYTES = 4


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A matrix [rows, columns] of float32 or bfloat16; rows are outputs, or token ids.

    ``storage`` is [panels of 16 rows, words of columns, 16, columns a word], padded with zeros: a word is one
    float32 or two bfloat16. Where the torch twins run it is the plain matrix.
    """

    storage: Tensor
    rows: int
    columns: int

    @classmethod
    def empty(cls, rows: int, columns: int, dtype: torch.dtype) -> "PackedWeight":
        """To be written whole."""
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"weights of {dtype} are not packed")
        if library() is None:
            return cls(allocate((rows, columns), dtype), rows, columns)
        step = _WORD_BYTES // dtype.itemsize
        panels = allocate((-(-rows // PANEL), -(-columns // step), PANEL, step), dtype)
        return cls(panels, rows, columns)

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    @property
    def is_plain(self) -> bool:
        return self.storage.dim() == 2

    def write(self, first_row: int, matrix: Tensor) -> None:
        """The rows from ``first_row`` on, a multiple of 16; ``matrix`` ends with a whole panel or with the last
        row."""
        last_row = first_row + len(matrix)
        if matrix.shape[1] != self.columns or first_row % PANEL or last_row > self.rows:
            raise ValueError(f"rows {first_row} to {last_row} do not fit a packed {self.rows} × {self.columns}")
        if last_row % PANEL and last_row != self.rows:
            raise ValueError(f"rows {first_row} to {last_row} end inside of a panel")
        matrix = matrix.to(self.dtype)
        if self.is_plain or library() is None:
            self.storage[first_row:last_row] = matrix
            return
        words = self.storage.shape[1]
        padded = functional.pad(matrix, (0, words * self.storage.shape[3] - self.columns)).contiguous()
        into = self.storage[first_row // PANEL :]
        program = Program()
        program.add("pack_weight", [into, padded, len(matrix), words, words], no_twin)
        program.run()

    def unpack(self) -> Tensor:
        """The plain matrix, for the torch twins and for tests."""
        if self.is_plain:
            return self.storage
        return self.storage.transpose(1, 2).flatten(2).flatten(0, 1)[: self.rows, : self.columns]


def pack_weight(matrix: Tensor) -> PackedWeight:
    """matrix: [rows, columns]."""
    rows, columns = matrix.shape
    packed = PackedWeight.empty(rows, columns, matrix.dtype)
    packed.write(0, matrix)
    return packed
