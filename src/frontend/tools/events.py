"""What a parser of tool calls finds in an answer, in the order in which it stands there."""

from msgspec import Struct


class Said(Struct, frozen=True):
    """Text that belongs to no call."""

    text: str


class Began(Struct, frozen=True):
    """A call of a function that the request allows."""

    name: str


class Argued(Struct, frozen=True):
    """More of the open call's arguments, as JSON text."""

    text: str


class Ended(Struct, frozen=True):
    """The open call is complete."""


Event = Said | Began | Argued | Ended
