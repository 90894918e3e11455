from pathlib import Path

import pytest
import torch

from shoal.checkpoint.description import ModelDescription, Rope
from shoal.config import Settings
from shoal.errors import StartError
from shoal.workers.kv_cache import KVCache, available_bytes, bytes_per_block, count_blocks
from shoal.workers.parallel import split

DESCRIPTION = ModelDescription(
    family="llama",
    vocab_size=300,
    hidden_size=36,
    num_layers=5,
    num_heads=9,
    num_kv_heads=3,
    head_dim=6,
    ffn_size=128,
    max_position=512,
    norm_eps=1e-5,
    rope=Rope(dim=6),
    layer_windows=(0,) * 5,
    attention_scale=1.0,
)
PLENTY = 1 << 40


def settings(**changes: object) -> Settings:
    base: dict[str, object] = {
        "model": "m",
        "model_name": "m",
        "run_dir": "/r",
        "instance_num": 7,
        "session_len": 101,
        "cache_block_seq_len": 16,
        "cache_bytes": PLENTY,
    }
    return Settings(**(base | changes))  # type: ignore[arg-type]


def count(available: int = PLENTY, rank: int = 0, **changes: object) -> int:
    chosen = settings(**changes)
    shard = split(DESCRIPTION, chosen.tp, rank)
    return count_blocks(chosen, DESCRIPTION, shard, torch.bfloat16, available)


def test_bytes_per_block_is_what_is_allocated() -> None:
    shard = split(DESCRIPTION, 2, 0)
    cache = KVCache(DESCRIPTION, shard, torch.bfloat16, num_blocks=11, block_size=16)
    assert cache.keys.shape == (5, 11, 2, 16, 6)
    assert cache.nbytes == 11 * bytes_per_block(DESCRIPTION, shard, torch.bfloat16, 16)


def test_all_sequences_at_full_length_and_one_spare_block_are_the_most() -> None:
    assert count() == 7 * 7 + 1
    assert count(instance_num=3) == 3 * 7 + 1
    assert count(session_len=0) == 7 * 512 // 16 + 1


def test_the_share_of_available_memory_limits() -> None:
    block = bytes_per_block(DESCRIPTION, split(DESCRIPTION, 1, 0), torch.bfloat16, 16)
    assert count(available=40 * block, cache_max_entry_count=0.5) == 20
    assert count(available=40 * block, cache_bytes=9 * block) == 9


def test_uneven_ranks_share_the_bytes_so_that_they_hold_equally_many_blocks() -> None:
    block = bytes_per_block(DESCRIPTION, split(DESCRIPTION, 1, 0), torch.bfloat16, 16)
    counts = [count(rank=rank, tp=2, cache_bytes=33 * block) for rank in (0, 1)]
    assert counts == [33, 33]


def test_less_than_one_sequence_is_refused_with_the_numbers_and_the_flags() -> None:
    with pytest.raises(StartError) as caught:
        count(available=50_000)
    message = str(caught.value)
    assert "--session_len 101" in message
    assert "--cache_max_entry_count" in message
    assert "7 KV blocks" in message
    assert "\n" not in message


def test_an_allocation_that_fails_names_the_flags() -> None:
    with pytest.raises(StartError, match="--instance_num"):
        KVCache(DESCRIPTION, split(DESCRIPTION, 1, 0), torch.float32, num_blocks=1 << 45, block_size=16)


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


MEMINFO = "MemTotal: 9000 kB\nMemAvailable:    5000 kB\n"


def test_available_memory_without_control_groups(tmp_path: Path) -> None:
    write(tmp_path, {"meminfo": MEMINFO})
    assert available_bytes(tmp_path, tmp_path / "none") == 5000 * 1024


def test_available_memory_sees_the_tightest_group_of_version_2(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "meminfo": MEMINFO,
            "self/cgroup": "0::/outer/inner\n",
            "cgroup/outer/memory.max": "3000000\n",
            "cgroup/outer/memory.current": "2500000\n",
            "cgroup/outer/memory.stat": "active_file 7\ninactive_file 100000\n",
            "cgroup/outer/inner/memory.max": "max\n",
            "cgroup/outer/inner/memory.current": "2000000\n",
        },
    )
    assert available_bytes(tmp_path, tmp_path / "cgroup") == 600_000


def test_available_memory_sees_version_1_also_where_the_path_is_the_hosts(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "meminfo": MEMINFO,
            "self/cgroup": "5:cpu,cpuacct:/\n4:memory:/docker/abc\n",
            "cgroup/memory/memory.limit_in_bytes": "1000000\n",
            "cgroup/memory/memory.usage_in_bytes": "1200000\n",
            "cgroup/memory/memory.stat": "total_inactive_file 50000\n",
        },
    )
    assert available_bytes(tmp_path, tmp_path / "cgroup") == 0


def test_memory_is_taken_as_blocks_are_written() -> None:
    before = resident_bytes()
    cache = KVCache(DESCRIPTION, split(DESCRIPTION, 1, 0), torch.bfloat16, 40_000, 16)
    assert cache.nbytes > 200 << 20
    assert resident_bytes() - before < cache.nbytes / 10
    assert not cache.keys[-1, -1].any()


def test_memory_is_taken_ahead_of_use(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = large_cache(monkeypatch)
    cache.keys[:, 0] = 3
    before = resident_bytes()
    assert cache.prepare(0)
    while cache.prepare(0):
        pass
    assert 630 << 20 < resident_bytes() - before < 690 << 20, "an eighth"
    assert not cache.prepare(10_000), "most of it is left"
    used = 80_000
    assert cache.prepare(used)
    while cache.prepare(used):
        pass
    expected = (640 << 20) + used * cache.nbytes // 250_000
    assert abs(resident_bytes() - before - expected) < 64 << 20
    assert not cache.keys[:, 1:].any()
    assert (cache.keys[:, 0] == 3).all()


def test_memory_is_taken_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = large_cache(monkeypatch, start_s=60.0)
    before = resident_bytes()
    cache.prepare_start()
    assert 630 << 20 < resident_bytes() - before < 690 << 20, "an eighth"
    assert not cache.prepare(0), "nothing is left for the idle"


def test_the_start_does_not_wait_for_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = large_cache(monkeypatch, start_s=0.0)
    before = resident_bytes()
    cache.prepare_start()
    assert resident_bytes() - before < 32 << 20
    assert cache.prepare(0), "the idle go on with it"


def large_cache(monkeypatch: pytest.MonkeyPatch, start_s: float = 1.0) -> KVCache:
    """Of more than an eighth of the memory that it takes to be left, 5 GiB."""
    monkeypatch.setattr("shoal.workers.kv_cache.available_bytes", lambda: 5 << 30)
    monkeypatch.setattr("shoal.workers.memory_ahead._START_S", start_s)
    return KVCache(DESCRIPTION, split(DESCRIPTION, 1, 0), torch.bfloat16, 250_000, 16)


def resident_bytes() -> int:
    """Anonymous memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024
