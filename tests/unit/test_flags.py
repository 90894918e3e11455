"""The command line: what is read from it, and the one line that each mistake gets."""

import re
from pathlib import Path

import pytest

from shoal import command_line
from shoal.errors import FlagError
from shoal.flags import flags


def read(*argv: str) -> dict[str, object]:
    return dict(command_line.read(argv))


def message(*argv: str) -> str:
    with pytest.raises(FlagError) as caught:
        command_line.read(argv)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_nothing_given_is_the_defaults() -> None:
    values = read()
    assert values["model"] is None
    assert (values["server_name"], values["server_port"]) == ("127.0.0.1", 23333)
    assert (values["instance_num"], values["tp"], values["frontends"]) == (64, 1, 0)
    assert (values["cache_max_entry_count"], values["cache_block_seq_len"]) == (0.8, 16)
    assert values["cache_bytes"] == 4 << 30
    assert values["session_len"] is None
    assert set(values) == {flag.key for flag in flags()} | {"model"}


@pytest.mark.parametrize(
    "argv",
    [
        ("--server_port", "8001"),
        ("--server-port", "8001"),
        ("--server_port=8001",),
        ("--server-port=8001",),
    ],
)
def test_underscores_dashes_and_equals(argv: tuple[str, ...]) -> None:
    assert read(*argv)["server_port"] == 8001


def test_a_dash_in_a_value_stays_a_dash() -> None:
    assert read("--model-name=a-b_c-d")["model_name"] == "a-b_c-d"
    assert read("--model_name", "a-b")["model_name"] == "a-b"


def test_alias_of_instance_num() -> None:
    assert read("--max-batch-size", "7")["instance_num"] == 7
    assert read("--instance_num", "7", "--max_batch_size=7")["instance_num"] == 7


@pytest.mark.parametrize(
    ("word", "flag"),
    [
        ("0.0.0.0", "server_name"),
        ("127.0.0.1", "server_name"),
        ("::1", "server_name"),
        ("localhost", "server_name"),
        ("models.example.org", "server_name"),
        ("internlm-chat-7b", "model_name"),
        ("qwen2.5", "model_name"),
        ("llama-3.1-8b", "model_name"),
        ("org/name", "model_name"),
        ("llama.cpp", "model_name"),
    ],
)
def test_the_second_word_is_a_host_or_a_name(word: str, flag: str) -> None:
    values = read("folder", word)
    assert values["model"] == "folder"
    assert values[flag] == word


def test_words_may_stand_between_flags() -> None:
    values = read("--tp", "2", "folder", "--threads=3", "0.0.0.0", "--instance_num", "5")
    assert (values["model"], values["server_name"]) == ("folder", "0.0.0.0")
    assert (values["tp"], values["threads"], values["instance_num"]) == (2, 3, 5)


def test_lists_and_switches() -> None:
    values = read("folder", "--api_keys", "k1", "k2", "--daemon", "--no-enable-prefix-caching")
    assert values["api_keys"] == ("k1", "k2")
    assert values["daemon"] is True
    assert values["enable_prefix_caching"] is False


@pytest.mark.parametrize(
    ("text", "count"), [("4294967296", 4 << 30), ("512MiB", 512 << 20), ("2g", 2 << 30), ("3KB", 3 << 10)]
)
def test_sizes(text: str, count: int) -> None:
    assert read("--cache_bytes", text)["cache_bytes"] == count


@pytest.mark.parametrize(
    ("flag", "bad"),
    [
        ("server_port", ("0", "65536", "-1", "http", "1.5", "", "٣")),
        ("server_name", ("", " ", "a\nb")),
        ("tp", ("0", "-2", "two")),
        ("instance_num", ("0", "1e3")),
        ("frontends", ("-1", "257")),
        ("session_len", ("0", "1", "-5")),
        ("threads", ("-1",)),
        ("cache_max_entry_count", ("0", "-0.1", "1.01", "nan", "inf", "many")),
        ("cache_block_seq_len", ("0", "4", "17", "512", "-16")),
        ("cache_bytes", ("0", "-1", "4 GiB", "GiB", "1.5G")),
        ("max_prefill_token_num", ("0",)),
        ("max_queued_requests", ("0",)),
        ("drain_timeout", ("0", "-1", "nan", "soon")),
        ("dtype", ("int8",)),
        ("log_level", ("loud",)),
        ("quant_policy", ("3",)),
        ("quantization", ("w3",)),
        ("kv_cache_dtype", ("int4",)),
        ("rope_scaling_factor", ("0.5", "nan", "-2")),
    ],
)
def test_values_out_of_range_name_their_flag(flag: str, bad: tuple[str, ...]) -> None:
    for value in bad:
        text = message(f"--{flag}={value}")
        assert text.startswith(f"--{flag} ")
        assert ": must be " in text


COMING = [
    ("--dp 2", "--dp 2: not available yet"),
    ("--adapters a=b c", "--adapters a=b c: not available yet"),
]


@pytest.mark.parametrize(("line", "expected"), COMING)
def test_features_to_come_are_refused_by_name(line: str, expected: str) -> None:
    assert message(*line.split()) == expected


@pytest.mark.parametrize(
    "line",
    [
        "--dp 1",
        "--allow_methods *",
        "--allow_headers *",
        "--unknown_fields refuse",
        "--disable_fastapi_docs",
        "--no-docs",
    ],
)
def test_neutral_values_of_features_to_come_are_accepted(line: str) -> None:
    read(*line.split())


@pytest.mark.parametrize(
    ("line", "pattern"),
    [
        ("--server_prot 3", r"--server_prot: unknown flag; did you mean --server_port\?"),
        ("--frobnicate", r"--frobnicate: unknown flag; see --help"),
        ("--frobnicate=3", r"--frobnicate: unknown flag; see --help"),
        ("-x", r"-x: unknown flag"),
        ("--server 3", r"--server: unknown flag"),
        ("a b c", r"unexpected argument 'c': only MODEL and HOST stand without a flag"),
        ("--tp", r"--tp: expected one argument"),
        ("--api_keys", r"--api_keys: expected at least one argument"),
        ("--daemon=yes", r"--daemon: ignored explicit argument 'yes'"),
        ("--tp 1 --tp 2", r"--tp contradicts an earlier --tp"),
        ("--instance_num 4 --max_batch_size 5", r"--max_batch_size contradicts an earlier --instance_num"),
        (
            "--enable_prefix_caching --no_enable_prefix_caching",
            r"--no_enable_prefix_caching contradicts an earlier --enable_prefix_caching",
        ),
        ("m 0.0.0.0 --server_name ::1", r"--server_name ::1 contradicts the second argument, 0.0.0.0"),
        ("m 0.0.0.0 --server_name 127.0.0.1", r"--server_name 127.0.0.1 contradicts"),
        ("m one --model_name two", r"--model_name two contradicts the second argument, one"),
    ],
)
def test_mistakes(line: str, pattern: str) -> None:
    assert re.match(pattern, message(*line.split()))


def test_config_file_under_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "shoal.toml"
    path.write_text(
        'model = "folder"\nserver-port = 8000\ntp = 2\napi_keys = ["a", "b"]\n'
        "enable_prefix_caching = false\ndaemon = true\ncache_max_entry_count = 0.25\n"
    )
    values = read("--config", str(path), "--server_port", "9000")
    assert values["model"] == "folder"
    assert values["server_port"] == 9000
    assert (values["tp"], values["api_keys"]) == (2, ("a", "b"))
    assert (values["enable_prefix_caching"], values["daemon"]) == (False, True)
    assert values["cache_max_entry_count"] == 0.25
    assert read("other", "--config", str(path))["model"] == "other"
    assert read("--config", str(path), "--enable_prefix_caching")["enable_prefix_caching"] is True


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("tp = 0", "--tp 0: must be"),
        ("tp = true", "tp has a value of the wrong kind"),
        ("daemon = 1", "daemon is true or false"),
        ("teepee = 1", "--teepee: unknown flag"),
        ("tp = [", "not TOML"),
        ("[server]\nname = 1", "--server: unknown flag"),
        ("model = 3", "model is a string"),
        ("config = 'x'", "unknown flag"),
        ("dp = 2", "--dp 2: not available yet"),
        ("session_len = 2024-01-01", "wrong kind"),
    ],
)
def test_mistakes_in_the_config_file(tmp_path: Path, content: str, part: str) -> None:
    path = tmp_path / "shoal.toml"
    path.write_text(content)
    text = message("--config", str(path))
    assert text.startswith(f"--config {path}: ")
    assert part in text


def test_config_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "No such file" in message("--config", str(tmp_path / "nowhere.toml"))
    (tmp_path / "latin.toml").write_bytes(b"model = '\xe9'")
    assert "not TOML" in message("--config", str(tmp_path / "latin.toml"))


def test_help_names_every_flag_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.read(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for flag in flags():
        assert len(re.findall(rf"^  --{flag.name}\b", shown, re.MULTILINE)) == 1, flag.name
        assert flag.help.split()[0] in shown
    for group in ("server:", "access:", "model:", "batching and memory:", "limits:", "running it:"):
        assert f"\n{group}\n" in shown


def test_flag_names_are_unique() -> None:
    names = [name for flag in flags() for name in (flag.name, *flag.aliases)]
    assert len(names) == len(set(names))
