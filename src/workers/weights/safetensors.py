"""The tensors of a Hugging Face folder's safetensors, one file or several; opened by ``source.open_source``.

A file is mapped for the time of one read only, so the pages that a rank has touched never add up.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from msgspec import Struct
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shoal.checkpoint.fields import Fields, read_json_object, shown
from shoal.cuda_ext.fp8 import Fp8Rows
from shoal.cuda_ext.quantised import QuantisedGroups
from shoal.errors import ModelError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_REMEDY = "download the model again"
_DTYPES = {"F32": 4, "F16": 2, "BF16": 2}
"""Bytes an element of the types that weights may have."""


class _Entry(Struct, frozen=True):
    """Where one tensor is, and what it is."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


class SafetensorsSource:
    """A ``WeightSource``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._entries: dict[str, _Entry] = {}
        for path, names in _files(folder).items():
            self._add(path, names)

    def names(self) -> frozenset[str]:
        return frozenset(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def nbytes(self, name: str) -> int:
        entry = self._weight(name)
        return prod(entry.shape) * _DTYPES[entry.dtype]

    def dtype(self, name: str) -> str:
        """As the file names it."""
        return self._entry(name).dtype

    def format_of(self, name: str, columns: slice | None = None) -> None:
        """Weights of these types are floats."""

    def read_groups(
        self, name: str, rows: slice | None = None, columns: slice | None = None
    ) -> QuantisedGroups:
        raise ModelError(f"tensor {shown(name)} has no groups of integers")

    def read_fp8(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Fp8Rows:
        raise ModelError(f"tensor {shown(name)} has no scales beside it")

    def cache_scale(self, attention: str, which: Literal["k", "v"], kv_heads: int) -> None:
        """Plain weights come without."""

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        self._weight(name)
        return self.read_any(name, rows, columns)

    def read_any(self, name: str, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        """The same, of any type."""
        entry = self._entry(name)
        if columns is not None and len(entry.shape) < 2:
            raise ModelError(
                f"{entry.path}: tensor {shown(name)} has the shape {entry.shape}, not two dimensions"
            )
        with _opened(entry.path) as file:
            part: Tensor = (
                file.get_tensor(name) if not entry.shape else file.get_slice(name)[rows or slice(None)]
            )
            if columns is not None:
                part = part[:, columns]
            return part.clone(memory_format=torch.contiguous_format)

    def _add(self, path: Path, names: frozenset[str] | None) -> None:
        """Takes note of the tensors of one file: those that the index puts there, or all."""
        with _opened(path) as file:
            present = frozenset(file.keys())
            for name in sorted((present if names is None else names) - present):
                raise ModelError(
                    f"{path}: tensor {shown(name)}, which {_INDEX} puts there, is missing: {_REMEDY}"
                )
            for name in present if names is None else names:
                part = file.get_slice(name)
                self._entries[name] = _Entry(path, tuple(part.get_shape()), part.get_dtype())

    def _entry(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise ModelError(f"{self._folder}: tensor {shown(name)} is missing from the weights: {_REMEDY}")
        return entry

    def _weight(self, name: str) -> _Entry:
        entry = self._entry(name)
        if entry.dtype not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise ModelError(f"{entry.path}: tensor {shown(name)} is {entry.dtype}, not supported: {known} are")
        return entry


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A mapped file; whatever is wrong with it becomes one ModelError."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (OSError, SafetensorError) as error:
        cause = " ".join(str(error).split())
        raise ModelError(f"{path}: cannot be read ({cause}): {_REMEDY}") from error


def _files(folder: Path) -> dict[Path, frozenset[str] | None]:
    """The files to read, each with the tensors to take from it; None: all."""
    if (folder / _SINGLE).exists():
        return {folder / _SINGLE: None}
    if (folder / _INDEX).exists():
        return _shards(folder)
    if any(folder.glob("pytorch_model*.bin")):
        raise ModelError(
            f"{folder}: has only pytorch_model.bin, a pickle, which is never read: convert the model to safetensors"
        )
    raise ModelError(f"{folder}: has neither {_SINGLE} nor {_INDEX}: download the model's weights")


def _shards(folder: Path) -> dict[Path, frozenset[str] | None]:
    index = Fields(str(folder / _INDEX), read_json_object(folder / _INDEX))
    weight_map = index.nested("weight_map")
    if weight_map is None or not weight_map.values:
        raise index.error("weight_map", f"is missing or empty: {_REMEDY}")
    names: dict[str, set[str]] = {}
    for name in weight_map.values:
        names.setdefault(weight_map.text(name), set()).add(name)
    missing = sorted(file for file in names if not _is_plain(file) or not (folder / file).exists())
    for file in missing:
        if not _is_plain(file):
            raise index.error("weight_map", f"names {shown(file)}, which is no file of this folder: {_REMEDY}")
    if missing:
        raise ModelError(
            f"{folder}: {len(missing)} of {len(names)} weight files missing ({missing[0]}): {_REMEDY}"
        )
    return {folder / file: frozenset(names[file]) for file in sorted(names)}


def _is_plain(name: str) -> bool:
    """A file name that cannot lead out of its folder."""
    return name.endswith(".safetensors") and name.isprintable() and not set(name) & set("/\\:")
