"""Which format a model's tool calls have: by ``--tool_call_parser``, else by what its chat template writes."""

from typing import Final

from msgspec import Struct

from shoal.frontend.chat_template import ChatTemplate
from shoal.frontend.tools import internlm, mistral
from shoal.frontend.tools.format import ToolFormat
from shoal.frontend.tools.hermes import OPENING, Hermes
from shoal.frontend.tools.internlm import InternLM
from shoal.frontend.tools.llama3 import TAG, Llama3
from shoal.frontend.tools.mistral import Mistral
from shoal.tokenizer import Tokenizer

NONE: Final = "none"
_ALIASES: Final = {"qwen": "hermes"}
_LLAMA3_HEADER: Final = "<|start_header_id|>"


class ToolStyle(Struct, frozen=True):
    """How a model is told of tools, and calls them."""

    format: ToolFormat
    by_template: bool
    """The template tells of the tools and shows calls and results; else the conversation is rewritten for it."""


def choose(wanted: str, template: ChatTemplate, tokenizer: Tokenizer) -> ToolStyle:
    """The style for ``wanted``, a value of the flag. A template whose format is unknown here is not asked to tell of
    tools: answers could not be read."""
    if wanted == NONE:
        return ToolStyle(Hermes(), True)
    named = mistral.ARGS in template.source
    found = _found(template) if wanted == "auto" else _ALIASES.get(wanted, wanted)
    if found is not None:
        return ToolStyle(_format(found, named=named), template.reads_tools)
    if tokenizer.token_id(internlm.START) is not None:
        return ToolStyle(InternLM(), False)
    return ToolStyle(Hermes(), False)


def _found(template: ChatTemplate) -> str | None:
    source = template.source
    if not template.reads_tools:
        return None
    if OPENING in source and "<function=" not in source:
        return "hermes"
    if mistral.OPENING in source:
        return "mistral"
    if internlm.START in source:
        return "internlm"
    return "llama3" if TAG in source or _LLAMA3_HEADER in source else None


def _format(name: str, *, named: bool) -> ToolFormat:
    match name:
        case "llama3":
            return Llama3()
        case "mistral":
            return Mistral(named=named)
        case "internlm":
            return InternLM()
    return Hermes()
