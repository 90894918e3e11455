"""The sessions' store under several processes that take turns in the same sessions and are killed at any moment."""

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

from shoal.storage.session_store import SessionStore

WORKER = Path(__file__).resolve().parents[1] / "session_worker.py"
WORKERS = 4
LIVES = 6
TURNS = 40


def test_whole_turns_only_and_one_at_a_time_whoever_dies(tmp_path: Path) -> None:
    path = tmp_path / "sessions.sqlite"
    said: list[str] = []
    failures: list[str] = []

    def live(number: int) -> None:
        for life in range(LIVES):
            command = [sys.executable, str(WORKER), str(path), f"{number}.{life}", str(TURNS)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            said.extend(done.stdout.splitlines())
            if done.returncode not in (0, -9):
                failures.append(done.stderr)

    threads = [threading.Thread(target=live, args=(number,)) for number in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    tried = {line.split()[1] for line in said if line.startswith("try")}
    ended = [line.split()[1] for line in said if line.startswith("end")]
    assert len(ended) > WORKERS * LIVES, "too few turns to tell"
    assert len(tried) > len(ended), "nobody was killed while a turn was being recorded"
    kept = asyncio.run(read_all(SessionStore(path, 0)))
    assert len(kept) == len(set(kept)), "a turn stands twice"
    assert set(ended) <= set(kept) <= tried


async def read_all(store: SessionStore) -> list[str]:
    """The turns of all sessions; checks that they are whole and that no session is held by the dead."""
    texts: list[str] = []
    for session in (1, 2, 3):
        assert await store.find_holder("t", session) is None
        found = await store.read("t", session)
        assert found is not None
        summary, entries = found
        assert [entry.message["role"] for entry in entries] == ["user", "assistant"] * summary.turns
        assert summary.generated_tokens == summary.turns
        assert [entry.message["content"] for entry in entries[::2]] == [
            entry.message["content"] for entry in entries[1::2]
        ]
        texts += [entry.message["content"] for entry in entries[::2]]
    return texts
