"""What a tokenizer is made of, whichever file it came from, and the errors of reading one.

``hf.py``, ``gguf.py`` and ``spm.py`` make ``TokenizerParts``; ``tokenizer.py`` wraps them.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import tokenizers
from msgspec import Struct

from shoal.errors import ModelError

MAX_PIECE_CHARS = 1024
"""A vocabulary entry longer than this is taken for a broken file."""

NAMED_SPECIALS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that chat templates know by name."""

_END_OF_TURN = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<eoa>",
        "<｜end▁of▁sentence｜>",
    }
)


class TokenizerParts(Struct, frozen=True, kw_only=True):
    """All that ``Tokenizer`` needs to know."""

    core: tokenizers.Tokenizer
    spelling: Literal["byte_level", "sentencepiece"]
    """How the vocabulary spells bytes: GPT-2's table of 256 characters, or ▁ for a space and <0x0A> for a byte."""
    strips_first_space: bool
    """A text's first space was put there by the encoder, so decoding takes it off."""
    prefix: tuple[int, ...] = ()
    """Put before a text that is encoded with special tokens."""
    suffix: tuple[int, ...] = ()
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    special_tokens: dict[str, str]
    """Texts of the named special tokens, for templates."""
    chat_templates: dict[str, str]
    """By name; ``default`` is the one for everyday use."""


@contextmanager
def blame(path: str) -> Iterator[None]:
    """Turns what the tokenizers library says of a bad file, a panic of its Rust code included, into a ModelError."""
    try:
        yield
    except ModelError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ModelError(f"{path}: the tokenizer cannot be built: {_first_line(error)}") from error
        raise


def end_of_turn_ids(special: Iterable[tuple[int, str]]) -> set[int]:
    """Special tokens that by their name end an answer, for files that do not say so elsewhere."""
    return {token_id for token_id, text in special if text in _END_OF_TURN}


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
