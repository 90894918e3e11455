"""Sleep gives memory back and changes no answer; with the default model."""

from pathlib import Path

import pytest
from server import Server, running_server

ASKED = {
    "messages": [{"role": "user", "content": "Name three colours."}],
    "temperature": 0,
    "max_tokens": 16,
}


def answer(server: Server) -> str:
    status, body = server.post("/v1/chat/completions", ASKED)
    assert status == 200, body
    text: str = body["choices"][0]["message"]["content"]
    return text


def memory_kib(server: Server) -> int:
    """Resident, of the rank."""
    (rank,) = server.children()["rank"]
    lines = Path(f"/proc/{rank}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def test_sleep_gives_memory_back_and_changes_no_answer(tmp_path: Path) -> None:
    with running_server("--data_dir", str(tmp_path), "--cache_bytes", str(256 << 20)) as server:
        before, awake_kib = answer(server), memory_kib(server)
        assert server.post("/sleep?level=1", {})[1] == {"is_sleeping": True, "level": 1}
        lightly_kib = memory_kib(server)
        assert server.post("/sleep?level=2", {})[1] == {"is_sleeping": True, "level": 2}
        deeply_kib = memory_kib(server)
        assert deeply_kib < lightly_kib < awake_kib
        assert awake_kib - deeply_kib > 250_000, "the weights are 269 MB"
        assert server.post("/v1/chat/completions", ASKED)[0] == 503
        assert server.post("/wakeup", {})[0] == 200
        assert answer(server) == before
        assert memory_kib(server) == pytest.approx(awake_kib, rel=0.2)
