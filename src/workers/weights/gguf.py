"""The tensors of a GGUF file, as groups of integers or dequantised to float32 as they are read; opened by
``source.open_source``."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.checkpoint.fields import shown
from shoal.checkpoint.gguf import BLOCK_SIZES, GgufFile, GgufTensor, GgufType
from shoal.cuda_ext.fp8 import Fp8Rows
from shoal.cuda_ext.quantised import QuantisedGroups, WeightFormat
from shoal.errors import ModelError
from shoal.workers.weights.dequantise import Bytes, Floats, dequantise
from shoal.workers.weights.groups import FORMATS, read_blocks

_CHUNK_ELEMENTS = 1 << 17
"""Elements dequantised at a time: their bytes and floats stay in a core's cache."""


class GgufSource:
    """A ``WeightSource``."""

    def __init__(self, path: Path) -> None:
        self._file = GgufFile(path)

    def names(self) -> frozenset[str]:
        return frozenset(self._file.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.tensor(name).shape

    def nbytes(self, name: str) -> int:
        return self._file.tensor(name).nbytes

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        tensor = self._file.tensor(name)
        if len(tensor.shape) == 1:
            return torch.from_numpy(self._part(tensor, slice(0, 1), rows or slice(None))[0])
        if len(tensor.shape) > 2:
            raise ModelError(
                f"{self._file.path}: tensor {shown(name)} has {len(tensor.shape)} dimensions, not 1 or 2"
            )
        return torch.from_numpy(self._part(tensor, rows or slice(None), columns or slice(None)))

    def format_of(self, name: str, columns: slice | None = None) -> WeightFormat | None:
        tensor = self._file.tensor(name)
        form = FORMATS.get(tensor.type)
        if form is None or len(tensor.shape) != 2:
            return None
        taken = range(tensor.shape[1])[columns or slice(None)]
        cut = taken.start % form.group or taken.stop % form.group
        return None if cut else form

    def read_groups(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> QuantisedGroups:
        tensor = self._file.tensor(name)
        form, (elements, size) = FORMATS[tensor.type], BLOCK_SIZES[tensor.type]
        row_range = range(tensor.rows)[rows or slice(None)]
        taken = range(tensor.shape[1])[columns or slice(None)]
        first, last = taken.start // elements, -(-taken.stop // elements)
        raw = self._file.raw(tensor.name, row_range.start, len(row_range))
        blocks = raw[:, first * size : last * size].reshape(-1, size)
        begin, end = (
            (taken.start - first * elements) // form.group,
            (taken.stop - first * elements) // form.group,
        )

        def part(array: NDArray[Any]) -> Tensor:
            by_row = array.reshape(len(row_range), -1, *array.shape[2:])
            return torch.from_numpy(np.ascontiguousarray(by_row[:, begin:end]))

        codes, scales, offsets = read_blocks(tensor.type, blocks)
        return QuantisedGroups(part(codes), part(scales), None if offsets is None else part(offsets), form.bits)

    def read_fp8(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Fp8Rows:
        raise ModelError(f"{self._file.path}: tensor {shown(name)} is not fp8")

    def cache_scale(self, attention: str, which: Literal["k", "v"], kv_heads: int) -> None:
        """The format has none."""

    def _part(self, tensor: GgufTensor, rows: slice, columns: slice) -> Floats:
        """float32 [rows, columns], made a chunk of rows at a time."""
        row_range = range(tensor.rows)[rows]
        column_range = range(tensor.shape[-1])[columns]
        part = np.empty((len(row_range), len(column_range)), np.float32)
        step = max(_CHUNK_ELEMENTS // tensor.shape[-1], 1)
        for done in range(0, len(row_range), step):
            chunk = part[done : done + step]
            raw = self._file.raw(tensor.name, row_range.start + done, len(chunk))
            _fill(chunk, raw, tensor.type, column_range)
        return part


def _fill(chunk: Floats, raw: Bytes, kind: GgufType, columns: range) -> None:
    """Some columns of some rows; where they cut a block, the whole block is made first."""
    elements, size = BLOCK_SIZES[kind]
    first, last = columns.start // elements, -(-columns.stop // elements)
    blocks = raw[:, first * size : last * size].reshape(-1, size)
    if chunk.shape[1] == (last - first) * elements:
        dequantise(kind, blocks, chunk.reshape(-1, elements))
        return
    whole = np.empty((len(chunk), (last - first) * elements), np.float32)
    dequantise(kind, blocks, whole.reshape(-1, elements))
    chunk[:] = whole[:, columns.start - first * elements :][:, : len(columns)]
