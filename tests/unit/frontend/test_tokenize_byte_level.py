"""Byte-level BPE: Hugging Face folders, and the same vocabulary rebuilt from GGUF metadata."""

import functools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tough_texts import WRITTEN, tough_texts

from shoal.errors import ModelError, RequestError
from shoal.tokenizer import Tokenizer, load_tokenizer
from shoal.tokenizer.gguf import rebuild

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@functools.cache
def trained() -> str:
    """A SmolLM2-like tokenizer.json: each digit by itself, then GPT-2's pattern."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        show_progress=False,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator(WRITTEN * 2, trainer)
    core.add_tokens([AddedToken("<tool>", normalized=False)])
    return core.to_str()


def folder(path: Path, content: str | None = None, **config: Any) -> str:
    (path / "tokenizer.json").write_text(trained() if content is None else content)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return str(path)


def gguf_form(**more: Any) -> dict[str, object]:
    file = json.loads(trained())
    vocab = dict(file["model"]["vocab"]) | {token["content"]: token["id"] for token in file["added_tokens"]}
    tokens = sorted(vocab, key=vocab.__getitem__)
    kinds = [3 if token in SPECIALS else 4 if token == "<tool>" else 1 for token in tokens]
    ggml = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": np.array(kinds, np.int32),
        "merges": [" ".join(merge) for merge in file["model"]["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in ggml.items()}


def test_rebuilt_from_gguf_it_gives_the_ids_of_tokenizer_json() -> None:
    reference = tokenizers.Tokenizer.from_str(trained())
    tokenizer = Tokenizer(rebuild(gguf_form(), "x.gguf"))
    texts = tough_texts(random.randrange(1 << 30), (*SPECIALS, "<tool>"))
    for text, ids in zip(texts, tokenizer.encode_batch(texts, add_special=True), strict=True):
        assert ids == reference.encode(text).ids, repr(text)
        assert tokenizer.decode(ids, skip_special=False) == text
        assert tokenizer.decode(ids) == reference.decode(ids)
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.eos_ids == (0, 2)
    assert tokenizer.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


def test_random_ids_decode_as_the_library_does(tmp_path: Path) -> None:
    reference = tokenizers.Tokenizer.from_str(trained())
    tokenizer = load_tokenizer(folder(tmp_path))
    rng = random.Random()
    for _ in range(400):
        ids = [rng.choice((rng.randrange(3, 259), rng.randrange(950))) for _ in range(rng.randrange(15))]
        for skip in (True, False):
            assert tokenizer.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip), ids


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "I'm 1234  ok\n\n x", ["I", "'m", " 1234", " ", " ok", "\n\n", " x"]),
        ("smollm", "a 1234", ["a", " ", "1", "2", "3", "4"]),
        ("llama-bpe", "WE'LL 12345\n\n  x", ["WE", "'LL", " ", "123", "45", "\n\n", " ", " x"]),
        ("qwen2", "(foo 123)\n", ["(foo", " ", "1", "2", "3", ")\n"]),
        ("tekken", "camelCase 12", ["camel", "Case", " ", "1", "2"]),
        ("default", "a, 12345 b", ["a", ",", " ", "123", "45", " b"]),
    ],
)
def test_the_named_pre_tokenizer_splits_the_text(pre: str, text: str, words: list[str]) -> None:
    core = rebuild(gguf_form(pre=pre), "x.gguf").core
    assert core.pre_tokenizer is not None
    found = [word for word, _ in core.pre_tokenizer.pre_tokenize_str(text)]
    assert [decoders.ByteLevel().decode([word]) for word in found] == words


def test_gguf_flags_and_templates() -> None:
    metadata = gguf_form(add_bos_token=True, add_eos_token=True, eot_token_id=0)
    metadata |= {"tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "tools"}
    tokenizer = Tokenizer(rebuild(metadata, "x.gguf"))
    assert tokenizer.encode("", add_special=True) == [1, 2]
    assert tokenizer.encode("", add_special=False) == []
    assert (tokenizer.chat_template, tokenizer.tool_template) == ("plain", "tools")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pre", "no-such-splitter"),
        ("merges", None),
        ("merges", ["ab"]),
        ("merges", ["a b c"]),
        ("tokens", ["a", "a"]),
        ("eos_token_id", -1),
        ("add_eos_token", "yes"),
    ],
)
def test_damaged_gguf_fields_are_named(field: str, value: object) -> None:
    metadata = gguf_form(token_type=None)
    metadata[f"tokenizer.ggml.{field}"] = value
    with pytest.raises(ModelError, match=rf"^x\.gguf: tokenizer\.ggml\.{field} "):
        rebuild(metadata, "x.gguf")


def test_merges_outside_the_vocabulary_are_an_error() -> None:
    with pytest.raises(ModelError, match=r"^x\.gguf: the tokenizer cannot be built"):
        rebuild(gguf_form(merges=["nowhere tobefound"]), "x.gguf")


def test_folder_with_everything_beside(tmp_path: Path) -> None:
    path = folder(
        tmp_path,
        bos_token="<|im_start|>",
        eos_token={"content": "<|im_end|>"},
        add_bos_token=True,
        added_tokens_decoder={"2": {"content": "<|im_end|>", "special": True}},
        chat_template=[{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}],
    )
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|endoftext|>"}))
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("<|im_end|>", add_special=True) == [1, 2]
    assert tokenizer.eos_ids == (0, 2, 5, 7)
    assert tokenizer.special_tokens == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    assert (tokenizer.chat_template, tokenizer.tool_template) == ("one", "two")
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert load_tokenizer(path).chat_template == "from the file"


def test_the_post_processor_says_what_surrounds_a_text(tmp_path: Path) -> None:
    core = tokenizers.Tokenizer.from_str(trained())
    core.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    core.enable_truncation(3)
    core.enable_padding(length=50)
    tokenizer = load_tokenizer(folder(tmp_path, core.to_str()))
    bare = tokenizer.encode("a longer text", add_special=False)
    assert len(bare) > 3
    assert tokenizer.encode("a longer text", add_special=True) == [1, *bare, 2]


def test_tokens_declared_beside_are_added_or_renamed(tmp_path: Path) -> None:
    size = tokenizers.Tokenizer.from_str(trained()).get_vocab_size()
    file = json.loads(trained())
    merged = {piece for merge in file["model"]["merges"] for piece in (*merge, "".join(merge))}
    unused = next(n for piece, n in file["model"]["vocab"].items() if n > 2 and piece not in merged)
    declared = {
        str(unused): {"content": "<over>", "special": True},
        str(size): {"content": "<new>", "special": True},
    }
    tokenizer = load_tokenizer(folder(tmp_path, json.dumps(file), added_tokens_decoder=declared))
    assert tokenizer.encode("<over><new>", add_special=False) == [unused, size]
    assert tokenizer.decode([unused, size]) == ""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json: not a tokenizer file"),
        ("tokenizer.json", "[" * 100_000, "tokenizer.json: not a tokenizer file"),
        ("tokenizer.json", "{}", "tokenizer.json: its decoder is"),
        (
            "tokenizer.json",
            '{"decoder": {"type": "ByteLevel"}}',
            "tokenizer.json: the tokenizer cannot be built",
        ),
        ("tokenizer_config.json", '{"bos_token": 3}', "bos_token is 3"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template is 3"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}', "template is missing"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"-1": {"content": "x"}}}',
            "added_tokens_decoder has",
        ),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"99999": {"content": "x"}}}',
            "added_tokens_decoder puts",
        ),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id has 'x'"),
    ],
)
def test_damaged_folders_are_named_errors(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = folder(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ModelError) as caught:
        load_tokenizer(path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json and no tokenizer\.model: copy them"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ModelError, match="no such model"):
        load_tokenizer(str(tmp_path / "nowhere"))


def test_a_lone_surrogate_is_the_client_s_error(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="lone surrogate at character 1"):
        load_tokenizer(folder(tmp_path)).encode("a\ud800", add_special=True)
