"""GGUF files: tiny ones of each architecture that llama.cpp's converter writes, and the two real models.

The tiny ones are written with the ``gguf`` package's own tensor names; their q and k rows are put in pairs as the
converter does for architectures that llama.cpp rotates so.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from decoding import Driver, Sequence, load_file_or_folder
from models import default_model_path, gemma_path
from tiny_models import (
    FAMILIES,
    GEMMA,
    LENGTH,
    SHAPE,
    SQUARE,
    YARN_ROPE,
    Family,
    random_ids,
    random_model,
    reference_logits,
)
from torch import Tensor
from torch.testing import assert_close
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from shoal.checkpoint.gguf import GgufFile

FILES = {
    "llama-tied-linear": ("llama", FAMILIES["llama2-tied-linear"]),
    "llama3.1": ("llama", FAMILIES["llama3.1"]),
    "llama-biased": ("llama", Family("LlamaConfig", {"attention_bias": True, "mlp_bias": True})),
    "internlm2": ("internlm2", Family("LlamaConfig", SQUARE)),
    "qwen2": ("qwen2", Family("Qwen2Config", SQUARE)),
    "qwen3-yarn": ("qwen3", Family("Qwen3Config", {"rope_parameters": YARN_ROPE})),
    "gemma3": ("gemma3", Family("Gemma3TextConfig", GEMMA | {"query_pre_attn_scalar": SHAPE["head_dim"]})),
}
"""llama.cpp's name of the architecture, and a model that its file format can express."""
IN_PAIRS = {"llama", "internlm2"}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("architecture", "family"), FILES.values(), ids=FILES.keys())
def test_tiny_file_equals_transformers(architecture: str, family: Family, tmp_path: Path) -> None:
    model = random_model(family)
    write_gguf(tmp_path / "tiny.gguf", model, architecture)
    ids = random_ids(LENGTH)
    description, parameters = load_file_or_folder(tmp_path / "tiny.gguf")
    expected = reference_logits(model, ids)
    assert expected.std() >= 1
    found = Driver(description, parameters, LENGTH).logits([(Sequence(ids), LENGTH)])
    assert_close(found, expected, atol=1e-4, rtol=0)


def write_gguf(path: Path, model: Any, architecture: str) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    write_metadata(writer, model.config, architecture)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], SHAPE["num_hidden_layers"])
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        stem, kind = name.rsplit(".", 1)
        written = names.get_name(stem)
        assert written is not None, name
        writer.add_tensor(f"{written}.{kind}", converted(name, tensor, model.config, architecture).numpy())
    if model.config.rope_parameters.get("rope_type") == "llama3":
        rotary = model.model.rotary_emb
        plain, _ = rotary.compute_default_rope_parameters(model.config)
        writer.add_tensor("rope_freqs.weight", (plain / rotary.inv_freq).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_metadata(writer: gguf.GGUFWriter, config: Any, architecture: str) -> None:
    writer.add_context_length(LENGTH)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token{index}" for index in range(config.vocab_size)])
    rope = config.rope_parameters
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])


def converted(name: str, tensor: Tensor, config: Any, architecture: str) -> Tensor:
    if architecture == "gemma3" and "norm" in name:
        return tensor + 1
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for projection, count in heads.items():
        if projection in name and architecture in IN_PAIRS:
            return tensor.reshape(count, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
    return tensor


def tokens_of(path: Path) -> list[str]:
    with GgufFile(path) as file:
        return list(file.metadata["tokenizer.ggml.tokens"])


def continuation(path: Path, words: list[str], num_tokens: int) -> str:
    """Greedy, through a prefill and decode steps."""
    description, parameters = load_file_or_folder(path)
    tokens = tokens_of(path)
    sequence = Sequence([tokens.index(word) for word in words])
    driver = Driver(description, parameters, 64)
    count = len(sequence.ids)
    for _ in range(num_tokens):
        sequence.ids.append(int(driver.logits([(sequence, count)])[-1].argmax()))
        count = 1
    return "".join(tokens[index] for index in sequence.ids[len(words) :])


def test_smollm2_knows_the_capital_of_france() -> None:
    assert "ĠParis" in continuation(default_model_path(), ["The", "Ġcapital", "Ġof", "ĠFrance", "Ġis"], 4)


def test_gemma_counts_on() -> None:
    words = ["<bos>", *"1,2,3,4,5,6,"]
    assert continuation(gemma_path(), words, 4) == "7,8,"


SMOLLM2 = transformers.LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    tie_word_embeddings=True,
)
GEMMA_270M = transformers.Gemma3TextConfig(
    vocab_size=262144,
    hidden_size=640,
    intermediate_size=2048,
    num_hidden_layers=18,
    num_attention_heads=4,
    num_key_value_heads=1,
    max_position_embeddings=32768,
    sliding_window=512,
)


@pytest.mark.parametrize(
    ("find", "config"), [(default_model_path, SMOLLM2), (gemma_path, GEMMA_270M)], ids=["smollm2", "gemma"]
)
def test_real_file_equals_transformers_reading_it(find: Callable[[], Path], config: Any) -> None:
    path = find()
    model = reference_model(path, config)
    ids = [1, *(random.randrange(model.config.vocab_size) for _ in range(28))]
    expected = reference_logits(model, ids)
    del model
    description, parameters = load_file_or_folder(path)
    found = Driver(description, parameters, 64).logits([(Sequence(ids), len(ids))])
    assert_close(found, expected, atol=1e-3 * float(expected.std()), rtol=0)


def reference_model(path: Path, config: Any) -> Any:
    """transformers' own reading of a GGUF file, without the package ``accelerate`` that from_pretrained wants."""
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    result = model.load_state_dict(tensors, strict=False, assign=True)
    assert (result.missing_keys, result.unexpected_keys) == (["lm_head.weight"], [])
    model.tie_weights()
    return model.eval()
