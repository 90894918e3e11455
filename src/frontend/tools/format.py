"""What is common to the ways in which models spell tool calls; each of them is a module beside this one."""

import json
import secrets
from collections.abc import Collection, Sequence
from typing import Any, Final, Protocol

from msgspec import Struct

from shoal.frontend.lark import Lark, literal
from shoal.frontend.tools.parser import CallParser

MOST_CALLS: Final = 16
"""That a grammar lets one answer have."""


class HeldFunction(Struct, frozen=True):
    """A function whose calls a grammar holds."""

    name: str
    arguments: str
    """The Lark rule of its arguments."""


class ToolFormat(Protocol):
    """One way of spelling calls."""

    markers: tuple[str, ...]
    """Texts around calls that may be special tokens."""

    def parser(self, names: Collection[str], *, patient: bool, held: bool) -> CallParser:
        """Reads one answer's calls of functions of these names."""
        ...

    def call_id(self) -> str:
        """A fresh id, in the form that the model's template takes."""
        ...

    def introduced(
        self, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """A conversation that tells of ``tools``, for a template that cannot."""
        ...

    def spelled(self, calls: Sequence[dict[str, Any]]) -> str:
        """Calls of the history as the model would have written them: each has ``name`` and ``arguments``."""
        ...

    def result(self, text: str) -> tuple[str, str]:
        """The role and the content of a message that brings a function's result."""
        ...

    def calls(self, lark: Lark, functions: Sequence[HeldFunction], *, several: bool) -> str:
        """A Lark expression: one call or, with ``several``, at least one."""
        ...

    def text_or_calls(self, lark: Lark, functions: Sequence[HeldFunction], *, several: bool) -> str:
        """A Lark expression: any text, in which every call is one of ``functions``; at most one without
        ``several``."""
        ...


def new_call_id() -> str:
    """In OpenAI's form."""
    return f"call_{secrets.token_hex(12)}"


def json_text(value: Any) -> str:
    """As models are shown JSON in training: one line, a space behind commas and colons."""
    return json.dumps(value, ensure_ascii=False)


def call_rule(lark: Lark, functions: Sequence[HeldFunction], arguments_key: str) -> str:
    """The rule of one call object."""
    bodies = []
    for number, function in enumerate(functions):
        head = f'{{"name": {json_text(function.name)}, "{arguments_key}": '
        bodies.append(lark.rule(f"call_{number}", f"{literal(head)} {function.arguments} {literal('}')}"))
    return lark.rule("call", " | ".join(bodies))


def repeated(unit: str, between: str, *, several: bool) -> str:
    """``unit``, once or (with ``several``) more often, with ``between`` in between."""
    return f"{unit} ({between} {unit}){{0,{MOST_CALLS - 1}}}" if several else unit


def with_system(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """The messages with ``text`` behind what the system says first."""
    if messages and messages[0]["role"] == "system":
        said = messages[0]["content"]
        first = {**messages[0], "content": f"{said}\n\n{text}" if said else text}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
