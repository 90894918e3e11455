"""A grammar in llguidance's dialect of Lark, put together from the parts that a request asks for."""

import json
from typing import Any, Final

from shoal.tokenizer import Tokenizer

SEPARATORS: Final = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""White space in JSON is bounded, or a small model fills its tokens with newlines: at most one space after a comma and
a colon, as most training data has it."""
TEXT: Final = "/(?s:.*)/"
_MAIN: Final = "main"


class Lark:
    """Rules by name, and grammars that they refer to as ``@name``."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._rules: list[str] = []
        self._parts: list[dict[str, Any]] = []

    def rule(self, name: str, body: str, options: str = "") -> str:
        """Adds a rule; its name."""
        self._rules.append(f"{name}{options}: {body}")
        return name

    def json(self, name: str, schema: dict[str, Any]) -> str:
        """Adds a rule for a JSON value that ``schema`` accepts."""
        held = json.dumps({**schema, "x-guidance": SEPARATORS}, ensure_ascii=False)
        return self.rule(name, f"%json {held}")

    def part(self, grammar: dict[str, Any]) -> str:
        """Adds a grammar of its own; how to refer to it."""
        self._parts.append(grammar)
        return f"@{grammar['name']}"

    def markers(self, *markers: str) -> str:
        """The markers, one behind the other: tokens of their own where the vocabulary has them as such, else text."""
        return " ".join(self._marker(marker) for marker in markers)

    def source(self) -> str:
        """llguidance's serialised form."""
        main = {"name": _MAIN, "lark_grammar": "\n".join(self._rules)}
        return json.dumps({"grammars": [main, *self._parts]}, ensure_ascii=False)

    def _marker(self, marker: str) -> str:
        token_id = special_id(self._tokenizer, marker)
        return literal(marker) if token_id is None else f"<[{token_id}]>"

    def behind_text(self, name: str, *markers: str) -> str:
        """Any text up to and with the first place where the markers stand."""
        if special_id(self._tokenizer, markers[0]) is not None:
            return self.rule(name, f"{TEXT} {self.markers(*markers)}")
        return self.rule(name, f"{TEXT} {literal(''.join(markers))}", "[lazy]")


def special_id(tokenizer: Tokenizer, marker: str) -> int | None:
    """The special token that a marker is; None for one that is text, in one token or several."""
    token_id = tokenizer.token_id(marker)
    return token_id if token_id in tokenizer.special_ids else None


def literal(text: str) -> str:
    """``text`` itself, as a terminal."""
    return json.dumps(text, ensure_ascii=False)
