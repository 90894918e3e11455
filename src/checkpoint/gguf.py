"""The GGUF container, versions 2 and 3: metadata, the table of tensors, and their raw bytes.

Read by ``gguf_metadata.py`` (the description), the frontends (the tokenizer) and ``workers/weights/gguf.py``
(the weights). Layout: magic, version, two counts, key/value pairs, tensor table, padding, data; little-endian.
Nothing in the file is trusted: every count is held against the bytes that are left before it is acted on.
Tensor bytes are read, not mapped, so a file that shrinks underneath gives an error instead of SIGBUS.
"""

import mmap
import os
import struct
from enum import IntEnum
from math import prod
from pathlib import Path
from typing import Self

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from shoal.checkpoint.fields import shown
from shoal.errors import ModelError

_MAGIC = b"GGUF"
_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 20
_MAX_STRINGS = 1 << 22
_MAX_NAME_BYTES = 1 << 16
_MAX_TENSOR_NAME_BYTES = 256
_MAX_DIMENSIONS = 4
_MAX_ELEMENTS = 1 << 40
_MAX_NESTED_ARRAYS = 3
_DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 20
_DAMAGED = "the file is damaged or incomplete; download it again"


class GgufType(IntEnum):
    """The tensor types that can be read, by their number in the file."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    BF16 = 30


BLOCK_SIZES: dict[GgufType, tuple[int, int]] = {
    GgufType.F32: (1, 4),
    GgufType.F16: (1, 2),
    GgufType.BF16: (1, 2),
    GgufType.Q4_0: (32, 18),
    GgufType.Q4_1: (32, 20),
    GgufType.Q5_0: (32, 22),
    GgufType.Q5_1: (32, 24),
    GgufType.Q8_0: (32, 34),
    GgufType.Q4_K: (256, 144),
    GgufType.Q5_K: (256, 176),
    GgufType.Q6_K: (256, 210),
}
"""Elements and bytes of one block of each type; a row is a whole number of blocks."""

_OTHER_TYPES = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, np.dtype[np.generic]] = {
    0: np.dtype("<u1"), 1: np.dtype("<i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"), 4: np.dtype("<u4"),
    5: np.dtype("<i4"), 6: np.dtype("<f4"), _BOOL: np.dtype("<u1"), 10: np.dtype("<u8"), 11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}  # fmt: skip


class GgufTensor(Struct, frozen=True, kw_only=True):
    """Where one tensor lies in the file."""

    name: str
    type: GgufType
    shape: tuple[int, ...]
    """Outermost dimension first, as torch has it; a row is the last dimension."""
    offset: int
    """In bytes from the start of the file."""
    nbytes: int

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        elements, size = BLOCK_SIZES[self.type]
        return self.shape[-1] // elements * size


class GgufFile:
    """An open GGUF file, whole and consistent as far as its header tells.

    ``metadata`` holds plain Python scalars, strings, lists of strings, and numpy arrays for lists of numbers.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self._file = self.path.open("rb", buffering=0)
            size = os.fstat(self._file.fileno()).st_size
            if size < 24:
                raise ModelError(f"{self.path}: {size} bytes are too few for a GGUF file: {_DAMAGED}")
            with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                header = _Header(self.path, content)
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{self.path}: cannot be read ({error}): check the file and its permissions"
            ) from error
        self.version = header.version
        self.metadata = header.metadata
        self.tensors = header.tensors

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def tensor(self, name: str) -> GgufTensor:
        """The table's entry for a tensor that the model needs."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise ModelError(f"{self.path}: tensor {shown(name)} is missing: convert the model again")
        return tensor

    def raw(self, name: str, first_row: int, row_count: int) -> NDArray[np.uint8]:
        """The bytes of some rows, uint8 [row_count, bytes a row]; read-only."""
        tensor = self.tensor(name)
        if not 0 <= first_row <= first_row + row_count <= tensor.rows:
            raise ValueError(f"rows {first_row} to {first_row + row_count} of {name}, which has {tensor.rows}")
        content = self._read(tensor, first_row * tensor.row_bytes, row_count * tensor.row_bytes)
        return np.frombuffer(content, np.uint8).reshape(row_count, tensor.row_bytes)

    def _read(self, tensor: GgufTensor, start: int, count: int) -> bytes:
        """One system call gives at most 2 GiB, so it may take several."""
        parts: list[bytes] = []
        while count > 0:
            try:
                part = os.pread(self._file.fileno(), count, tensor.offset + start)
            except OSError as error:
                raise ModelError(
                    f"{self.path}: tensor {shown(tensor.name)}: {error.strerror}: {_DAMAGED}"
                ) from error
            if not part:
                raise ModelError(f"{self.path}: tensor {shown(tensor.name)} ends too early: {_DAMAGED}")
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class _Header:
    """Parses everything before the tensor data, front to back."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path = path
        self._content = content
        self._size = len(content)
        self._at = 0
        self.metadata: dict[str, object] = {}
        self.tensors: dict[str, GgufTensor] = {}
        self.version = self._read_version()
        tensor_count, key_count = self._read_counts()
        for _ in range(key_count):
            self._read_pair()
        self._refuse_split()
        self._read_tensors(tensor_count)

    def _error(self, problem: str) -> ModelError:
        return ModelError(f"{self._path}: {problem}")

    def _read_version(self) -> int:
        if self._take(4, "the magic number") != _MAGIC:
            raise self._error(
                "does not start with GGUF: this is not a GGUF file, or it is damaged; download it again"
            )
        version = self._unsigned(4, "the version")
        if version not in (2, 3):
            cause = "big-endian" if version & 0xFFFF == 0 and version else f"version {version}"
            raise self._error(
                f"is a {cause} GGUF file, of which only little-endian 2 and 3 are read: convert it again"
            )
        return version

    def _read_counts(self) -> tuple[int, int]:
        tensors = self._unsigned(8, "the tensor count")
        keys = self._unsigned(8, "the metadata count")
        if tensors > min(_MAX_TENSORS, self._size // 32):
            raise self._error(f"the tensor count {tensors} is more than the file can hold: {_DAMAGED}")
        if keys > min(_MAX_KEYS, self._size // 13):
            raise self._error(f"the metadata count {keys} is more than the file can hold: {_DAMAGED}")
        return tensors, keys

    def _read_pair(self) -> None:
        key = self._text("a metadata key", _MAX_NAME_BYTES)
        if key in self.metadata:
            raise self._error(f"metadata key {shown(key)} appears twice: {_DAMAGED}")
        field = f"metadata {shown(key)}"
        self.metadata[key] = self._value(self._unsigned(4, field), field)

    def _value(self, kind: int, field: str, depth: int = 0) -> object:
        if kind == _STRING:
            return self._text(field, self._size)
        if kind == _ARRAY:
            return self._array(field, depth + 1)
        if kind not in _SCALARS:
            raise self._error(f"{field} has the unknown type {kind}: {_DAMAGED}")
        value = np.frombuffer(self._take(_SCALARS[kind].itemsize, field), _SCALARS[kind])[0].item()
        return bool(value) if kind == _BOOL else value

    def _array(self, field: str, depth: int) -> object:
        kind = self._unsigned(4, field)
        count = self._unsigned(8, field)
        if kind in _SCALARS:
            content = self._take(count * _SCALARS[kind].itemsize, field)
            numbers = np.frombuffer(content, _SCALARS[kind])
            return numbers != 0 if kind == _BOOL else numbers
        if count > min(_MAX_STRINGS, (self._size - self._at) // 8):
            raise self._error(f"{field} claims {count} elements, more than it can have: {_DAMAGED}")
        if kind == _STRING:
            return self._texts(field, count)
        if depth > _MAX_NESTED_ARRAYS:
            raise self._error(f"{field} has lists in lists in lists: {_DAMAGED}")
        return [self._value(kind, field, depth) for _ in range(count)]

    def _texts(self, field: str, count: int) -> list[str]:
        """The one hot loop of the header: a vocabulary has up to some 300,000 entries, merges twice that."""
        content, at, size = self._content, self._at, self._size
        length_of = struct.Struct("<Q").unpack_from
        texts: list[str] = []
        try:
            for _ in range(count):
                start = at + 8
                at = start + length_of(content, at)[0]
                if at > size:
                    raise self._error(f"{field} has a string that runs past the end of the file: {_DAMAGED}")
                texts.append(content[start:at].decode())
        except struct.error as error:
            raise self._error(f"{field} runs past the end of the file: {_DAMAGED}") from error
        except UnicodeDecodeError as error:
            raise self._error(
                f"{field} has a string that is not UTF-8, number {len(texts)}: {_DAMAGED}"
            ) from error
        self._at = at
        return texts

    def _refuse_split(self) -> None:
        parts = self.metadata.get("split.count", 1)
        if not isinstance(parts, int) or parts > 1:
            raise self._error(
                f"is one of {shown(parts)} parts of a split model (split.count): merge them with llama-gguf-split"
            )

    def _read_tensors(self, count: int) -> None:
        alignment = self._alignment()
        entries = [self._read_entry(alignment) for _ in range(count)]
        start = -(-self._at // alignment) * alignment
        end = 0
        for entry in sorted(entries, key=lambda entry: entry.offset):
            field = f"tensor {shown(entry.name)}"
            if start + entry.offset + entry.nbytes > self._size:
                raise self._error(f"{field} runs past the end of the file: {_DAMAGED}")
            if entry.offset < end:
                raise self._error(f"{field} overlaps another tensor: {_DAMAGED}")
            end = entry.offset + entry.nbytes
        for entry in entries:
            if entry.name in self.tensors:
                raise self._error(f"tensor {shown(entry.name)} appears twice: {_DAMAGED}")
            self.tensors[entry.name] = GgufTensor(
                name=entry.name,
                type=entry.type,
                shape=entry.shape,
                offset=start + entry.offset,
                nbytes=entry.nbytes,
            )

    def _alignment(self) -> int:
        value = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_ALIGNMENT:
            raise self._error(f"general.alignment is {shown(value)}, not 1 to {_MAX_ALIGNMENT}: {_DAMAGED}")
        if value & (value - 1):
            raise self._error(f"general.alignment is {value}, not a power of two: {_DAMAGED}")
        return value

    def _read_entry(self, alignment: int) -> GgufTensor:
        """One line of the tensor table; its offset still counts from the start of the data."""
        name = self._text("a tensor name", _MAX_TENSOR_NAME_BYTES)
        field = f"tensor {shown(name)}"
        shape = self._shape(field)
        kind = self._type(field)
        elements, size = BLOCK_SIZES[kind]
        if shape[-1] % elements:
            raise self._error(
                f"{field} has rows of {shape[-1]}, no multiple of {kind.name}'s {elements}: {_DAMAGED}"
            )
        offset = self._unsigned(8, field)
        if offset % alignment:
            raise self._error(f"{field} starts at {offset}, not a multiple of {alignment}: {_DAMAGED}")
        return GgufTensor(
            name=name, type=kind, shape=shape, offset=offset, nbytes=prod(shape) // elements * size
        )

    def _shape(self, field: str) -> tuple[int, ...]:
        count = self._unsigned(4, field)
        if not 1 <= count <= _MAX_DIMENSIONS:
            raise self._error(f"{field} has {count} dimensions, not 1 to {_MAX_DIMENSIONS}: {_DAMAGED}")
        shape = tuple(reversed(struct.unpack(f"<{count}Q", self._take(8 * count, field))))
        if min(shape) < 1 or prod(shape) > _MAX_ELEMENTS:
            raise self._error(f"{field} has the impossible shape {shown(shape)}: {_DAMAGED}")
        return shape

    def _type(self, field: str) -> GgufType:
        number = self._unsigned(4, field)
        try:
            return GgufType(number)
        except ValueError as error:
            known = ", ".join(kind.name for kind in GgufType)
            name = _OTHER_TYPES.get(number, "unknown")
            raise self._error(
                f"{field} has type {number} ({name}): take a file whose tensors are among {known}"
            ) from error

    def _text(self, field: str, limit: int) -> str:
        length = self._unsigned(8, f"the length of {field}")
        if length > limit:
            raise self._error(f"{field} claims {length} bytes, more than it can have: {_DAMAGED}")
        try:
            return self._take(length, field).decode()
        except UnicodeDecodeError as error:
            raise self._error(f"{field} is not UTF-8: {_DAMAGED}") from error

    def _unsigned(self, size: int, field: str) -> int:
        return int.from_bytes(self._take(size, field), "little")

    def _take(self, count: int, field: str) -> bytes:
        if count > self._size - self._at:
            raise self._error(f"{field} runs past the end of the file: {_DAMAGED}")
        start, self._at = self._at, self._at + count
        return self._content[start : self._at]
