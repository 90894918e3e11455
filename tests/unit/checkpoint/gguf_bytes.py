"""Builds small GGUF files byte by byte, right or deliberately wrong, for the tests of the reader."""

import struct
from dataclasses import dataclass, field
from math import prod

import numpy as np

from shoal.checkpoint.gguf import BLOCK_SIZES, GgufType

UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 5, 6, 7, 8, 9, 10
_PACKED = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


def text(value: str | bytes) -> bytes:
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(content)) + content


def array(kind: int, items: list[bytes], count: int | None = None) -> bytes:
    return struct.pack("<IQ", kind, len(items) if count is None else count) + b"".join(items)


def packed(kind: int, value: object) -> bytes:
    """A metadata value of the given type; arrays are given as bytes already."""
    if isinstance(value, bytes):
        return value
    return text(str(value)) if kind == STRING else struct.pack(_PACKED[kind], value)


@dataclass
class Tensor:
    name: str
    type: int
    shape: tuple[int, ...]
    data: bytes
    offset: int | None = None


def random_tensor(rng: np.random.Generator, name: str, kind: GgufType, shape: tuple[int, ...]) -> Tensor:
    """Random bytes of the right number; scales may be anything, infinities included."""
    elements, size = BLOCK_SIZES[kind]
    return Tensor(name, kind, shape, rng.bytes(prod(shape) // elements * size))


@dataclass
class Gguf:
    metadata: list[tuple[str | bytes, int, object]] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    magic: bytes = b"GGUF"
    version: int = 3
    alignment: int = 32
    key_count: int | None = None
    tensor_count: int | None = None

    def build(self) -> bytes:
        counts = (
            len(self.tensors) if self.tensor_count is None else self.tensor_count,
            len(self.metadata) if self.key_count is None else self.key_count,
        )
        header = self.magic + struct.pack("<IQQ", self.version, *counts)
        for key, kind, value in self.metadata:
            header += text(key) + struct.pack("<I", kind) + packed(kind, value)
        data = b""
        for tensor in self.tensors:
            data += bytes(-len(data) % self.alignment)
            offset = len(data) if tensor.offset is None else tensor.offset
            header += text(tensor.name) + struct.pack("<I", len(tensor.shape))
            header += struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
            header += struct.pack("<IQ", tensor.type, offset)
            data += tensor.data
        return header + bytes(-len(header) % self.alignment) + data
