"""The tensors of a Hugging Face folder some of whose weights are fp8 (e4m3) with scales beside them; opened by
``source.open_source``.

``NAME.weight`` has its scales in ``NAME.weight_scale`` or ``NAME.weight_scale_inv``, which both are what its codes are
multiplied with: one, one a row, or one a block. Scales of an fp8 cache are beside the attention's projections.
"""

from math import prod
from typing import Final, Literal

import torch
from torch import Tensor

from shoal.checkpoint.fields import shown
from shoal.checkpoint.hf_quantization import Fp8Scheme
from shoal.cuda_ext.fp8 import FP8, Fp8, Fp8Rows, has_nan
from shoal.cuda_ext.quantised import QuantisedGroups
from shoal.errors import ModelError
from shoal.workers.weights.safetensors import SafetensorsSource

_REMEDY: Final = "download the model again"
_FP8_DTYPE: Final = "F8_E4M3"
_SCALES: Final = ("_scale", "_scale_inv")
_CACHE_SCALES: Final = ("{0}.{1}_scale", "{0}.{1}_proj.{1}_scale", "{0}.{1}_proj.output_scale")
"""Of keys or values, by the attention's prefix: of compressed-tensors, of modelopt, and of older compressed-tensors."""
_BESIDE: Final = ("input_scale", "output_scale", "q_scale", "k_scale", "v_scale")
"""Scales that are no weight's: of activations, and of the cache."""


class Fp8Source:
    """A ``WeightSource`` on top of the file's."""

    def __init__(self, file: SafetensorsSource, scheme: Fp8Scheme) -> None:
        self._file = file
        self._block = scheme.block
        names = file.names()
        fp8 = sorted(name for name in names if file.dtype(name) == _FP8_DTYPE)
        self._scales = {name: self._find_scales(name) for name in fp8}
        """fp8 weights and the names of their scales."""
        beside = {name for name in names if _is_beside(name, names)}
        self._names = names - beside - set(self._scales.values())

    def names(self) -> frozenset[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.shape(name)

    def nbytes(self, name: str) -> int:
        return prod(self.shape(name)) if name in self._scales else self._file.nbytes(name)

    def format_of(self, name: str, columns: slice | None = None) -> Fp8 | None:
        """Blocks have more than a scale a row: such weights are floats."""
        return FP8 if name in self._scales and not self._has_blocks(name) else None

    def read_groups(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> QuantisedGroups:
        return self._file.read_groups(name, rows, columns)

    def read_fp8(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Fp8Rows:
        codes, scales = self._read_codes(name, rows, columns), self._read_scales(name).flatten()
        own = scales.expand(len(codes)) if len(scales) == 1 else scales[rows or slice(None)]
        return Fp8Rows(codes, own.contiguous())

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        if name not in self._scales:
            return self._file.read(name, rows, columns)
        if not self._has_blocks(name):
            part = self.read_fp8(name, rows, columns)
            return part.codes.float() * part.scales[:, None]
        assert self._block is not None
        taken = [
            torch.arange(size)[part or slice(None)] // block
            for size, part, block in zip(self.shape(name), (rows, columns), self._block, strict=True)
        ]
        scales = self._read_scales(name)[taken[0]][:, taken[1]]
        return self._read_codes(name, rows, columns).float() * scales

    def cache_scale(self, attention: str, which: Literal["k", "v"], kv_heads: int) -> Tensor | None:
        names = self._file.names()
        found = [name for form in _CACHE_SCALES if (name := form.format(attention, which)) in names]
        if not found:
            return None
        scale = self._file.read(found[0]).float().flatten()
        if len(scale) not in (1, kv_heads):
            raise ModelError(
                f"tensor {shown(found[0])} has {len(scale)} scales, not one or one for each of {kv_heads} KV heads: "
                f"{_REMEDY}"
            )
        if not ((scale > 0) & scale.isfinite()).all():
            raise ModelError(f"tensor {shown(found[0])} has scales that are no positive numbers: {_REMEDY}")
        return scale.expand(kv_heads).contiguous()

    def _find_scales(self, name: str) -> str:
        """Checked against the weight's shape."""
        found = [name + ending for ending in _SCALES if name + ending in self._file.names()]
        shape = self._file.shape(name)
        if len(shape) != 2:
            raise ModelError(f"tensor {shown(name)} is fp8 and has the shape {shape}, not two dimensions")
        if not found:
            raise ModelError(f"tensor {shown(name)} is fp8 and has no {shown(name + _SCALES[0])}: {_REMEDY}")
        scales = self._file.shape(found[0])
        if scales not in (*_row_wise(shape), self._blocks_of(shape)):
            raise ModelError(
                f"tensor {shown(found[0])} has the shape {scales}, which does not fit a weight of {shape}: {_REMEDY}"
            )
        return found[0]

    def _blocks_of(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        return self._block and tuple(-(-n // size) for n, size in zip(shape, self._block, strict=True))

    def _has_blocks(self, name: str) -> bool:
        """Whether some row has several scales."""
        return self._file.shape(self._scales[name]) not in _row_wise(self._file.shape(name))

    def _read_codes(self, name: str, rows: slice | None, columns: slice | None) -> Tensor:
        codes = self._file.read_any(name, rows, columns)
        if has_nan(codes):
            raise ModelError(f"tensor {shown(name)} has elements that are not numbers: {_REMEDY}")
        return codes

    def _read_scales(self, name: str) -> Tensor:
        """float32, in the file's shape."""
        scales = self._file.read(self._scales[name]).float()
        if not ((scales >= 0) & scales.isfinite()).all():
            raise ModelError(
                f"tensor {shown(self._scales[name])} has scales that are no numbers from 0 on: {_REMEDY}"
            )
        return scales


def _row_wise(shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The shapes of a weight's scales where there is one, or one a row."""
    return (), (1,), (1, 1), (shape[0],), (shape[0], 1)


def _is_beside(name: str, names: frozenset[str]) -> bool:
    """Of a matrix, or of the attention that a key projection belongs to."""
    stem, _, ending = name.rpartition(".")
    return ending in _BESIDE and not names.isdisjoint((f"{stem}.weight", f"{stem}.k_proj.weight"))
