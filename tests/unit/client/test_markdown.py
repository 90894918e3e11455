"""Growing Markdown: what is printed early looks as it would have looked at the end."""

import io

import hypothesis.strategies as st
from hypothesis import given
from rich.console import Console, RenderableType

from shoal.client.terminal.markdown import render, settled_length
from shoal.client.terminal.screen import Screen
from shoal.client.terminal.show import Piece, harmless

BLOCKS = st.sampled_from(
    [
        "A paragraph\nof two lines",
        "# A heading",
        "```python\nx = 1\n\ny = 2\n```",
        "- one\n- two\n\n  more of two",
        "1. first\n2. second",
        "> quoted\n> text",
        "| a | b |\n| - | - |\n| 1 | 2 |",
        "***",
        "`vector<int>` and <think>so</think>",
        "    indented code",
    ]
)


def shown(content: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=60, force_terminal=False)
    console.print(content)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())


@given(st.lists(BLOCKS, min_size=1, max_size=6))
def test_settled_blocks_look_as_they_do_at_the_end(blocks: list[str]) -> None:
    text = "\n\n".join(blocks) + "\n"
    printed = []
    rest = ""
    for character in text:
        rest += character
        if character == "\n":
            length = settled_length(rest)
            printed += [shown(render(rest[:length]))] if length else []
            rest = rest[length:]
    assert "\n".join([*printed, shown(render(rest))]) == shown(render(text))


def test_the_last_block_is_never_settled() -> None:
    assert settled_length("") == 0
    assert settled_length("a paragraph\n\n") == 0
    assert settled_length("a paragraph\n\nanother") == len("a paragraph\n\n")
    assert settled_length("```\ncode\n\nmore code\n") == 0
    assert settled_length("- a\n\n- b\n") == 0


def test_what_looks_like_html_is_text_and_lines_stay_lines() -> None:
    assert shown(render("a vector<int> <b>x</b>\n<div>\nroses\nviolets")) == (
        "a vector<int> <b>x</b>\n<div>\nroses\nviolets"
    )


def test_reasoning_is_told_from_the_answer() -> None:
    console = Console(file=io.StringIO(), width=60, force_terminal=True, color_system="standard")
    Screen(console=console).answer([Piece("Hm, ", True), Piece("well.\nSo", True), Piece("**Yes**")])
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[2;3mSo" in text
    assert "\x1b[1mYes" in text


def test_harmless() -> None:
    assert harmless("a\tb\nc\x1b[31m\r\x07\x9b\x00\u2028é") == "a\tb\nc[31m\u2028é"
