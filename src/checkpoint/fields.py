"""Reads the fields of a model's own files, which come from strangers: types and ranges are checked here, once.

``hf_config.py``, ``gguf_metadata.py`` and ``defaults.py`` take every value through ``Fields``.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import msgspec

from shoal.errors import ModelError

REMEDY = "correct the file or download the model again"


def shown(value: object) -> str:
    """A value from outside as one short line, safe to print."""
    text = " ".join(ascii(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def read_json_object(path: Path, limit_bytes: int = 64 << 20) -> dict[str, object]:
    """The JSON object in a file of at most ``limit_bytes``."""
    try:
        with path.open("rb") as file:
            content = file.read(limit_bytes + 1)
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read ({error.strerror}): check the file and its permissions"
        ) from error
    if len(content) > limit_bytes:
        raise ModelError(f"{path}: is over {limit_bytes} bytes, too large for what it should be: {REMEDY}")
    try:
        return msgspec.json.decode(content, type=dict[str, object])
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: is not a JSON object ({error}): {REMEDY}") from error


class Fields:
    """Named values of one file; every error names the file and the field. ``null`` counts as absent."""

    def __init__(self, source: str, values: Mapping[str, object], prefix: str = "", within: str = "") -> None:
        self.source = source
        self.values = values
        self.prefix = prefix
        """Before each name in ``values``."""
        self.within = within
        """Where in the file ``values`` is, for errors."""

    def error(self, name: str, problem: str) -> ModelError:
        return ModelError(f"{self.source}: {self.within}{self.prefix}{name} {problem}")

    def has(self, name: str) -> bool:
        return self.values.get(self.prefix + name) is not None

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number; without a default it has to be there."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(name, f"is {shown(value)}, not a whole number from {low} to {high}: {REMEDY}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number; without a default it has to be there."""
        value = self._value(name, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
            or not math.isfinite(value)
        ):
            raise self.error(name, f"is {shown(value)}, not a number from {low:g} to {high:g}: {REMEDY}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"is {shown(value)}, not true or false: {REMEDY}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._value(name, default)
        if not isinstance(value, str):
            raise self.error(name, f"is {shown(value)}, not a string: {REMEDY}")
        return value

    def texts(self, name: str) -> list[str]:
        """A list of strings; empty when absent."""
        value = self._value(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(name, f"is {shown(value)}, not a list of strings: {REMEDY}")
        return value

    def nested(self, name: str) -> "Fields | None":
        """The object in this field, None when absent."""
        value = self.values.get(self.prefix + name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, f"is {shown(value)}, not an object: {REMEDY}")
        return Fields(self.source, value, within=f"{self.within}{self.prefix}{name}.")

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """One token id, or a list of them; empty when absent."""
        value = self._value(name, [])
        ids = value if isinstance(value, list) else [value]
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
                raise self.error(name, f"has {shown(token)}, not a token id below {vocab_size}: {REMEDY}")
        return tuple(dict.fromkeys(ids))

    def _value(self, name: str, default: object) -> object:
        value = self.values.get(self.prefix + name)
        if value is not None:
            return value
        if default is None:
            raise self.error(name, f"is missing: {REMEDY}")
        return default
