"""Messages to bytes and back: typed codecs, the schema fingerprint, int32 packing.

On the wire each message is one frame: the receiver's boot id (uint64, little-endian; 0 before it is known),
then MessagePack. A frame for another boot id is stale and decodes to ``None``.
"""

import hashlib
import secrets
from array import array
from collections.abc import Iterable
from typing import Any, Final, Generic, TypeVar

import msgspec

from shoal import messages

T = TypeVar("T")
_ENCODER = msgspec.msgpack.Encoder()
_BOOT_ID_BYTES: Final = 8


def new_boot_id() -> int:
    """A random nonzero 63-bit id of this process's life (it fits a signed MessagePack integer)."""
    return secrets.randbits(62) + 1


def encode(message: messages.Message, receiver_boot_id: int) -> bytes:
    """The frame of ``message`` for the process whose boot id is given (0: any)."""
    buffer = bytearray(receiver_boot_id.to_bytes(_BOOT_ID_BYTES, "little"))
    _ENCODER.encode_into(message, buffer, -1)
    return bytes(buffer)


class Inbox(Generic[T]):
    """Decodes one direction's frames; counts what it drops and never raises on what a peer sent."""

    def __init__(self, union: Any, boot_id: int) -> None:
        self.stale = 0
        self.malformed = 0
        self._boot_id = boot_id
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(union)

    def decode(self, frame: bytes) -> T | None:
        """The message, or None for a stale or malformed frame."""
        if len(frame) <= _BOOT_ID_BYTES:
            self.malformed += 1
            return None
        receiver = int.from_bytes(frame[:_BOOT_ID_BYTES], "little")
        if receiver not in (0, self._boot_id):
            self.stale += 1
            return None
        try:
            return self._decoder.decode(memoryview(frame)[_BOOT_ID_BYTES:])
        except (msgspec.MsgspecError, UnicodeDecodeError):
            self.malformed += 1
            return None


def pack_ids(ids: Iterable[int]) -> bytes:
    """int32 little-endian bytes of ``ids``."""
    return array("i", ids).tobytes()


def unpack_ids(raw: bytes) -> list[int]:
    """The integers of int32 little-endian bytes. Raises ValueError where the length is not a multiple of 4."""
    if len(raw) % 4:
        raise ValueError(f"an int32 array cannot have {len(raw)} bytes")
    ids = array("i")
    ids.frombytes(raw)
    return ids.tolist()


def fingerprint() -> str:
    """A digest of every struct in messages.py: names, fields, types, defaults. Both ends must have the same."""
    structs = [
        value
        for value in vars(messages).values()
        if isinstance(value, type) and issubclass(value, msgspec.Struct)
    ]
    described = "\n".join(_describe(struct) for struct in sorted(structs, key=lambda struct: struct.__name__))
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _describe(struct: type[msgspec.Struct]) -> str:
    fields = (f"{field.name}:{field.type!r}={field.default!r}" for field in msgspec.structs.fields(struct))
    return f"{struct.__name__}({', '.join(fields)})"
