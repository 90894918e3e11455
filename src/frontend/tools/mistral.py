"""Mistral's formats. Earlier models: ``[TOOL_CALLS]`` and a JSON array of calls; later ones: ``[TOOL_CALLS]``, a
function's name, ``[ARGS]`` and its arguments, for each call."""

import secrets
import string
from collections.abc import Collection, Sequence
from typing import Any, Final

from shoal.frontend.lark import TEXT, Lark, literal
from shoal.frontend.tools.bodies import MistralBody
from shoal.frontend.tools.format import HeldFunction, call_rule, json_text, repeated
from shoal.frontend.tools.parser import CallParser

OPENING: Final = "[TOOL_CALLS]"
ARGS: Final = "[ARGS]"
_ID_CHARACTERS: Final = string.ascii_letters + string.digits
_ID_LENGTH: Final = 9
"""These models' templates refuse other ids."""


class Mistral:
    """Both formats are read; ``named`` says which one is written."""

    markers: tuple[str, ...] = (OPENING, ARGS, "[CALL_ID]")

    def __init__(self, *, named: bool) -> None:
        self._named = named

    def parser(self, names: Collection[str], *, patient: bool, held: bool) -> CallParser:
        """Reads one answer's calls."""
        return CallParser(OPENING, lambda events: MistralBody(names, events), patient=patient, held=held)

    def call_id(self) -> str:
        """A fresh id."""
        return "".join([secrets.choice(_ID_CHARACTERS) for _ in range(_ID_LENGTH)])

    def introduced(
        self, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Before the last message of the user."""
        last = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=0)
        told = f"[AVAILABLE_TOOLS]{json_text(list(tools))}[/AVAILABLE_TOOLS]"
        message = messages[last]
        return [
            *messages[:last],
            {**message, "content": f"{told}{message['content']}"},
            *messages[last + 1 :],
        ]

    def spelled(self, calls: Sequence[dict[str, Any]]) -> str:
        """As the model writes them."""
        if not self._named:
            return OPENING + json_text(list(calls))
        return "".join(f"{OPENING}{call['name']}{ARGS}{json_text(call['arguments'])}" for call in calls)

    def result(self, text: str) -> tuple[str, str]:
        """The user brings it."""
        return "user", f"[TOOL_RESULTS]{text}[/TOOL_RESULTS]"

    def calls(self, lark: Lark, functions: Sequence[HeldFunction], *, several: bool) -> str:
        """One call, or several."""
        rest = self._rest(lark, functions, several=several)
        unit = lark.rule("unit", f"{lark.markers(OPENING)} {rest}")
        return repeated(unit, "", several=several and self._named)

    def text_or_calls(self, lark: Lark, functions: Sequence[HeldFunction], *, several: bool) -> str:
        """Text with calls in it."""
        rest = self._rest(lark, functions, several=several)
        unit = f"{lark.behind_text('lead', OPENING)} {rest}"
        return f"({unit})* {TEXT}" if several else f"{TEXT} | {unit}"

    def _rest(self, lark: Lark, functions: Sequence[HeldFunction], *, several: bool) -> str:
        if self._named:
            named = [f"{literal(each.name)} {lark.markers(ARGS)} {each.arguments}" for each in functions]
            return lark.rule("named", " | ".join(named))
        call = call_rule(lark, functions, "arguments")
        items = repeated(call, literal(", "), several=several)
        return lark.rule("array", f'" "? "[" {items} "]"')
