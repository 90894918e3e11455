"""``suffix``: prompts in the form that each family of code models was trained on."""

import pytest
import tokenizers
from frontend_kit import Kit, byte_tokenizer
from tokenizers import decoders, models, pre_tokenizers

from shoal.frontend.infill import infill_of
from shoal.frontend.prompts import continuation_ids
from shoal.tokenizer import Tokenizer
from shoal.tokenizer.parts import TokenizerParts
from shoal.wire import unpack_ids

FAMILIES = {
    "qwen": (["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|endoftext|>", "<|file_sep|>"], "PxSyM"),
    "starcoder": (["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<|endoftext|>"], "PxSyM"),
    "santacoder": (["<fim-prefix>", "<fim-suffix>", "<fim-middle>", "<|endoftext|>"], "PxSyM"),
    "codellama": (["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"], "PxSyM"),
    "deepseek": (
        ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", "<｜end▁of▁sentence｜>"],
        "PxSyM",
    ),
    "codestral": (["[PREFIX]", "[SUFFIX]"], "SyPx"),
}


def _tokenizer(special: list[str], opening: bool = True) -> Tokenizer:
    """One token a byte; 256 begins a text; then the special tokens, in order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", *special])
    return Tokenizer(
        TokenizerParts(
            core=core,
            spelling="byte_level",
            strips_first_space=False,
            prefix=(256,) if opening else (),
            bos_id=256,
            eos_ids=(256,),
            special_tokens={},
            chat_templates={},
        )
    )


def _spelled(tokenizer: Tokenizer, special: list[str], layout: str) -> list[int]:
    ids: list[int] = [256]
    for letter in layout:
        if letter in "PSM":
            ids.append(257 + "PSM".index(letter))
        else:
            ids += tokenizer.encode({"x": "def f(", "y": "):\n"}[letter], False)
    return ids


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layout_of_each_family(family: str) -> None:
    special, layout = FAMILIES[family]
    tokenizer = _tokenizer(special)
    infill = infill_of(tokenizer)
    assert infill is not None
    prompt = infill.prompt(tokenizer, tokenizer.encode("def f(", False), "):\n")
    assert prompt == _spelled(tokenizer, special, layout)
    assert infill.end_ids == tuple(range(257 + (2 if layout == "SyPx" else 3), 257 + len(special)))


def test_a_model_without_such_tokens() -> None:
    assert infill_of(byte_tokenizer()) is None
    result = Kit().complete("a", suffix="b")
    assert result.status_code == 400
    assert "fill in the middle" in result.json["error"]["message"]
    assert Kit().complete("a", suffix="").status_code == 200


def test_the_route_submits_it_and_its_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    special, layout = FAMILIES["qwen"]
    kit = _with_tokenizer(monkeypatch, special)
    kit.says("x", end=False)
    answer = kit.complete("def f(", suffix="):\n", echo=True)
    assert answer.json["choices"][0]["text"] == "def f(x"
    submit = kit.scheduler.submits[-1]
    assert unpack_ids(submit.prompt) == _spelled(kit.tokenizer, special, layout)
    assert set(submit.stop_ids) >= {260, 261}
    kit.complete("def f(", suffix="):\n", ignore_eos=True)
    assert kit.scheduler.submits[-1].stop_ids == ()
    kit.complete([*kit.ids("def f(")], suffix="):\n")
    assert unpack_ids(kit.scheduler.submits[-1].prompt) == _spelled(kit.tokenizer, special, layout)
    kit.complete("", suffix="z")
    assert unpack_ids(kit.scheduler.submits[-1].prompt) == [256, 257, 258, *kit.ids("z"), 259]


def test_an_echo_of_its_log_probabilities_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kit = _with_tokenizer(monkeypatch, FAMILIES["qwen"][0])
    assert kit.complete("a", suffix="b", echo=True, logprobs=1).json["error"]["param"] == "suffix"
    assert kit.complete("a", suffix="b", logprobs=1).status_code == 200


def test_what_follows_has_no_space_of_the_tokenizers_own() -> None:
    """SentencePiece puts a space before every text; within one there is none."""
    pieces = ["<unk>", "▁", "a", "b", "▁a", "▁b", "ab", "▁ab", "<0x0A>"]
    core = tokenizers.Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], 0, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(
        TokenizerParts(
            core=core,
            spelling="sentencepiece",
            strips_first_space=True,
            special_tokens={},
            chat_templates={},
        )
    )
    assert tokenizer.encode("ab", False) == [pieces.index("▁ab")]
    assert continuation_ids(tokenizer, "ab") == [pieces.index("ab")]
    assert continuation_ids(tokenizer, " ab") == [pieces.index("▁ab")]


def _with_tokenizer(monkeypatch: pytest.MonkeyPatch, special: list[str]) -> Kit:
    """A server of a model with these tokens."""
    tokenizer = _tokenizer(special)
    monkeypatch.setattr("frontend_kit.byte_tokenizer", lambda *_: tokenizer)
    kit = Kit()
    kit.service.vocab_size = tokenizer.vocab_size
    return kit
