"""A server whose rank computes with the CUDA library, emulated or on a chip: the CPU kernels' tokens over HTTP."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from fp8_checkpoints import FORMATS, per_channel_in_powers_of_two
from on_chip import library_path, need_emulation
from safetensors.torch import load_file
from server import API_SERVER, free_port, running_server, wait_ready
from tokenizers import decoders, models, pre_tokenizers

from shoal.cuda_ext.cuda_binding import CudaLibrary

FLAGS = ("--dtype", "bfloat16", "--instance_num", "3", "--session_len", "64", "--max_prefill_token_num", "16")
ON_DEVICE = ("--device", "cuda")
ON_CPU = ("--device", "cpu")
PROMPTS = ["a", "The quick brown fox jumps over", "lazy dogs", "0123456789" * 3]


def on_device(**variables: str) -> dict[str, str]:
    """Emulated, there are two, unless told otherwise."""
    return {"SHOAL_CUDA_LIBRARY": str(library_path()), "SHOAL_EMULATED_DEVICES": "2", **variables}


def emulation(**variables: str) -> dict[str, str]:
    """For what cannot be had of a chip, or not of one alone."""
    need_emulation()
    return on_device(**variables)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers whose tokens are bytes, with logits wide enough that few are near ties."""
    return write_llama(tmp_path_factory.mktemp("tiny"), heads=4, kv_heads=2, head_dim=16, ffn=96, context=64)


def write_llama(folder: Path, *, heads: int, kv_heads: int, head_dim: int, ffn: int, context: int) -> Path:
    torch.manual_seed(11)
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=heads * head_dim, intermediate_size=ffn, num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        max_position_embeddings=context, bos_token_id=256, eos_token_id=257,
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


@pytest.fixture(scope="module")
def of_the_cpu(tiny: Path) -> list[Answer]:
    return answers(tiny, {}, *ON_CPU)


@pytest.mark.parametrize("tp", ["1", "2"])
def test_the_same_tokens_as_on_the_cpu(tiny: Path, of_the_cpu: list[Answer], tp: str) -> None:
    env = on_device() if tp == "1" else emulation()
    assert_alike(answers(tiny, env, *ON_DEVICE, "--tp", tp), of_the_cpu)


def test_the_same_tokens_of_an_fp8_checkpoint(tiny: Path, tmp_path: Path) -> None:
    """Whose weights the CPU dequantises and the device does not; bfloat16 holds them, so both have the same."""
    shutil.copytree(tiny, tmp_path / "fp8")
    config, tensors = json.loads((tiny / "config.json").read_text()), load_file(tiny / "model.safetensors")
    form = replace(FORMATS["compressed per channel"], scale=per_channel_in_powers_of_two)
    form.write(tmp_path / "fp8", config, tensors, {})
    found, expected = (
        answers(tmp_path / "fp8", env, *flags) for env, flags in ((on_device(), ON_DEVICE), ({}, ON_CPU))
    )
    assert_alike(found, expected)


def assert_alike(found: list[Answer], expected: list[Answer]) -> None:
    """But for what follows a near tie, which activations of 16 bits may turn round."""
    agreed = 0
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours.tokens) == len(theirs.tokens) == 12
        same = next(
            (i for i, pair in enumerate(zip(ours.tokens, theirs.tokens, strict=True)) if pair[0] != pair[1]), 12
        )
        agreed += same
        assert same == 12 or theirs.leads[same] < 0.1, (same, theirs)
    assert agreed > 30


def refused(folder: Path, env: dict[str, str], *flags: str) -> str:
    """What a server that cannot start says last."""
    command = [*API_SERVER, str(folder), *FLAGS, *flags, f"--server_port={free_port()}"]
    ended = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=180)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    return ended.stderr.strip().splitlines()[-1]


def test_a_device_that_cannot_be_had_ends_the_start(tiny: Path) -> None:
    assert refused(tiny, {"SHOAL_CUDA_LIBRARY": "/nowhere.so"}, *ON_DEVICE).startswith(
        "error: --device cuda: there is no CUDA library at /nowhere.so: build it"
    )
    assert refused(tiny, emulation(), *ON_DEVICE, "--tp", "3").startswith(
        "error: --device cuda: --tp 3 takes a GPU a rank, and 2 are seen: take --tp 2"
    )
    assert "raise --cache_max_entry_count" in refused(
        tiny, emulation(SHOAL_EMULATED_MEMORY="250000"), *ON_DEVICE
    )
    assert refused(tiny, emulation(), *ON_DEVICE, "--kv_cache_dtype", "int8").startswith(
        "error: --kv_cache_dtype int8: not on a GPU"
    )


def test_a_chip_that_fails_ends_the_rank_and_another_goes_on(tiny: Path) -> None:
    """A step of the request does: three of a rank's are for warming up, and for graphs it starts six at most."""
    flags = (*FLAGS, *ON_DEVICE, "--deterministic")
    body = {"model": tiny.name, "prompt": "abc", "max_tokens": 20, "temperature": 0}
    with running_server(str(tiny), *flags, env=on_device()) as server:
        _, expected = server.post("/v1/completions", body)
    env = emulation(SHOAL_EMULATED_FAULT="embed:12")
    with running_server(str(tiny), *flags, env=env) as server:
        before = server.children()["rank"]
        status, answer = server.post("/v1/completions", body)
        assert status == 200, answer
        assert answer["choices"] == expected["choices"]
        assert server.children()["rank"] != before
        log = server.log()
        assert "kind=compute_failed" in log
        assert re.search(r"error: GPU 0 failed: cuda\w+: an illegal memory access was encountered", log), log
        assert "Traceback" not in log


def test_all_that_a_request_may_ask_for(tiny: Path) -> None:
    """Together, and as on the CPU: grammars, penalties, biases, prompts' log-probabilities."""
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    penalties = {"repetition_penalty": 1.5, "frequency_penalty": 0.5, "seed": 3, "temperature": 1}
    bodies: list[dict[str, Any]] = [
        {"prompt": "n is", "max_tokens": 20, "response_format": form},
        {"prompt": "abcabc", "max_tokens": 9, **penalties},
        {"prompt": "abc", "max_tokens": 9, "logit_bias": {"65": 100}, "logprobs": 2},
        {"prompt": "The fox", "max_tokens": 3, "echo": True, "logprobs": 1},
    ]
    found = []
    for env, flags in (({}, ON_CPU), (on_device(), ON_DEVICE)):
        with running_server(str(tiny), *FLAGS, *flags, env=env) as server, ThreadPoolExecutor(4) as pool:
            posts = [
                pool.submit(server.post, "/v1/completions", {"model": tiny.name, "temperature": 0} | body)
                for body in bodies
            ]
            answers = [post.result() for post in posts]
        assert [status for status, _ in answers] == [200] * 4, answers
        found.append([answer["choices"][0] for _, answer in answers])
    assert json.loads(found[1][0]["text"]) in ({"n": 1}, {"n": 2})
    assert found[1][2]["text"] == found[0][2]["text"]
    expected, ours = (choices[3]["logprobs"]["token_logprobs"] for choices in found)
    assert ours[0] is expected[0] is None
    assert ours[1:7] == pytest.approx(expected[1:7], abs=0.15)


@pytest.mark.parametrize("quantization", ["none", "w4"])
def test_deterministic_answers_do_not_depend_on_company(tmp_path: Path, quantization: str) -> None:
    """Nor on chunks, nor on what is cached: the same tokens and log-probabilities, to the last digit. A chip gets a
    model and as many rows as would make it take other kernels, with other orders of summation, without the flag."""
    is_chip = not CudaLibrary(library_path()).is_emulated
    wide = {"heads": 16, "kv_heads": 4, "head_dim": 64, "ffn": 2816, "context": 1024}
    small = {"heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 96, "context": 128}
    folder = write_llama(tmp_path, **(wide if is_chip else small))
    count, prompt, output, chunk = (48, 700, 64, 512) if is_chip else (4, 70, 8, 24)
    chance = random.Random(5)
    bodies = [
        {
            "model": folder.name, "prompt": "".join(chance.choices("abc def", k=chance.randint(1, prompt))),
            "max_tokens": output, "temperature": 1, "seed": seed, "logprobs": 2,
        }
        for seed in range(count)
    ]  # fmt: skip
    flags = (
        *(
            "--deterministic",
            "--quantization",
            quantization,
            "--dtype",
            "bfloat16",
            "--instance_num",
            str(count - 1),
            "--session_len",
        ),
        *(str(prompt + output + 2), "--max_prefill_token_num", str(chunk)),
    )
    with running_server(str(folder), *ON_DEVICE, *flags, env=on_device()) as server:

        def choices(body: dict[str, Any]) -> Any:
            status, answer = server.post("/v1/completions", body)
            assert status == 200, answer
            return answer["choices"]

        lone = [choices(body) for body in bodies]
        with ThreadPoolExecutor(count) as pool:
            for _ in range(2):
                chance.shuffle(order := list(range(count)))
                together = list(pool.map(choices, [bodies[index] for index in order]))
                assert together == [lone[index] for index in order]


def test_vectors(tiny: Path) -> None:
    found = []
    for env, flags in (({}, ON_CPU), (on_device(), ON_DEVICE)):
        with running_server(str(tiny), *FLAGS, *flags, "--task", "embed", env=env) as server:
            status, answer = server.post("/v1/embeddings", {"model": tiny.name, "input": ["some text", "more"]})
            assert status == 200, answer
            found.append(torch.tensor([one["embedding"] for one in answer["data"]]))
    assert torch.nn.functional.cosine_similarity(*found).min() > 0.999


def test_a_rank_that_dies_ends_the_crew_and_another_serves(tiny: Path) -> None:
    with running_server(str(tiny), *FLAGS, *ON_DEVICE, "--tp", "2", env=emulation()) as server:
        told = server.get("/metrics")[1]
        for rank in range(2):
            info = f'shoal:rank_info{{device="cuda {rank}: emulated chip",level="sm_80",rank="{rank}"}} 1.0'
            assert info in told
        assert re.search(r"rank1 .*device device='cuda 1: emulated chip' level=sm_80", server.log()), (
            server.log()
        )
        os.kill(server.children()["rank"][1], signal.SIGKILL)
        body = {"model": tiny.name, "prompt": "abc", "max_tokens": 8, "temperature": 0}
        until_s = time.monotonic() + 120
        while (status := server.post("/v1/completions", body)[0]) != 200:
            assert time.monotonic() < until_s, status
            time.sleep(0.2)
        assert "Traceback" not in server.log()


def test_it_sleeps_and_wakes(tiny: Path) -> None:
    """At level 2 the weights go too."""
    body = {"model": tiny.name, "prompt": "abc", "max_tokens": 8, "temperature": 0}
    with running_server(str(tiny), *FLAGS, *ON_DEVICE, env=on_device()) as server:
        _, before = server.post("/v1/completions", body)
        for level in (1, 2):
            assert server.post(f"/sleep?level={level}", {})[0] == 200
            assert server.post("/wakeup", {})[0] == 200
            wait_ready(server)
            status, after = server.post("/v1/completions", body)
            assert status == 200, after
            assert after["choices"] == before["choices"]
