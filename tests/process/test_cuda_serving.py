"""A server whose rank computes with the emulated CUDA library: the CPU kernels' tokens over HTTP."""

from dataclasses import dataclass
from pathlib import Path

import emulated
import pytest
import tokenizers
import torch
import transformers
from server import running_server
from tokenizers import decoders, models, pre_tokenizers

FLAGS = ("--dtype", "bfloat16", "--instance_num", "3", "--session_len", "64", "--max_prefill_token_num", "16")
PROMPTS = ["a", "The quick brown fox jumps over", "lazy dogs", "0123456789" * 3]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers whose tokens are bytes, with logits wide enough that few are near ties."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(11)
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 2 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1
            parameter.copy_(torch.randn_like(parameter) * spread)
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.save(str(folder / "tokenizer.json"))
    return folder


@dataclass(frozen=True)
class Answer:
    """tokens, and by how much each beat the next best."""

    tokens: list[str]
    leads: list[float]


def answers(folder: Path, env: dict[str, str], *flags: str) -> list[Answer]:
    """Greedy, to each prompt."""
    found = []
    with running_server(str(folder), *FLAGS, *flags, env=env) as server:
        for prompt in PROMPTS:
            body = {"model": folder.name, "prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 2}
            status, answer = server.post("/v1/completions", body)
            assert status == 200, answer
            told = answer["choices"][0]["logprobs"]
            best = [sorted(top.values(), reverse=True) for top in told["top_logprobs"]]
            found.append(Answer(told["tokens"], [values[0] - values[1] for values in best]))
    return found


def test_the_same_tokens_as_on_the_cpu(tiny: Path) -> None:
    """But for what follows a near tie, which activations of 16 bits may turn round."""
    expected = answers(tiny, {})
    found = answers(tiny, {"SHOAL_CUDA_LIBRARY": str(emulated.build())}, "--device", "cuda")
    agreed = 0
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours.tokens) == len(theirs.tokens) == 12
        same = next(
            (i for i, pair in enumerate(zip(ours.tokens, theirs.tokens, strict=True)) if pair[0] != pair[1]), 12
        )
        agreed += same
        assert same == 12 or theirs.leads[same] < 0.1, (same, theirs)
    assert agreed > 30
