"""Rebuilds the tokenizer that a GGUF file carries as metadata. Called by ``tokenizer.py``.

``tokenizer.ggml.model`` is ``llama`` for SentencePiece vocabularies (pieces with scores) and ``gpt2`` for byte-level
BPE (merges; ``tokenizer.ggml.pre`` names the way text is split first, whose patterns the file does not hold).
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from shoal.checkpoint.fields import REMEDY, Fields, shown
from shoal.checkpoint.gguf import GgufFile
from shoal.errors import ModelError
from shoal.tokenizer import spm
from shoal.tokenizer.parts import MAX_PIECE_CHARS, TokenizerParts, blame, end_of_turn_ids

_TEMPLATE = "tokenizer.chat_template"
_KINDS = (spm.NORMAL, spm.UNKNOWN, spm.CONTROL, spm.USER_DEFINED, spm.UNUSED, spm.BYTE)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _WORDS % r"\p{N}{1,3}"
_QWEN2 = _WORDS % r"\p{N}"
_CAPITALS, _SMALLS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}*{_SMALLS}+|[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}+{_SMALLS}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Split(Struct, frozen=True, kw_only=True):
    """How byte-level BPE cuts a text before it merges: each pattern cuts what the one before left whole."""

    patterns: tuple[str, ...]
    whole_words: bool = False
    """A word that is in the vocabulary is taken without merging."""
    composes: bool = False
    """Text is brought to Unicode's form C first."""
    adds_bos: bool = False
    """Where the file does not say."""


_GPT2_SPLIT = _Split(patterns=(_GPT2,))
_DIGITS_SPLIT = _Split(patterns=(r"\p{N}", _GPT2))
_QWEN2_SPLIT = _Split(patterns=(_QWEN2,), composes=True)
_LLAMA3_SPLIT = _Split(patterns=(_LLAMA3,), whole_words=True, adds_bos=True)
_SPLITS = {
    "default": _Split(patterns=(r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(("gpt-2", "olmo", "phi-2", "mpt", "jais", "trillion"), _GPT2_SPLIT),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS_SPLIT),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3"), _LLAMA3_SPLIT),
    **dict.fromkeys(("smaug-bpe", "dbrx"), _Split(patterns=(_LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2_SPLIT),
    "tekken": _Split(patterns=(_TEKKEN,), whole_words=True, adds_bos=True),
}


def read_gguf(path: Path) -> TokenizerParts:
    """The tokenizer in a GGUF file."""
    file = GgufFile(path)
    try:
        return rebuild(file.metadata, str(path))
    finally:
        file.close()


def rebuild(metadata: Mapping[str, object], source: str) -> TokenizerParts:
    """The tokenizer that GGUF metadata describes; ``source`` names the file in errors."""
    fields = Fields(source, metadata, "tokenizer.ggml.")
    model = fields.text("model", "none")
    if model not in ("llama", "gpt2"):
        raise fields.error(
            "model",
            f"is {shown(model)}, and only llama (SentencePiece) and gpt2 (byte-level BPE) are supported",
        )
    tokens = fields.texts("tokens")
    if not tokens:
        raise fields.error("tokens", f"is missing or empty: {REMEDY}")
    kinds = _kinds(fields, len(tokens))
    if model == "llama":
        prefixed = fields.flag("add_space_prefix", True)
        core = _sentencepiece(fields, tokens, kinds, prefixed)
        return _parts(fields, core, tokens, kinds, strips_first_space=prefixed)
    split = _split(fields)
    return _parts(fields, _byte_level(fields, tokens, kinds, split), tokens, kinds, split=split)


def _parts(
    fields: Fields,
    core: Tokenizer,
    tokens: list[str],
    kinds: list[int],
    *,
    split: _Split | None = None,
    strips_first_space: bool = False,
) -> TokenizerParts:
    bos, eos = _id(fields, "bos_token_id", tokens), _id(fields, "eos_token_id", tokens)
    named = {
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": _id(fields, "unknown_token_id", tokens),
        "pad_token": _id(fields, "padding_token_id", tokens),
    }
    ends = {eos, _id(fields, "eot_token_id", tokens), _id(fields, "eom_token_id", tokens)}
    ends |= end_of_turn_ids((n, tokens[n]) for n, kind in enumerate(kinds) if kind == spm.CONTROL)
    adds_bos = fields.flag("add_bos_token", split is None or split.adds_bos)
    adds_eos = fields.flag("add_eos_token", False)
    return TokenizerParts(
        core=core,
        spelling="sentencepiece" if split is None else "byte_level",
        strips_first_space=strips_first_space,
        prefix=(bos,) if adds_bos and bos is not None else (),
        suffix=(eos,) if adds_eos and eos is not None else (),
        bos_id=bos,
        eos_ids=tuple(sorted(end for end in ends if end is not None)),
        special_tokens={name: tokens[token_id] for name, token_id in named.items() if token_id is not None},
        chat_templates=_templates(fields),
    )


def _id(fields: Fields, name: str, tokens: list[str]) -> int | None:
    return fields.integer(name, 0, len(tokens) - 1) if fields.has(name) else None


def _templates(fields: Fields) -> dict[str, str]:
    """``tokenizer.chat_template``, and ``tokenizer.chat_template.NAME`` where there are several."""
    found: dict[str, str] = {}
    for key, value in fields.values.items():
        if key == _TEMPLATE or key.startswith(_TEMPLATE + "."):
            if not isinstance(value, str):
                raise ModelError(f"{fields.source}: {key} is {shown(value)}, not a string: {REMEDY}")
            found[key[len(_TEMPLATE) + 1 :] or "default"] = value
    return found


def _kinds(fields: Fields, count: int) -> list[int]:
    if not fields.has("token_type"):
        return [spm.NORMAL] * count
    kinds = _numbers(fields, "token_type", count)
    known = np.isin(kinds, _KINDS)
    return [int(kind) for kind in np.where(known, kinds, spm.NORMAL)]


def _numbers(fields: Fields, name: str, count: int) -> NDArray[np.generic]:
    """A list of numbers, one a token."""
    values = fields.values.get(fields.prefix + name)
    if not isinstance(values, np.ndarray) or values.shape != (count,):
        raise fields.error(name, f"is missing or not a list of {count} numbers, one a token: {REMEDY}")
    return values


# --- SentencePiece -----------------------------------------------------------------------------------------


def _sentencepiece(fields: Fields, tokens: list[str], kinds: list[int], prefixed: bool) -> Tokenizer:
    scores = _numbers(fields, "scores", len(tokens)).astype(np.float64).tolist()
    model = spm.SpmModel(
        pieces=[
            spm.Piece(_piece(text, kind, n), score, kind)
            for n, (text, score, kind) in enumerate(zip(tokens, scores, kinds, strict=True))
        ],
        add_dummy_prefix=prefixed,
        remove_extra_whitespaces=fields.flag("remove_extra_whitespaces", False),
    )
    return spm.build(model, fields.source)


def _piece(text: str, kind: int, place: int) -> str:
    """Converters write user-defined pieces with plain spaces, and some leave empty places."""
    if kind == spm.USER_DEFINED:
        return text.replace(" ", "\u2581")
    return text or f"[EMPTY_{place}]"


# --- byte-level BPE ----------------------------------------------------------------------------------------


def _split(fields: Fields) -> _Split:
    name = fields.text("pre", "default")
    split = _SPLITS.get(name)
    if split is None:
        known = ", ".join(sorted(_SPLITS))
        raise fields.error("pre", f"is {shown(name)}, a pre-tokenizer that is not supported; known are {known}")
    return split


def _byte_level(fields: Fields, tokens: list[str], kinds: list[int], split: _Split) -> Tokenizer:
    vocab = {text or f"[EMPTY_{n}]": n for n, text in enumerate(tokens)}
    if len(vocab) != len(tokens) or max(map(len, tokens)) > MAX_PIECE_CHARS:
        raise fields.error("tokens", f"holds a token twice, or an over-long one: {REMEDY}")
    with blame(fields.source):
        core = Tokenizer(BPE(vocab=vocab, merges=_merges(fields), ignore_merges=split.whole_words))
        core.normalizer = normalizers.NFC() if split.composes else None
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split.patterns),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        core.decoder = decoders.ByteLevel()
        core.add_tokens(_added(tokens, kinds, spm.USER_DEFINED))
        core.add_special_tokens(_added(tokens, kinds, spm.CONTROL) + _added(tokens, kinds, spm.UNKNOWN))
    return core


def _added(tokens: list[str], kinds: list[int], wanted: int) -> list[AddedToken]:
    return [
        AddedToken(text, normalized=False, special=wanted != spm.USER_DEFINED)
        for text, kind in zip(tokens, kinds, strict=True)
        if kind == wanted and text
    ]


def _merges(fields: Fields) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for place, text in enumerate(fields.texts("merges")):
        left, _, right = text.partition(" ")
        if not left or not right or " " in right:
            raise fields.error("merges", f"has {shown(text)} at {place}, not two tokens with a space between")
        merges.append((left, right))
    if not merges:
        raise fields.error("merges", f"is missing or empty: {REMEDY}")
    return merges
