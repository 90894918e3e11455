"""Filling in the middle: the prompt of a model that was trained to write what stands between two texts.

Such models mark the parts with special tokens of their own; ``infill_of`` knows them by name. Called by
``completions.py`` for requests with a ``suffix``.
"""

from typing import Final

from msgspec import Struct

from shoal.frontend.prompts import continuation_ids
from shoal.tokenizer import Tokenizer


class _Form(Struct, frozen=True):
    """How one family lays out its prompt; the answer follows."""

    prefix: str
    suffix: str
    middle: str = ""
    """Empty: the answer follows the last part at once."""
    suffix_first: bool = False
    ends: tuple[str, ...] = ()
    """Tokens that end the filling, besides the model's own end of sequence."""


_FORMS: Final = (
    _Form(
        "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>",
        ends=("<|endoftext|>", "<|file_sep|>", "<|file_separator|>", "<|repo_name|>", "<|fim_pad|>"),
    ),
    _Form("<fim_prefix>", "<fim_suffix>", "<fim_middle>", ends=("<|endoftext|>", "<file_sep>", "<fim_pad>")),
    _Form("<fim-prefix>", "<fim-suffix>", "<fim-middle>", ends=("<|endoftext|>", "<fim-pad>")),
    _Form("▁<PRE>", "▁<SUF>", "▁<MID>", ends=("▁<EOT>",)),
    _Form("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", ends=("<｜end▁of▁sentence｜>",)),
    _Form("[PREFIX]", "[SUFFIX]", suffix_first=True),
)  # fmt: skip
"""Qwen 2.5 and later, CodeGemma; StarCoder, Granite; SantaCoder; Code Llama; DeepSeek; Codestral."""


class Infill(Struct, frozen=True):
    """One model's tokens for it."""

    prefix_id: int
    suffix_id: int
    middle_ids: tuple[int, ...]
    suffix_first: bool
    end_ids: tuple[int, ...]

    def prompt(self, tokenizer: Tokenizer, prefix: list[int], suffix: str) -> list[int]:
        """The ids of a prompt whose answer stands between ``prefix`` and ``suffix``."""
        before = [self.prefix_id, *prefix]
        after = [self.suffix_id, *continuation_ids(tokenizer, suffix)]
        parts = [*after, *before] if self.suffix_first else [*before, *after]
        return [*tokenizer.opening, *parts, *self.middle_ids]


def infill_of(tokenizer: Tokenizer) -> Infill | None:
    """What the model's vocabulary has for it; None for one that was not trained to fill in."""
    for form in _FORMS:
        prefix_id, suffix_id = tokenizer.token_id(form.prefix), tokenizer.token_id(form.suffix)
        middle_id = tokenizer.token_id(form.middle) if form.middle else None
        if prefix_id is None or suffix_id is None or (form.middle and middle_id is None):
            continue
        ends = (tokenizer.token_id(name) for name in form.ends)
        return Infill(
            prefix_id=prefix_id,
            suffix_id=suffix_id,
            middle_ids=() if middle_id is None else (middle_id,),
            suffix_first=form.suffix_first,
            end_ids=tuple(end for end in ends if end is not None),
        )
    return None
