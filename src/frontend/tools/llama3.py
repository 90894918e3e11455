"""Llama 3's format: an answer that is JSON objects with semicolons between them, maybe behind ``<|python_tag|>``."""

from collections.abc import Collection, Sequence
from typing import Any, Final

from shoal.frontend.lark import Lark, literal
from shoal.frontend.tools.bodies import CallSeries
from shoal.frontend.tools.format import (
    HeldFunction,
    call_rule,
    json_text,
    new_call_id,
    repeated,
    with_system,
)
from shoal.frontend.tools.parser import CallParser

TAG: Final = "<|python_tag|>"
_INTRODUCTION: Final = """\
You can call functions. They are described here, one JSON object a line:
{tools}
To call one, answer with nothing but a JSON object of this form:
{{"name": "the function's name", "parameters": {{"an argument's name": "its value"}}}}"""


class Llama3:
    """The format."""

    markers: tuple[str, ...] = (TAG,)

    def parser(self, names: Collection[str], *, patient: bool, held: bool) -> CallParser:
        """Reads one answer's calls."""
        return CallParser(TAG, lambda events: CallSeries(names, events), bare=True, patient=patient, held=held)

    def call_id(self) -> str:
        """A fresh id."""
        return new_call_id()

    def introduced(
        self, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """The system tells of the tools."""
        return with_system(messages, _INTRODUCTION.format(tools="\n".join(map(json_text, tools))))

    def spelled(self, calls: Sequence[dict[str, Any]]) -> str:
        """One behind the other."""
        return "; ".join(json_text({"name": call["name"], "parameters": call["arguments"]}) for call in calls)

    def result(self, text: str) -> tuple[str, str]:
        """The role that these models were trained with."""
        return "ipython", text

    def calls(self, lark: Lark, functions: Sequence[HeldFunction], *, several: bool) -> str:
        """One call, or several behind one another."""
        return repeated(call_rule(lark, functions, "parameters"), literal("; "), several=several)

    def text_or_calls(self, lark: Lark, functions: Sequence[HeldFunction], *, several: bool) -> str:
        """Text that does not begin with a brace, or calls."""
        return rf"/(\s*[^\s{{](?s:.*))?/ | {self.calls(lark, functions, several=several)}"
