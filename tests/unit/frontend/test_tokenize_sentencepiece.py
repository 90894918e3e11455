"""tokenizer.model files and their GGUF form against the sentencepiece package's own ids, on models trained here."""

import functools
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tough_texts import WRITTEN, tough_texts

from shoal.errors import ModelError
from shoal.tokenizer import Tokenizer, load_tokenizer, spm
from shoal.tokenizer.gguf import rebuild

PLAIN = {"normalization_rule_name": "identity", "byte_fallback": True, "remove_extra_whitespaces": False}


@functools.cache
def train(algorithm: str, **options: Any) -> bytes:
    sentences = [line for text in WRITTEN for line in text.split("\n") if line] * 3
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type=algorithm,
        vocab_size=1300 if algorithm == "bpe" else 1200,
        hard_vocab_limit=False,
        character_coverage=0.985,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def folder_with(tmp_path: Path, model: bytes, config: dict[str, Any] | None = None) -> Tokenizer:
    (tmp_path / "tokenizer.model").write_bytes(model)
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("dummy_prefix", [True, False])
@pytest.mark.parametrize("remove_spaces", [True, False])
def test_bpe_ids_and_texts_are_sentencepiece_s(tmp_path: Path, dummy_prefix: bool, remove_spaces: bool) -> None:
    options = PLAIN | {"add_dummy_prefix": dummy_prefix, "remove_extra_whitespaces": remove_spaces}
    model = train("bpe", **options)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = folder_with(tmp_path, model)
    for text in tough_texts(random.randrange(1 << 30)):
        ids = reference.encode(text)
        assert tokenizer.encode(text, add_special=False) == ids, repr(text)
        assert tokenizer.encode(text, add_special=True) == [reference.bos_id(), *ids]
        if not remove_spaces:
            assert tokenizer.decode(ids) == text.replace("▁", " ")
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_random_ids_decode_as_sentencepiece_does(tmp_path: Path) -> None:
    model = train("bpe", **PLAIN)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = folder_with(tmp_path, model)
    rng = random.Random()
    for _ in range(300):
        ids = [rng.choice((rng.randrange(3, 259), rng.randrange(3, 1300))) for _ in range(rng.randrange(12))]
        if ids[:1] == [3 + ord(" ")]:
            continue  # a space spelt as a byte, which no encoder writes; here it counts as the added space
        assert tokenizer.decode(ids) == reference.decode(ids), ids


def test_unigram_ids_are_sentencepiece_s(tmp_path: Path) -> None:
    model = train("unigram", **PLAIN)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = folder_with(tmp_path, model)
    ties = 0
    for text in tough_texts(random.randrange(1 << 30)):
        theirs, ours = reference.encode(text), tokenizer.encode(text, add_special=False)
        if ours != theirs:
            assert sorted(ours) == sorted(theirs), repr(text)  # equal scores: any order is as likely
            ties += 1
        assert tokenizer.decode(ours) == text.replace("▁", " ")
    assert ties <= 20


def test_default_normalisation_rules_are_applied(tmp_path: Path) -> None:
    model = train("bpe", byte_fallback=True)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = folder_with(tmp_path, model)
    for text in ("ﬁne ①  Ａｂｃ", " two  spaces ", "カﾅ", "tab\tnew\nline"):
        assert tokenizer.encode(text, add_special=False) == reference.encode(text)


def test_user_defined_symbols_are_matched_whole(tmp_path: Path) -> None:
    model = train("bpe", **PLAIN | {"add_dummy_prefix": False}, user_defined_symbols="<sep>,<sep><sep>")
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = folder_with(tmp_path, model)
    for text in tough_texts(5, ("<sep>",)):
        assert tokenizer.encode(text, add_special=False) == reference.encode(text), repr(text)
    assert tokenizer.decode(reference.encode("a<sep>b"), skip_special=True) == "a<sep>b"


def test_added_tokens_take_the_places_that_the_folder_gives_them(tmp_path: Path) -> None:
    """InternLM 2 puts its chat tokens over unused pieces, others behind the vocabulary."""
    model = train("bpe", **PLAIN | {"add_dummy_prefix": False})
    size = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    config = {
        "added_tokens_decoder": {
            str(size - 1): {"content": "<|im_start|>", "special": True},
            str(size): {"content": "<|im_end|>", "special": True},
            str(size + 1): {"content": "<tool>", "special": False},
        },
        "eos_token": {"content": "<|im_end|>"},
        "add_bos_token": False,
        "chat_template": "{{ eos_token }}",
    }
    tokenizer = folder_with(tmp_path, model, config)
    ids = tokenizer.encode("<|im_start|>user\nhi <tool><|im_end|>", add_special=True)
    assert (ids[0], ids[-2:]) == (size - 1, [size + 1, size])
    assert tokenizer.decode(ids) == "user\nhi <tool>"
    assert tokenizer.decode(ids, skip_special=False) == "<|im_start|>user\nhi <tool><|im_end|>"
    assert tokenizer.eos_ids == (size,)
    assert tokenizer.vocab_size == size + 2
    assert tokenizer.chat_template == "{{ eos_token }}"


def gguf_form(model: bytes, **more: Any) -> dict[str, object]:
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    places = range(reference.vocab_size())
    kinds = [
        spm.UNKNOWN
        if reference.is_unknown(n)
        else spm.CONTROL
        if reference.is_control(n)
        else spm.BYTE
        if reference.is_byte(n)
        else spm.NORMAL
        for n in places
    ]
    ggml = {
        "model": "llama",
        "tokens": [reference.id_to_piece(n) for n in places],
        "scores": np.array([reference.get_score(n) for n in places], np.float32),
        "token_type": np.array(kinds, np.int32),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **more,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in ggml.items()}


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_gguf_form_gives_the_same_ids(dummy_prefix: bool) -> None:
    model = train("bpe", **PLAIN | {"add_dummy_prefix": dummy_prefix})
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = Tokenizer(rebuild(gguf_form(model, add_space_prefix=dummy_prefix), "x.gguf"))
    for text in tough_texts(random.randrange(1 << 30)):
        ids = reference.encode(text)
        assert tokenizer.encode(text, add_special=True) == [1, *ids], repr(text)
        assert tokenizer.decode(ids) == text.replace("▁", " ")
    assert tokenizer.special_ids == {0, 1, 2}


def test_token_bytes_are_exact(tmp_path: Path) -> None:
    tokenizer = folder_with(tmp_path, train("bpe", **PLAIN))
    ids = tokenizer.encode("Grüße 𐍈!", add_special=False)
    assert b"".join(map(tokenizer.token_bytes, ids)) == " Grüße 𐍈!".encode()
    assert tokenizer.token_bytes(3 + 0xE4) == b"\xe4"
    assert tokenizer.token_bytes(10**9) == tokenizer.token_bytes(-1) == b""


def test_damaged_model_files_are_named_errors(tmp_path: Path) -> None:
    """Cut short anywhere, or with bytes changed at random: a ModelError or a tokenizer, nothing else."""
    model = train("bpe", **PLAIN)
    path = tmp_path / "tokenizer.model"
    rng = random.Random()
    cuts = [model[:cut] for cut in (0, 1, 2, 3, *(rng.randrange(len(model)) for _ in range(15)))]
    changed = [bytearray(model) for _ in range(25)]
    for content in changed:
        for _ in range(rng.randrange(1, 6)):
            content[rng.randrange(len(content))] = rng.randrange(256)
    refusals: list[str] = []
    for content in [*cuts, *map(bytes, changed), b"\xff" * 100, b"\x0a\xff\xff\xff\xff\x0f", b"{}"]:
        path.write_bytes(content)
        try:
            load_tokenizer(str(tmp_path)).encode("a b é", add_special=True)
        except ModelError as error:
            refusals.append(str(error))
    assert len(refusals) >= 10
    assert all(str(path) in refusal and "\n" not in refusal for refusal in refusals)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens", None),
        ("tokens", []),
        ("tokens", [1, 2]),
        ("scores", None),
        ("scores", np.zeros(3, np.float32)),
        ("token_type", np.zeros(3, np.int32)),
        ("bos_token_id", 1 << 20),
        ("eos_token_id", "2"),
        ("add_bos_token", 1),
        ("model", "t5"),
        ("model", None),
    ],
)
def test_damaged_gguf_fields_are_named(field: str, value: object) -> None:
    metadata = gguf_form(train("bpe", **PLAIN))
    metadata[f"tokenizer.ggml.{field}"] = value
    with pytest.raises(ModelError, match=rf"^x\.gguf: tokenizer\.ggml\.{field} "):
        rebuild(metadata, "x.gguf")
