"""What a GGUF file's metadata and tensors say about the model, for each architecture and for wrong ones."""

from pathlib import Path

import numpy as np
import pytest
from models import default_model_path, gemma_path
from unit.checkpoint.gguf_bytes import (
    ARRAY,
    BOOL,
    FLOAT32,
    INT32,
    STRING,
    UINT32,
    Gguf,
    Tensor,
    array,
    packed,
    text,
)

from shoal.checkpoint.description import ModelDescription, Rope
from shoal.checkpoint.gguf import GgufFile, GgufType
from shoal.checkpoint.gguf_metadata import describe_gguf
from shoal.errors import ModelError

NUMBERS = {
    "block_count": 7, "embedding_length": 64, "feed_forward_length": 96, "context_length": 512,
    "attention.head_count": 4, "attention.head_count_kv": 2,
}  # fmt: skip
Value = tuple[int, object]


def f32(name: str, *shape: int, values: object = 0.0) -> Tensor:
    return Tensor(name, GgufType.F32, shape, np.full(shape, values, np.float32).tobytes())


def described(
    folder: Path, architecture: str, changes: dict[str, Value | None] | None = None, *tensors: Tensor
) -> ModelDescription:
    """A small model; changes replace metadata (of the architecture where they start with a dot) or leave it away."""
    metadata: dict[str, Value | None] = {"general.architecture": (STRING, architecture)}
    metadata |= {f".{name}": (UINT32, number) for name, number in NUMBERS.items()}
    metadata |= {".attention.layer_norm_rms_epsilon": (FLOAT32, 0.5**17)}
    metadata |= {"tokenizer.ggml.tokens": words(*(f"t{number}" for number in range(90)))} | (changes or {})
    pairs = [
        (architecture * (key[0] == ".") + key, *value) for key, value in metadata.items() if value is not None
    ]
    path = folder / "model.gguf"
    named = {tensor.name: tensor for tensor in (f32("token_embd.weight", 90, 64), *tensors)}
    path.write_bytes(Gguf(list(pairs), list(named.values())).build())
    return describe_gguf(GgufFile(path))


def words(*tokens: str) -> Value:
    return ARRAY, array(STRING, [text(token) for token in tokens])


def test_a_plain_llama(tmp_path: Path) -> None:
    ids: dict[str, Value | None] = {
        "tokenizer.ggml.bos_token_id": (UINT32, 1),
        "tokenizer.ggml.eos_token_id": (UINT32, 2),
        "tokenizer.ggml.eot_token_id": (UINT32, 5),
    }
    assert described(tmp_path, "llama", ids, f32("output.weight", 90, 64)) == ModelDescription(
        family="llama",
        vocab_size=90,
        hidden_size=64,
        num_layers=7,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        ffn_size=96,
        max_position=512,
        norm_eps=0.5**17,
        rope=Rope(dim=16),
        layer_windows=(0,) * 7,
        attention_scale=0.25,
        bos_id=1,
        eos_ids=(2, 5),
    )


def test_biases_and_the_tied_head_are_told_by_the_tensors(tmp_path: Path) -> None:
    biases = [f32(f"blk.0.{name}.bias", 64) for name in ("attn_q", "attn_output", "ffn_gate")]
    model = described(tmp_path, "qwen2", {}, *biases)
    assert (model.qkv_bias, model.output_bias, model.ffn_bias, model.tied_head) == (True, True, True, True)


def test_turn_ends_are_found_by_name(tmp_path: Path) -> None:
    changes: dict[str, Value | None] = {
        "tokenizer.ggml.tokens": words("<|endoftext|>", "a", "<|im_end|>", "b"),
        "tokenizer.ggml.eos_token_id": (UINT32, 2),
    }
    assert described(tmp_path, "qwen3", changes).eos_ids == (2, 0)


def test_rope_scalings(tmp_path: Path) -> None:
    def rope(**changes: Value) -> tuple[Rope, int]:
        keys = {f".rope.{name.replace('__', '.')}": value for name, value in changes.items()}
        model = described(tmp_path, "llama", dict(keys))
        return model.rope, model.max_position

    linear = Rope(theta=500.0, dim=16, scaling="linear", factor=4.0, original_max_position=512)
    given = {
        "freq_base": (FLOAT32, 500.0),
        "scaling__type": (STRING, "linear"),
        "scaling__factor": (FLOAT32, 4.0),
    }
    assert rope(**given) == (linear, 512)
    assert rope(freq_base=(FLOAT32, 500.0), scale_linear=(FLOAT32, 4.0)) == (linear, 512)
    yarn = {"scaling__type": (STRING, "yarn"), "scaling__factor": (FLOAT32, 4.0)}
    trained = yarn | {"scaling__original_context_length": (UINT32, 256)}
    assert rope(**yarn) == (Rope(dim=16, scaling="yarn", factor=4.0, original_max_position=512), 512)
    assert rope(**trained) == (Rope(dim=16, scaling="yarn", factor=4.0, original_max_position=256), 1024)
    louder, _ = rope(**yarn, scaling__attn_factor=(FLOAT32, 2.0))
    assert louder.attention_factor == pytest.approx(2 * (0.1 * np.log(4.0) + 1))
    assert rope(scaling__type=(STRING, "none"), scaling__factor=(FLOAT32, 4.0)) == (Rope(dim=16), 512)


def test_rope_frequencies_as_a_tensor(tmp_path: Path) -> None:
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    model = described(tmp_path, "llama", {}, f32("rope_freqs.weight", 8, values=factors))
    assert model.rope.freq_factors == tuple(factors.tolist())


def test_gemma(tmp_path: Path) -> None:
    changes: dict[str, Value | None] = {
        ".attention.key_length": (UINT32, 32),
        ".attention.value_length": (UINT32, 32),
        ".attention.sliding_window": (UINT32, 11),
        ".rope.freq_base": (FLOAT32, 1e6),
        ".rope.scaling.type": (STRING, "linear"),
        ".rope.scaling.factor": (FLOAT32, 8.0),
    }
    model = described(tmp_path, "gemma3", changes)
    assert model.layer_windows == (11, 11, 11, 11, 11, 0, 11)
    assert model.rope == Rope(theta=1e6, dim=32, scaling="linear", factor=8.0, original_max_position=512)
    assert model.local_rope == Rope(dim=32)
    assert (model.norm_weight_offset, model.embedding_scale, model.attention_scale) == (0.0, 8.0, 32**-0.5)
    assert (model.qk_norm, model.post_norms, model.activation) == (True, True, "gelu_tanh")
    changes[".attention.sliding_window_pattern"] = (UINT32, 2)
    assert described(tmp_path, "gemma3", changes).layer_windows == (11, 0) * 3 + (11,)
    flags = array(BOOL, [packed(BOOL, number % 3 == 0) for number in range(7)])
    changes[".attention.sliding_window_pattern"] = (ARRAY, flags)
    assert described(tmp_path, "gemma3", changes).layer_windows == (11, 0, 0, 11, 0, 0, 11)
    changes |= {".block_count": (UINT32, 62), ".attention.sliding_window_pattern": None}
    assert described(tmp_path, "gemma3", changes).attention_scale == (64 / 4) ** -0.5


BAD: dict[str, tuple[dict[str, Value | None], str]] = {
    "architecture": ({"general.architecture": (STRING, "mamba")}, "general.architecture is 'mamba'"),
    "architecture missing": ({"general.architecture": None}, "general.architecture is missing"),
    "architecture a number": ({"general.architecture": (UINT32, 3)}, "general.architecture is 3"),
    "experts": ({".expert_count": (UINT32, 8)}, "llama.expert_count"),
    "layers missing": ({".block_count": None}, "llama.block_count is missing"),
    "layers huge": ({".block_count": (UINT32, 2**31)}, "llama.block_count"),
    "heads 0": ({".attention.head_count": (UINT32, 0)}, "llama.attention.head_count is 0"),
    "heads negative": ({".attention.head_count": (INT32, -4)}, "llama.attention.head_count is -4"),
    "heads as a list": (
        {".attention.head_count": (ARRAY, array(INT32, [bytes(4)] * 50))},
        "attention.head_count is",
    ),
    "heads true": ({".attention.head_count": (BOOL, True)}, "llama.attention.head_count is True"),
    "KV heads": ({".attention.head_count_kv": (UINT32, 3)}, "llama.attention.head_count_kv is 3"),
    "hidden size": ({".embedding_length": (UINT32, 62)}, "llama.embedding_length is 62"),
    "head size": ({".attention.head_count": (UINT32, 6)}, "llama.embedding_length is 64"),
    "head size odd": ({".attention.key_length": (UINT32, 9)}, "llama.attention.key_length comes to 9"),
    "value size": ({".attention.value_length": (UINT32, 8)}, "llama.attention.value_length is 8"),
    "partial rope": ({".rope.dimension_count": (UINT32, 8)}, "llama.rope.dimension_count is 8"),
    "epsilon missing": ({".attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
    "epsilon NaN": (
        {".attention.layer_norm_rms_epsilon": (FLOAT32, float("nan"))},
        "layer_norm_rms_epsilon is nan",
    ),
    "theta infinite": ({".rope.freq_base": (FLOAT32, float("inf"))}, "llama.rope.freq_base is inf"),
    "longrope": (
        {".rope.scaling.type": (STRING, "longrope"), ".rope.scaling.factor": (FLOAT32, 4.0)},
        "llama.rope.scaling.type is 'longrope'",
    ),
    "rope factor": (
        {".rope.scaling.type": (STRING, "linear"), ".rope.scaling.factor": (FLOAT32, 0.5)},
        "llama.rope.scaling.factor is 0.5",
    ),
    "context": ({".context_length": (UINT32, 0)}, "llama.context_length is 0"),
    "too many tokens": (
        {"tokenizer.ggml.tokens": words(*"x" * 91)},
        "token_embd.weight has 90 rows for 91 tokens",
    ),
    "tokens no list": ({"tokenizer.ggml.tokens": (STRING, "abc")}, "tokenizer.ggml.tokens is 'abc'"),
    "eos outside": ({"tokenizer.ggml.eos_token_id": (UINT32, 90)}, "tokenizer.ggml.eos_token_id has 90"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses_by_name(case: str, tmp_path: Path) -> None:
    changes, expected = BAD[case]
    with pytest.raises(ModelError) as caught:
        described(tmp_path, "llama", changes)
    assert str(tmp_path / "model.gguf") in str(caught.value)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refuses_wrong_tensors(tmp_path: Path) -> None:
    for tensor in (
        f32("rope_freqs.weight", 9),
        f32("rope_freqs.weight", 8),
        f32("rope_freqs.weight", 8, values=np.inf),
    ):
        with pytest.raises(ModelError, match=r"rope_freqs\.weight"):
            described(tmp_path, "llama", {}, tensor)
    with pytest.raises(ModelError, match=r"token_embd\.weight is \(64, 90\)"):
        described(tmp_path, "llama", {}, f32("token_embd.weight", 64, 90))
    path = tmp_path / "empty.gguf"
    path.write_bytes(Gguf().build())
    with pytest.raises(ModelError, match=r"general\.architecture is missing"):
        describe_gguf(GgufFile(path))


def test_smollm2() -> None:
    model = describe_gguf(GgufFile(default_model_path()))
    assert (model.family, model.num_layers, model.hidden_size, model.vocab_size) == ("llama", 30, 576, 49152)
    assert (model.num_heads, model.num_kv_heads, model.head_dim, model.ffn_size) == (9, 3, 64, 1536)
    assert (model.max_position, model.rope) == (8192, Rope(theta=100000.0, dim=64))
    assert (model.tied_head, model.qkv_bias, model.bos_id, model.eos_ids) == (True, False, 1, (2, 0))


def test_gemma_270m() -> None:
    model = describe_gguf(GgufFile(gemma_path()))
    assert (model.family, model.num_layers, model.hidden_size, model.vocab_size) == ("gemma3", 18, 640, 262144)
    assert (model.num_heads, model.num_kv_heads, model.head_dim) == (4, 1, 256)
    assert model.layer_windows == (512, 512, 512, 512, 512, 0) * 3
    assert (model.max_position, model.bos_id, model.eos_ids) == (32768, 2, (1, 106))
