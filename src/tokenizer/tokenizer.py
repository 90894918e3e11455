"""Text to token ids and back, for every model that Shoal serves. Called by the frontends, and by rank 0
(grammars).

The ids come from the ``tokenizers`` library. Decoding is done here, on bytes, so that a growing answer and a whole one
give the same text, and so that log-probabilities can show the exact bytes of each token.
"""

import codecs
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from shoal.errors import ModelError, RequestError
from shoal.tokenizer.gguf import read_gguf
from shoal.tokenizer.hf import read_folder
from shoal.tokenizer.parts import TokenizerParts

_REPLACEMENT = "\ufffd"
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def load_tokenizer(path: str) -> "Tokenizer":
    """The tokenizer of a model: a GGUF file, or a Hugging Face folder with tokenizer.json or tokenizer.model."""
    where = Path(path)
    if where.is_dir():
        return Tokenizer(read_folder(where))
    if where.is_file():
        return Tokenizer(read_gguf(where))
    raise ModelError(f"{path}: no such model; give a Hugging Face folder or a .gguf file")


class Tokenizer:
    """One model's vocabulary. Immutable, and safe to use from several threads."""

    def __init__(self, parts: TokenizerParts) -> None:
        self._parts = parts
        self._core = parts.core
        added = parts.core.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.bos_id = parts.bos_id
        self.eos_ids = parts.eos_ids
        self.special_tokens = parts.special_tokens
        self.chat_template = parts.chat_templates.get("default")
        self.tool_template = parts.chat_templates.get("tool_use")
        self.vocab_size: int = parts.core.get_vocab_size(with_added_tokens=True)
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str, add_special: bool) -> list[int]:
        """Token ids of a text. The text of a special token becomes that token. ``add_special`` adds what the model
        wants around a raw prompt (a beginning-of-sequence token, usually); a rendered chat has it already."""
        return self.encode_batch([text], add_special)[0]

    def encode_batch(self, texts: Sequence[str], add_special: bool) -> list[list[int]]:
        """``encode`` for several texts at once."""
        for text in texts:
            _refuse_surrogates(text)
        encodings = self._core.encode_batch_fast(list(texts), add_special_tokens=False)
        if not add_special:
            return [encoding.ids for encoding in encodings]
        return [[*self._parts.prefix, *encoding.ids, *self._parts.suffix] for encoding in encodings]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids. Bytes that make no character show as U+FFFD; ids outside the vocabulary as nothing."""
        stream = self.stream(skip_special)
        text = "".join([stream.feed(token_id) for token_id in ids])
        return text + stream.flush()

    def stream(
        self, skip_special: bool = True, *, goes_on: bool = False, shown_ids: frozenset[int] = frozenset()
    ) -> "TextStream":
        """A decoding that takes ids one by one. Of a text that ``goes_on`` behind another the first space is kept.
        Special tokens in ``shown_ids`` are not skipped."""
        return TextStream(self, skip_special, goes_on, shown_ids)

    def token_id(self, piece: str) -> int | None:
        """The id of a vocabulary entry by its exact name, a special token's usually."""
        found: int | None = self._core.token_to_id(piece)
        return found

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of a token; none for an id outside the vocabulary."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spell(token_id)
        return known

    @property
    def opening(self) -> tuple[int, ...]:
        """What ``encode`` puts before a raw prompt."""
        return self._parts.prefix

    @property
    def strips_first_space(self) -> bool:
        """Whether decoding takes off a space that encoding put before the text."""
        return self._parts.strips_first_space

    @property
    def splits_bad_bytes(self) -> bool:
        """Whether each byte of a broken character shows by itself (SentencePiece), or the character shows once."""
        return self._parts.spelling == "sentencepiece"

    def _spell(self, token_id: int) -> bytes:
        if not 0 <= token_id < 1 << 32:
            return b""
        added = self._added.get(token_id)
        if added is not None:
            return (added.replace("\u2581", " ") if self.splits_bad_bytes else added).encode()
        piece = self._core.id_to_token(token_id)
        if piece is None:
            return b""
        return _sentencepiece_bytes(piece) if self.splits_bad_bytes else _byte_level_bytes(piece)


class TextStream:
    """Decodes ids one after another, holding back what is not yet a whole character."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special: bool,
        goes_on: bool = False,
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids - shown_ids if skip_special else frozenset()
        self._at_start = tokenizer.strips_first_space and not goes_on
        self._escapes = tokenizer.splits_bad_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape" if self._escapes else "replace")

    def feed(self, token_id: int) -> str:
        """The characters that this token completes."""
        if token_id in self._skipped:
            return ""
        return self._mend(self._utf8.decode(self._token_bytes(token_id)))

    def flush(self) -> str:
        """What an incomplete character at the end shows as."""
        return self._mend(self._utf8.decode(b"", final=True))

    def _mend(self, text: str) -> str:
        if self._at_start and text:
            self._at_start = False
            text = text.removeprefix(" ")
        if self._escapes and not text.isascii():
            return _ESCAPED_BYTE.sub(_REPLACEMENT, text)
        return text


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            400, f"the text holds a lone surrogate at character {error.start}: not Unicode"
        ) from error


def _byte_level_bytes(piece: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in piece])
    except KeyError:
        return piece.encode()


def _sentencepiece_bytes(piece: str) -> bytes:
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode()


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 bytes stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()
