"""SentencePiece vocabularies: reads a ``tokenizer.model`` file and rebuilds its algorithm with ``tokenizers``.

Called by ``hf.py`` (folders without tokenizer.json) and ``gguf.py`` (the same vocabulary as GGUF
metadata). SentencePiece's BPE has no merge list: any two neighbours whose concatenation is a piece may merge, best
score first. So the merges are all splits of all pieces into two pieces, in the order of the scores.
"""

import math
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from msgspec import Struct
from tokenizers import AddedToken, Regex, Tokenizer, normalizers
from tokenizers.models import BPE, Unigram

from shoal.errors import ModelError
from shoal.tokenizer.parts import MAX_PIECE_CHARS, blame

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces; GGUF's token types are the same numbers."""

_MAX_FILE_BYTES = 64 << 20
_MAX_PIECES = 1 << 21
_UNIGRAM, _BPE = 1, 2
_SPACE = "\u2581"
_PROBE = " a\u0301 \ufb01\u3000\u4f60 "
"""Makes damaged normalisation rules show at start."""


class Piece(Struct, frozen=True):
    """An entry of the vocabulary; its id is its place."""

    text: str
    score: float
    kind: int


class SpmModel(Struct, frozen=True, kw_only=True):
    """What a SentencePiece model says of itself."""

    pieces: list[Piece]
    unigram: bool = False
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    charsmap: bytes = b""
    """Compiled normalisation rules; empty is the identity."""
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1


def build(model: SpmModel, path: str, specials: Sequence[str] = ()) -> Tokenizer:
    """The ``tokenizers`` pipeline that gives the model's ids; ``specials`` are pieces to be matched as a whole."""
    _check(model.pieces, path)
    with blame(path):
        core = Tokenizer(_unigram(model, path) if model.unigram else _bpe(model))
        core.normalizer = _normalizer(model)
        core.add_tokens([_added(piece, special=False) for piece in model.pieces if piece.kind == USER_DEFINED])
        core.add_special_tokens([_added(p, special=True) for p in model.pieces if p.kind in (CONTROL, UNKNOWN)])
        core.add_special_tokens([AddedToken(text, normalized=False) for text in specials])
        core.encode(_PROBE)
    return core


def _added(piece: Piece, *, special: bool) -> AddedToken:
    return AddedToken(piece.text, normalized=False, special=special)


def _check(pieces: list[Piece], path: str) -> None:
    if not pieces:
        raise ModelError(f"{path}: the vocabulary is empty; convert or download the file again")
    if len({piece.text for piece in pieces}) != len(pieces):
        raise ModelError(f"{path}: the vocabulary holds a token twice; convert or download the file again")
    for place, piece in enumerate(pieces):
        if not piece.text or len(piece.text) > MAX_PIECE_CHARS or math.isnan(piece.score):
            raise ModelError(
                f"{path}: token {place} is empty, over-long, or has no valid score; the file is damaged"
            )


def _unknown(pieces: list[Piece]) -> int | None:
    return next((place for place, piece in enumerate(pieces) if piece.kind == UNKNOWN), None)


def _bpe(model: SpmModel) -> BPE:
    unknown = _unknown(model.pieces)
    return BPE(
        vocab={piece.text: place for place, piece in enumerate(model.pieces)},
        merges=_merges(model.pieces),
        unk_token=None if unknown is None else model.pieces[unknown].text,
        fuse_unk=True,
        byte_fallback=any(piece.kind == BYTE for piece in model.pieces),
    )


def _merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces; user-defined ones first, then by score, then the longest left part."""
    mergeable = {piece.text for piece in pieces if piece.kind in (NORMAL, USER_DEFINED)}
    splits: list[tuple[float, int, int, str, str]] = []
    for piece in pieces:
        text = piece.text
        if len(text) < 2 or text not in mergeable:
            continue
        order = -piece.score if piece.kind == NORMAL else -math.inf
        for cut in range(1, len(text)):
            left = text[:cut]
            if left in mergeable:
                right = text[cut:]
                if right in mergeable:
                    splits.append((order, -cut, cut - len(text), left, right))
    splits.sort()
    return [split[3:] for split in splits]


def _unigram(model: SpmModel, path: str) -> Unigram:
    """Byte pieces stand for bytes only: the text ``<0x0A>`` must not become one."""
    unknown = _unknown(model.pieces)
    if unknown is None:
        raise ModelError(f"{path}: the unigram vocabulary has no unknown token; the file is damaged")
    out_of_reach = 8 * min(piece.score for piece in model.pieces) - 1000
    scores = [out_of_reach if piece.kind in (BYTE, UNUSED) else piece.score for piece in model.pieces]
    vocab = [(piece.text, score) for piece, score in zip(model.pieces, scores, strict=True)]
    return Unigram(vocab, unknown, any(piece.kind == BYTE for piece in model.pieces))


def _normalizer(model: SpmModel) -> normalizers.Normalizer:
    """In SentencePiece's order: rules, white space, the dummy prefix, spaces as ▁."""
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z|(?<= ) +"), ""))
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)


# --- the file ----------------------------------------------------------------------------------------------


def read_model(path: Path) -> SpmModel:
    """Reads a SentencePiece model file: protocol buffers, of which it uses only these few fields."""
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise ModelError(f"{path}: larger than {_MAX_FILE_BYTES >> 20} MiB, which no SentencePiece model is")
    try:
        return _parse_model(path.read_bytes(), str(path))
    except (ValueError, struct.error, IndexError) as error:
        raise ModelError(
            f"{path}: not a SentencePiece model, or cut short ({error}); download it again"
        ) from error


def _parse_model(content: bytes, path: str) -> SpmModel:
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(content):
        if number == 1 and isinstance(value, bytes):
            pieces.append(_parse_piece(value))
            if len(pieces) > _MAX_PIECES:
                raise ValueError("too many pieces")
        elif number == 2 and isinstance(value, bytes):
            trainer.update(_fields(value))
        elif number == 3 and isinstance(value, bytes):
            normalizer.update(_fields(value))
    algorithm = _integer(trainer, 3, _UNIGRAM)
    if algorithm not in (_UNIGRAM, _BPE):
        raise ModelError(f"{path}: trainer_spec.model_type {algorithm} is neither unigram (1) nor BPE (2)")
    if _integer(trainer, 24, 0):
        raise ModelError(f"{path}: trainer_spec.treat_whitespace_as_suffix is not supported")
    charsmap = normalizer.get(2, b"")
    return SpmModel(
        pieces=pieces,
        unigram=algorithm == _UNIGRAM,
        add_dummy_prefix=bool(_integer(normalizer, 3, 1)),
        remove_extra_whitespaces=bool(_integer(normalizer, 4, 1)),
        charsmap=charsmap if isinstance(charsmap, bytes) else b"",
        bos_id=_integer(trainer, 41, 1),
        eos_id=_integer(trainer, 42, 2),
        pad_id=_integer(trainer, 43, -1),
    )


def _parse_piece(content: bytes) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(content):
        if number == 1 and isinstance(value, bytes):
            text = value.decode()
        elif number == 2 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif number == 3 and isinstance(value, int):
            kind = value
    return Piece(text, score, kind)


def _integer(fields: dict[int, int | bytes], number: int, default: int) -> int:
    """A field of protobuf type int32, bool or enum; negative ones are sent as 64-bit two's complement."""
    value = fields.get(number, default)
    if not isinstance(value, int):
        raise ValueError(f"field {number} has the wrong type")
    return value - (1 << 64) if value >= 1 << 63 else value


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of one message: an int for a varint, bytes for everything else."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        wire_type = key & 7
        if wire_type == 0:
            number, at = _varint(content, at)
            yield key >> 3, number
            continue
        if wire_type == 2:
            length, at = _varint(content, at)
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"wire type {wire_type} at byte {at}")
        if length > len(content) - at:
            raise ValueError(f"a field at byte {at} reaches past the end")
        yield key >> 3, content[at : at + length]
        at += length


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = 0
    for place in range(10):
        byte = content[at + place]
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise ValueError(f"a number at byte {at} is too long")
