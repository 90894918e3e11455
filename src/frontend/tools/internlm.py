"""InternLM's format: a JSON object between ``<|action_start|><|plugin|>`` and ``<|action_end|>``.

The templates that come with its models know no tools; the model was trained on messages of the roles ``system`` and
``environment`` that are named ``<|plugin|>``.
"""

from collections.abc import Collection, Sequence
from typing import Any, Final

from shoal.frontend.lark import TEXT, Lark, literal
from shoal.frontend.tools.bodies import EnclosedCall
from shoal.frontend.tools.format import HeldFunction, call_rule, json_text, new_call_id, repeated
from shoal.frontend.tools.parser import CallParser

START: Final = "<|action_start|>"
_PLUGIN: Final = "<|plugin|>"
_END: Final = "<|action_end|>"
_NAMED: Final = f"{{role}} name={_PLUGIN}"


class InternLM:
    """The format."""

    markers: tuple[str, ...] = (START, _PLUGIN, _END)

    def parser(self, names: Collection[str], *, patient: bool, held: bool) -> CallParser:
        """Reads one answer's calls."""
        return CallParser(
            START + _PLUGIN, lambda events: EnclosedCall(names, events, _END), patient=patient, held=held
        )

    def call_id(self) -> str:
        """A fresh id."""
        return new_call_id()

    def introduced(
        self, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """A message of its own, behind what the system says."""
        first = int(bool(messages) and messages[0]["role"] == "system")
        told = json_text([tool.get("function", tool) for tool in tools])
        return [*messages[:first], {"role": _NAMED.format(role="system"), "content": told}, *messages[first:]]

    def spelled(self, calls: Sequence[dict[str, Any]]) -> str:
        """As the model writes them."""
        return "".join(
            f"{START}{_PLUGIN}\n{json_text({'name': call['name'], 'parameters': call['arguments']})}{_END}\n"
            for call in calls
        )

    def result(self, text: str) -> tuple[str, str]:
        """The environment brings it."""
        return _NAMED.format(role="environment"), text

    def calls(self, lark: Lark, functions: Sequence[HeldFunction], *, several: bool) -> str:
        """One call, or several on lines of their own."""
        unit = lark.rule("unit", f"{lark.markers(START, _PLUGIN)} {self._rest(lark, functions)}")
        return repeated(unit, literal("\n"), several=several)

    def text_or_calls(self, lark: Lark, functions: Sequence[HeldFunction], *, several: bool) -> str:
        """Text with calls in it."""
        unit = f"{lark.behind_text('lead', START, _PLUGIN)} {self._rest(lark, functions)}"
        return f"({unit})* {TEXT}" if several else f"{TEXT} | {unit}"

    def _rest(self, lark: Lark, functions: Sequence[HeldFunction]) -> str:
        return f"{literal(chr(10))} {call_rule(lark, functions, 'parameters')} {lark.markers(_END)}"
