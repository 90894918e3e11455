"""A server's life with fake workers: deaths of its processes, draining, the background, starts that fail."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import models
import pytest
import server as servers
from server import FAKE_SERVER, Server, eventually, free_port, is_running, running_server

GONE_S = 1.0


@pytest.fixture(scope="module")
def model() -> str:
    return str(models.default_model_path())


@pytest.fixture(scope="module")
def shared(model: str) -> Iterator[Server]:
    """Survives every death of a child."""
    with fake_server(model, "--tp", "2") as running:
        yield running


@contextlib.contextmanager
def fake_server(model: str, *args: str, faults: dict[str, object] | None = None) -> Iterator[Server]:
    env = {"SHOAL_FAKE_FAULTS": json.dumps(faults or {})}
    with running_server(model, *args, command=FAKE_SERVER, env=env, ready_timeout_s=60) as running:
        yield running


def run(*args: str, faults: str = "{}", timeout_s: float = 60) -> "subprocess.CompletedProcess[str]":
    """A start that is expected to end by itself."""
    env = os.environ | {"SHOAL_FAKE_FAULTS": faults}
    command = [*FAKE_SERVER, *args]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout_s, check=False)


def complete(server: Server, max_tokens: int = 5) -> tuple[int, str]:
    body = {"prompt": "one two three", "max_tokens": max_tokens, "ignore_eos": True, "seed": 1}
    status, answer = server.post("/v1/completions", body, timeout_s=30)
    return status, answer["choices"][0]["text"] if status == 200 else str(answer)


def all_children(server: Server, ranks: int) -> dict[str, list[int]]:
    """The children once there are as many as there should be: the server is ready with its first frontend."""
    expected = {"rank": ranks, "scheduler": 1, "gunicorn": 3}
    eventually(lambda: {kind: len(pids) for kind, pids in server.children().items()} == expected)
    return server.children()


@pytest.mark.parametrize(
    ("kind", "index"), [("rank", 0), ("rank", 1), ("scheduler", 0), ("gunicorn", 0), ("gunicorn", 1)]
)
def test_a_child_that_is_killed_comes_back(shared: Server, kind: str, index: int) -> None:
    servers.wait_ready(shared)
    before = complete(shared)
    assert before[0] == 200
    children = all_children(shared, ranks=2)
    victim = children[kind][index]
    os.kill(victim, signal.SIGKILL)
    eventually(lambda: not is_running(victim))
    if (kind, index) == ("gunicorn", 0):
        eventually(lambda: not any(map(is_running, children["gunicorn"])), GONE_S)
    eventually(lambda: len(shared.children()[kind]) == len(children[kind]))
    eventually(lambda: servers.is_ready(shared.port))
    assert victim not in shared.children()[kind]
    assert shared.process.poll() is None
    assert complete(shared) == before


def test_a_scheduler_that_hangs_is_ended_and_comes_back(model: str) -> None:
    with fake_server(model, "--step_timeout", "1") as server:
        before = complete(server)
        (hung,) = server.children()["scheduler"]
        os.kill(hung, signal.SIGSTOP)
        assert complete(server) == before, "it should only have taken longer"
        assert not is_running(hung)


def test_no_zombies_are_left(model: str) -> None:
    """The supervisor takes over gunicorn's workers when their master dies."""
    with fake_server(model) as server:
        old = all_children(server, ranks=1)["gunicorn"]
        os.kill(old[0], signal.SIGKILL)
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in old))
        servers.wait_ready(server)


def test_what_runs_is_finished_before_the_end(model: str) -> None:
    answers: list[tuple[int, str]] = []
    with fake_server(model, faults={"delay_ms": 60}) as server:
        children = [pid for pids in server.children().values() for pid in pids]
        asking = threading.Thread(target=lambda: answers.append(complete(server, 30)))
        asking.start()
        eventually(lambda: servers.metrics(server)["shoal:num_requests_running"] == 1)
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: "draining" in server.log())
        assert server.process.wait(20) == 0
        asking.join()
        assert answers[0][0] == 200
        assert not any(map(is_running, children))
        assert "Traceback" not in server.log()


def test_a_second_signal_ends_at_once(model: str) -> None:
    with fake_server(model, faults={"delay_ms": 200}) as server:
        asking = threading.Thread(target=lambda: complete_or_fail(server))
        asking.start()
        eventually(lambda: servers.metrics(server)["shoal:num_requests_running"] == 1)
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: "draining" in server.log())
        began_s = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(10) == 128 + signal.SIGINT
        assert time.monotonic() - began_s < 3
        asking.join()


def complete_or_fail(server: Server) -> None:
    with contextlib.suppress(OSError, ValueError):
        complete(server, 200)


def test_nobody_outlives_the_supervisor(model: str) -> None:
    with fake_server(model, "--tp", "2") as server:
        children = [pid for pids in all_children(server, ranks=2).values() for pid in pids]
        server.process.kill()
        server.process.wait()
        eventually(lambda: not any(map(is_running, children)), GONE_S)


def test_run_directory_is_private_removed_and_cleaned_up_after_a_kill(model: str, tmp_path: Path) -> None:
    def runs() -> list[Path]:
        return sorted(tmp_path.glob("shoal-*"))

    env = {"XDG_RUNTIME_DIR": str(tmp_path)}
    with running_server(model, command=FAKE_SERVER, env=env, ready_timeout_s=60) as first:
        (abandoned,) = runs()
        assert abandoned.stat().st_mode & 0o777 == 0o700
        assert (abandoned / "settings.json").stat().st_mode & 0o777 == 0o600
        with running_server(model, command=FAKE_SERVER, env=env, ready_timeout_s=60):
            assert len(runs()) == 2
        assert runs() == [abandoned]
        first.process.kill()
    assert runs() == [abandoned]
    with running_server(model, command=FAKE_SERVER, env=env, ready_timeout_s=60):
        assert len(runs()) == 1
        assert runs() != [abandoned]
    assert runs() == []


def test_ready_text(shared: Server, model: str) -> None:
    servers.wait_ready(shared)
    log = shared.log()
    for part in (
        f"URL        http://127.0.0.1:{shared.port}",
        model,
        "256 blocks of 16 tokens: 4096 tokens",
        "64 at once",
        f"curl -N http://127.0.0.1:{shared.port}/v1/chat/completions",
    ):
        assert part in log
    assert log.index("starting the processes") < log.index("is ready")


# --- the background --------------------------------------------------------------------------------------


def test_daemon(model: str, tmp_path: Path) -> None:
    port, pid_file, log_file = free_port(), tmp_path / "pid", tmp_path / "log"
    args = (model, "--daemon", f"--pid_file={pid_file}", f"--log_file={log_file}")
    started = run(*args, f"--server_port={port}")
    assert started.returncode == 0, started.stderr
    assert f"http://127.0.0.1:{port}" in started.stdout
    pid = int(pid_file.read_text())
    try:
        assert servers.is_ready(port)
        assert os.getsid(pid) != os.getsid(0)
        assert "crew_ready" in log_file.read_text()
        refused = run(*args, f"--server_port={free_port()}")
        assert refused.returncode == 2
        assert refused.stderr.splitlines() == [
            f"error: --pid_file {pid_file}: the server with process id {pid} is running"
        ]
        os.kill(pid, signal.SIGHUP)
        children = list(servers.descendants(pid))
    finally:
        os.kill(pid, signal.SIGTERM)
    eventually(lambda: not is_running(pid))
    assert not any(map(is_running, children))
    assert not pid_file.exists()


def test_daemon_that_cannot_start(model: str, tmp_path: Path) -> None:
    log_file, pid_file = tmp_path / "log", tmp_path / "pid"
    failed = run(
        model,
        "--daemon",
        f"--server_port={free_port()}",
        f"--log_file={log_file}",
        f"--pid_file={pid_file}",
        faults='{"load_fails": "model.safetensors: truncated"}',
    )
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1] == "error: model.safetensors: truncated"
    assert log_file.read_text().splitlines()[-1] == "error: model.safetensors: truncated"
    assert not pid_file.exists()


def test_log_file_in_the_foreground(model: str, tmp_path: Path) -> None:
    log_file = tmp_path / "log"
    with fake_server(model, f"--log_file={log_file}") as server:
        eventually(lambda: "is ready" in server.log())
        assert "crew_ready" not in server.log()
        assert "crew_ready" in log_file.read_text()


# --- starts that fail ------------------------------------------------------------------------------------


def test_a_model_that_cannot_be_loaded(model: str) -> None:
    args = (model, "--tp=2", f"--server_port={free_port()}")
    failed = run(*args, faults='{"load_fails": "x.gguf: the file is cut off"}')
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1] == "error: x.gguf: the file is cut off"
    assert "Traceback" not in failed.stderr


def test_a_child_that_dies_again_and_again_at_start(model: str) -> None:
    failed = run(model, f"--server_port={free_port()}", faults="not json")
    assert failed.returncode == 1
    last = failed.stderr.splitlines()[-1]
    assert last.startswith("error: rank0 ended with exit code 1: msgspec.DecodeError")


def test_a_port_that_is_taken(model: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        failed = run(model, f"--server_port={port}")
    assert failed.returncode == 2
    assert failed.stderr.splitlines() == [
        f"error: --server_port {port}: another process listens there already; end it or choose another port"
    ]


@pytest.mark.parametrize("name", ["no-such-host.invalid", "192.0.2.1"])
def test_an_address_that_is_not_ours(model: str, name: str) -> None:
    failed = run(model, f"--server_name={name}", f"--server_port={free_port()}")
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith(f"error: --server_name {name}: ")


def test_a_stop_while_starting(model: str) -> None:
    """SIGTERM before the server is ready ends it in good order too."""
    process = subprocess.Popen(
        [sys.executable, *FAKE_SERVER[1:], model, f"--server_port={free_port()}"], stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 0, error.decode()


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    """Noticed by the frontends alone."""
    config = {
        "model_type": "llama",
        "vocab_size": 320,
        "hidden_size": 96,
        "intermediate_size": 144,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "max_position_embeddings": 777,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    }
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    failed = run(str(tmp_path), f"--server_port={free_port()}")
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith(f"error: {tmp_path}: has no tokenizer.json")
    assert "Traceback" not in failed.stderr
