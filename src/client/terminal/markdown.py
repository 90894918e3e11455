"""Markdown that grows: which part of it is settled, and how it looks."""

from typing import Final

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.markdown import Markdown

_PARSER: Final = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
"""Answers hold ``vector<int>`` and ``<think>``: what looks like HTML is text."""


def render(text: str) -> Markdown:
    """For rich. Lines stay lines: a model that breaks one means it."""
    markdown = Markdown("", code_theme="ansi_dark", hyperlinks=False)
    markdown.parsed = _PARSER.parse(text)
    for token in markdown.parsed:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    return markdown


def settled_length(text: str) -> int:
    """How many characters belong to blocks that further text cannot change: all blocks but the last."""
    starts = [token.map[0] for token in _PARSER.parse(text) if _begins_block(token) and token.map]
    if len(starts) < 2:
        return 0
    return sum(len(line) + 1 for line in text.split("\n")[: starts[-1]])


def _begins_block(token: Token) -> bool:
    return token.level == 0 and token.nesting >= 0
