"""Reads the tokenizer of a Hugging Face folder. Called by ``tokenizer.py``.

``tokenizer.json`` is the ``tokenizers`` library's own format; a folder that has only SentencePiece's
``tokenizer.model`` is rebuilt by ``spm.py``. Special tokens, their flags and the chat template lie in files
beside it. No code of the folder is ever run.
"""

from pathlib import Path

import msgspec
from tokenizers import AddedToken, Tokenizer

from shoal.checkpoint.fields import REMEDY, Fields, read_json_object, shown
from shoal.errors import ModelError
from shoal.tokenizer import spm
from shoal.tokenizer.parts import NAMED_SPECIALS, TokenizerParts, blame, end_of_turn_ids

_MAX_TOKENIZER_BYTES = 256 << 20
_MAX_TEMPLATE_BYTES = 1 << 20
_MAX_ID = 1 << 22
_TEMPLATE_FILE = "chat_template.jinja"


class _Step(msgspec.Struct):
    """A step of tokenizer.json's decoder: only what tells how the vocabulary spells bytes."""

    type: str = ""
    decoders: list["_Step"] = msgspec.field(default_factory=list)
    start: int = 0
    content: object = None
    prepend_scheme: str = "always"


class _Outline(msgspec.Struct):
    """The part of tokenizer.json that is read here; the library reads all of it."""

    decoder: _Step | None = None


def read_folder(folder: Path) -> TokenizerParts:
    """The tokenizer in a Hugging Face folder."""
    config = _optional_json(folder / "tokenizer_config.json")
    names = _special_texts(folder, config)
    if (folder / "tokenizer.json").exists():
        core, spelling, strips = _from_json(folder / "tokenizer.json", config)
        prefix, suffix = _affixes(core)
    elif (folder / "tokenizer.model").exists():
        model = spm.read_model(folder / "tokenizer.model")
        core = _from_model(folder, model, config, names)
        spelling, strips, prefix, suffix = "sentencepiece", model.add_dummy_prefix, None, ()
    else:
        raise ModelError(
            f"{folder}: has no tokenizer.json and no tokenizer.model: copy them from where the model came from"
        )
    return _parts(folder, config, names, core, spelling == "byte_level", strips, prefix, suffix)


def _parts(
    folder: Path,
    config: Fields,
    names: dict[str, str],
    core: Tokenizer,
    byte_level: bool,
    strips_first_space: bool,
    prefix: tuple[int, ...] | None,
    suffix: tuple[int, ...],
) -> TokenizerParts:
    bos, eos = _id_of(core, names.get("bos_token")), _id_of(core, names.get("eos_token"))
    if prefix is None or config.has("add_bos_token"):
        prefix = (bos,) if bos is not None and config.flag("add_bos_token", True) else ()
    if config.has("add_eos_token"):
        suffix = (eos,) if eos is not None and config.flag("add_eos_token", False) else ()
    return TokenizerParts(
        core=core,
        spelling="byte_level" if byte_level else "sentencepiece",
        strips_first_space=strips_first_space,
        prefix=prefix,
        suffix=suffix,
        bos_id=bos,
        eos_ids=_eos_ids(folder, core, eos),
        special_tokens=names,
        chat_templates=_templates(folder, config),
    )


def _optional_json(path: Path) -> Fields:
    return Fields(str(path), read_json_object(path) if path.exists() else {})


def _id_of(core: Tokenizer, text: str | None) -> int | None:
    return None if text is None else core.token_to_id(text)


# --- tokenizer.json ----------------------------------------------------------------------------------------


def _from_json(path: Path, config: Fields) -> tuple[Tokenizer, str, bool]:
    if path.stat().st_size > _MAX_TOKENIZER_BYTES:
        raise ModelError(f"{path}: larger than {_MAX_TOKENIZER_BYTES >> 20} MiB, too large for a tokenizer")
    content = path.read_bytes()
    try:
        outline = msgspec.json.decode(content, type=_Outline)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not a tokenizer file ({error}): {REMEDY}") from error
    spelling, strips = _spelling(path, outline.decoder)
    with blame(str(path)):
        core = Tokenizer.from_buffer(content)
        declared = _declared(config)
        taken = {n: t.content for n, t in declared.items() if core.id_to_token(n) not in (None, t.content)}
        if taken:
            core = Tokenizer.from_buffer(_renamed(content, taken, config))
        core.no_truncation()
        core.no_padding()
        _add_declared(core, declared, config)
    return core, spelling, strips


def _renamed(content: bytes, names: dict[int, str], config: Fields) -> bytes:
    """tokenizer.json with other texts at some ids: InternLM 2 puts its special tokens in the places of unused ones."""
    file = msgspec.json.decode(content)
    vocab = file["model"]["vocab"]
    if not isinstance(vocab, dict):
        raise config.error(
            "added_tokens_decoder", f"renames tokens of tokenizer.json: {shown(names)}: {REMEDY}"
        )
    file["model"]["vocab"] = {names.get(token_id, text): token_id for text, token_id in vocab.items()}
    return msgspec.json.encode(file)


def _spelling(path: Path, decoder: _Step | None) -> tuple[str, bool]:
    """How the vocabulary spells bytes, and whether decoding takes off a first space."""
    steps = [] if decoder is None else decoder.decoders or [decoder]
    kinds = {step.type for step in steps}
    if "ByteLevel" in kinds:
        return "byte_level", False
    if "Metaspace" in kinds:
        return "sentencepiece", any(
            step.prepend_scheme != "never" for step in steps if step.type == "Metaspace"
        )
    if kinds & {"ByteFallback", "Replace"}:
        return "sentencepiece", any(step.type == "Strip" and step.start > 0 for step in steps)
    raise ModelError(
        f"{path}: its decoder is {shown(sorted(kinds) or None)}; supported are byte-level BPE (ByteLevel) and "
        "SentencePiece (Replace, ByteFallback, Metaspace)"
    )


def _affixes(core: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the file's post-processor puts before and after a text."""
    bare = core.encode("a", add_special_tokens=False).ids
    dressed = core.encode("a", add_special_tokens=True).ids
    for start in range(len(dressed) - len(bare) + 1):
        if dressed[start : start + len(bare)] == bare:
            return tuple(dressed[:start]), tuple(dressed[start + len(bare) :])
    return (), ()


def _declared(config: Fields) -> dict[int, AddedToken]:
    """``added_tokens_decoder`` of tokenizer_config.json: tokens by id, with their flags."""
    table = config.nested("added_tokens_decoder")
    found: dict[int, AddedToken] = {}
    for key, value in (table.values if table else {}).items():
        if (
            not key.isascii()
            or not key.isdigit()
            or len(key) > 8
            or int(key) >= _MAX_ID
            or not isinstance(value, dict)
        ):
            raise config.error("added_tokens_decoder", f"has a bad entry {shown(key)}: {REMEDY}")
        token = Fields(f"{config.source}: added_tokens_decoder.{key}", value)
        found[int(key)] = AddedToken(
            token.text("content"),
            single_word=token.flag("single_word", False),
            lstrip=token.flag("lstrip", False),
            rstrip=token.flag("rstrip", False),
            normalized=token.flag("normalized", False),
            special=token.flag("special", False),
        )
    return dict(sorted(found.items()))


def _add_declared(core: Tokenizer, declared: dict[int, AddedToken], config: Fields) -> None:
    """Adds what tokenizer_config.json declares and tokenizer.json lacks."""
    known = core.get_added_tokens_decoder()
    for token_id, token in declared.items():
        if token_id in known:
            continue
        core.add_tokens([token])
        if core.token_to_id(token.content) != token_id:
            raise config.error(
                "added_tokens_decoder",
                f"puts {shown(token.content)} at {token_id}, which tokenizer.json does not allow",
            )


# --- tokenizer.model ---------------------------------------------------------------------------------------


def _from_model(folder: Path, model: spm.SpmModel, config: Fields, names: dict[str, str]) -> Tokenizer:
    """The SentencePiece model with the folder's added tokens in the places that the folder gives them, which may be
    places of unused pieces."""
    path = str(folder / "tokenizer.model")
    pieces = list(model.pieces)
    for name, place in (("bos_token", model.bos_id), ("eos_token", model.eos_id), ("pad_token", model.pad_id)):
        if 0 <= place < len(pieces):
            names.setdefault(name, pieces[place].text)
    added = _declared(config) or _legacy_added(folder)
    for token_id, token in added.items():
        kind = spm.CONTROL if token.special else spm.USER_DEFINED
        if token_id > len(pieces):
            raise ModelError(
                f"{folder}: added token {shown(token.content)} at {token_id} leaves a gap: {REMEDY}"
            )
        pieces[token_id : token_id + 1] = [spm.Piece(token.content, 0.0, kind)]
    known = {piece.text for piece in pieces}
    specials = [text for text in dict.fromkeys(names.values()) if text in known]
    return spm.build(msgspec.structs.replace(model, pieces=pieces), path, specials)


def _legacy_added(folder: Path) -> dict[int, AddedToken]:
    """``added_tokens.json``: {text: id}, the form before added_tokens_decoder."""
    fields = _optional_json(folder / "added_tokens.json")
    ids = {text: fields.integer(text, 0, _MAX_ID) for text in fields.values}
    by_id = sorted((token_id, text) for text, token_id in ids.items())
    return {token_id: AddedToken(text, normalized=False, special=True) for token_id, text in by_id}


# --- what lies beside --------------------------------------------------------------------------------------


def _special_texts(folder: Path, config: Fields) -> dict[str, str]:
    """bos_token and the like, from tokenizer_config.json or special_tokens_map.json."""
    found: dict[str, str] = {}
    for fields in (_optional_json(folder / "special_tokens_map.json"), config):
        for name in NAMED_SPECIALS:
            value = fields.values.get(name)
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                found[name] = content
            elif content is not None:
                raise fields.error(name, f"is {shown(value)}, not a token's text: {REMEDY}")
    return found


def _eos_ids(folder: Path, core: Tokenizer, eos: int | None) -> tuple[int, ...]:
    """Every token that ends an answer: as the folder's files say, and the usual end-of-turn tokens."""
    ends = set() if eos is None else {eos}
    for name in ("generation_config.json", "config.json"):
        ends |= set(_optional_json(folder / name).token_ids("eos_token_id", _MAX_ID))
    added = core.get_added_tokens_decoder().items()
    ends |= end_of_turn_ids((token_id, token.content) for token_id, token in added if token.special)
    return tuple(sorted(ends))


def _templates(folder: Path, config: Fields) -> dict[str, str]:
    """Chat templates by name: files win over tokenizer_config.json, whose entry is one text or a list of named ones."""
    found = _listed_templates(config)
    files = {"default": folder / _TEMPLATE_FILE}
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        files[path.stem] = path
    found.update({name: _read_template(path) for name, path in files.items() if path.exists()})
    return found


def _listed_templates(config: Fields) -> dict[str, str]:
    value = config.values.get("chat_template")
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise config.error("chat_template", f"is {shown(value)}, not a text or a list of named ones: {REMEDY}")
    entries = [Fields(f"{config.source}: chat_template", entry) for entry in value]
    return {entry.text("name"): entry.text("template") for entry in entries}


def _read_template(path: Path) -> str:
    content = path.read_bytes()
    if len(content) > _MAX_TEMPLATE_BYTES:
        raise ModelError(f"{path}: larger than {_MAX_TEMPLATE_BYTES >> 20} MiB, too large for a chat template")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: not UTF-8 text ({error}): {REMEDY}") from error
