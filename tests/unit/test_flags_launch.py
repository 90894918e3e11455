"""From the command line and a model folder to settings: what is resolved, and what is refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from shoal import launch, process
from shoal.access import digest_of
from shoal.errors import FlagError, ModelError

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 144,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 777,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny-llama")


def write_model(path: Path, **changes: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG | changes))
    return path


def message(*argv: str) -> str:
    with pytest.raises(FlagError) as caught:
        launch.prepare(argv)
    return str(caught.value)


def test_what_is_left_open_comes_from_the_model_and_the_machine(folder: Path) -> None:
    settings = launch.prepare([str(folder)]).settings
    assert (settings.model, settings.model_name) == (str(folder), "tiny-llama")
    assert settings.session_len == 777
    assert settings.threads == process.available_cores() >= 1
    assert settings.dtype == "auto"
    assert settings.enable_prefix_caching is True
    assert settings.run_dir == ""


def test_what_is_given_arrives(folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    line = (
        f"{folder} tiny --server_port 8123 --frontends 3 --tp 2 --instance_num 9 --session_len 500 "
        "--dtype float32 --deterministic --device auto --threads 5 "
        "--cache_max_entry_count 0.3 --cache_block_seq_len 32 "
        "--cache_bytes 64MiB --no_enable_prefix_caching --max_prefill_token_num 33 "
        "--max_queued_requests 7 --max_queued_tokens 9000 --drain_timeout 3 --step_timeout 4.5 "
        f"--chat_template {template} --allow_origins http://a http://b --api_keys k1 k2 --log_level WARN "
        f"--max_log_len 10 --daemon --pid_file {tmp_path}/pid --log_file {tmp_path}/log"
    )
    prepared = launch.prepare(line.split())
    settings = prepared.settings
    assert settings.model_name == "tiny"
    assert (settings.server_port, settings.frontends, settings.tp, settings.instance_num) == (8123, 3, 2, 9)
    assert (settings.device, settings.deterministic) == ("auto", True)
    assert (settings.session_len, settings.dtype, settings.threads) == (500, "float32", 5)
    assert (settings.cache_max_entry_count, settings.cache_block_seq_len) == (0.3, 32)
    assert (settings.cache_bytes, settings.enable_prefix_caching) == (64 << 20, False)
    assert (settings.max_prefill_token_num, settings.max_queued_requests) == (33, 7)
    assert (settings.max_queued_tokens, settings.drain_timeout_s) == (9000, 3.0)
    assert (settings.step_timeout_s, settings.chat_template) == (4.5, str(template))
    assert settings.allow_origins == ("http://a", "http://b")
    assert [key.digest for key in settings.api_keys] == [digest_of("k1"), digest_of("k2")]
    assert (settings.log_level, settings.max_log_len) == ("warning", 10)
    assert (prepared.daemon, prepared.pid_file, prepared.log_file) == (
        True,
        f"{tmp_path}/pid",
        f"{tmp_path}/log",
    )


def test_a_relative_path_becomes_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert launch.prepare(["tiny-llama"]).settings.model == str(folder)


def test_longer_than_the_model(folder: Path, tmp_path: Path) -> None:
    assert message(str(folder), "--session_len=778").startswith("--session_len 778: the model's context is 777")
    stretched = launch.prepare([str(folder), "--session_len=1500", "--rope_scaling_factor=2"])
    assert stretched.settings.session_len == 1500
    assert launch.prepare([str(folder), "--rope_scaling_factor=2"]).settings.session_len == 1554
    dynamic = write_model(tmp_path / "dynamic", rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    assert launch.prepare([str(dynamic), "--session_len=9999"]).settings.session_len == 9999


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--tp=7"], "--tp 7: the model has 6 attention heads"),
        (["--trust-remote-code"], "--trust_remote_code: refused"),
        (["--dtype=float16", "--device=cpu"], "--dtype float16: only on a GPU"),
        (["--dtype=float32", "--device=cuda"], "--dtype float32: not on a GPU"),
        (["--model_format=awq"], "--model_format awq: not available yet"),
        (["--model_format=gguf"], "--model_format gguf: the model at"),
        (["--chat_template=nowhere.jinja"], "--chat_template nowhere.jinja: no such file"),
        (["--chat_template=lmdeploy.json"], "--chat_template lmdeploy.json: LMDeploy's JSON form"),
        (["--max_queued_tokens=776"], "--max_queued_tokens 776: less than --session_len 777"),
        (["--pid_file=/no/such/folder/pid"], "--pid_file /no/such/folder/pid: there is no folder"),
        (["--log_file=/"], "--log_file /: is a folder"),
    ],
)
def test_refusals_name_the_flag(folder: Path, args: list[str], expected: str) -> None:
    assert message(str(folder), *args).startswith(expected)


@pytest.mark.parametrize("key", ["sk secret", "", "sk-ö"])
def test_a_refused_key_is_not_shown(folder: Path, key: str) -> None:
    assert (
        message(str(folder), f"--api_keys={key}") == "--api_keys: a key must be printable ASCII without spaces"
    )


def test_models_that_cannot_be_served(folder: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    (workspace / "triton_models").mkdir(parents=True)
    with pytest.raises(ModelError, match="original Hugging Face folder"):
        launch.prepare([str(workspace)])
    with pytest.raises(ModelError, match="no such file or folder"):
        launch.prepare([str(tmp_path / "nowhere.gguf")])
    (folder / "config.json").write_text('{"architectures": ["MambaForCausalLM"], "model_type": "mamba"}')
    with pytest.raises(ModelError, match=r"config\.json"):
        launch.prepare([str(folder)])


@pytest.mark.parametrize(
    ("args", "warned"),
    [
        ([], False),
        (["localhost"], False),
        (["::1"], False),
        (["127.3.2.1"], False),
        (["0.0.0.0"], True),
        (["::"], True),
        (["--server_name=myhost"], True),
        (["0.0.0.0", "--api_keys", "k"], False),
    ],
)
def test_a_public_address_without_keys_is_warned_about(folder: Path, args: list[str], warned: bool) -> None:
    warnings = launch.prepare([str(folder), *args]).warnings
    assert len(warnings) == warned
    assert all("--server_name" in warning and "--api_keys" in warning for warning in warnings)


def test_cores_follow_the_affinity_mask() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert process.available_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "auto"),
        ("--quant_policy 8", "int8"),
        ("--quant_policy 0 --kv_cache_dtype bfloat16", "bfloat16"),
        ("--quant_policy 8 --kv_cache_dtype int8", "int8"),
    ],
)
def test_the_caches_type_has_two_flags(folder: Path, line: str, expected: str) -> None:
    assert launch.prepare([str(folder), *line.split()]).settings.kv_cache_dtype == expected


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("--quant_policy 4", "--quant_policy 4: not available yet"),
        ("--quant_policy 8 --kv_cache_dtype float32", "leave one of them out"),
    ],
)
def test_the_caches_type_is_refused_by_name(folder: Path, line: str, named: str) -> None:
    with pytest.raises(FlagError, match=named):
        launch.prepare([str(folder), *line.split()])
