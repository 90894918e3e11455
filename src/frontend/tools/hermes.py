"""Hermes' format, also Qwen's and SmolLM2's: a JSON object between ``<tool_call>`` and ``</tool_call>``."""

from collections.abc import Collection, Sequence
from typing import Any, Final

from shoal.frontend.lark import TEXT, Lark, literal
from shoal.frontend.tools.bodies import EnclosedCall
from shoal.frontend.tools.format import (
    HeldFunction,
    call_rule,
    json_text,
    new_call_id,
    repeated,
    with_system,
)
from shoal.frontend.tools.parser import CallParser

OPENING: Final = "<tool_call>"
_CLOSING: Final = "</tool_call>"
_INTRODUCTION: Final = """\
You can call functions. Their descriptions stand between <tools> and </tools>, one JSON object a line:
<tools>
{tools}
</tools>
To call one, answer with its name and its arguments, as a JSON object between <tool_call> and </tool_call>:
<tool_call>
{{"name": "the function's name", "arguments": {{"an argument's name": "its value"}}}}
</tool_call>
Results come back between <tool_response> and </tool_response>."""


class Hermes:
    """The format."""

    markers: tuple[str, ...] = (OPENING, _CLOSING)

    def parser(self, names: Collection[str], *, patient: bool, held: bool) -> CallParser:
        """Reads one answer's calls."""
        return CallParser(
            OPENING, lambda events: EnclosedCall(names, events, _CLOSING), patient=patient, held=held
        )

    def call_id(self) -> str:
        """A fresh id."""
        return new_call_id()

    def introduced(
        self, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """The system tells of the tools."""
        return with_system(messages, _INTRODUCTION.format(tools="\n".join(map(json_text, tools))))

    def spelled(self, calls: Sequence[dict[str, Any]]) -> str:
        """Each on lines of its own."""
        return "\n".join(f"{OPENING}\n{json_text(call)}\n{_CLOSING}" for call in calls)

    def result(self, text: str) -> tuple[str, str]:
        """The user brings it."""
        return "user", f"<tool_response>\n{text}\n</tool_response>"

    def calls(self, lark: Lark, functions: Sequence[HeldFunction], *, several: bool) -> str:
        """One call, or several on lines of their own."""
        rest = self._rest(lark, functions)
        unit = lark.rule("unit", f"{lark.markers(OPENING)} {rest}")
        return repeated(unit, literal("\n"), several=several)

    def text_or_calls(self, lark: Lark, functions: Sequence[HeldFunction], *, several: bool) -> str:
        """Text with calls in it."""
        unit = f"{lark.behind_text('lead', OPENING)} {self._rest(lark, functions)}"
        return f"({unit})* {TEXT}" if several else f"{TEXT} | {unit}"

    def _rest(self, lark: Lark, functions: Sequence[HeldFunction]) -> str:
        return (
            f"{literal(chr(10))} {call_rule(lark, functions, 'arguments')} {literal(chr(10))} "
            + lark.markers(_CLOSING)
        )
