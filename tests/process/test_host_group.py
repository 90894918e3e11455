"""Ranks as processes: the logits of one rank, and a lost peer that ends the group but not the others."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from decoding import Driver, Sequence, load_whole, random_checkpoint
from host_rank import DESCRIPTION, LENGTH, prompt
from safetensors.torch import load_file
from torch.testing import assert_close

SCRIPT = Path(__file__).parent.parent / "host_rank.py"
SEED = random.randrange(1 << 30)


@contextmanager
def started_rank(rank: int, tp: int, folder: Path, *rounds: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, str(SCRIPT), str(rank), str(tp), str(SEED), str(folder), *rounds]
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        try:
            yield process
        finally:
            process.kill()


def check_logits(folder: Path) -> None:
    whole = load_whole(random_checkpoint(DESCRIPTION, SEED), DESCRIPTION)
    expected = Driver(DESCRIPTION, whole, LENGTH).logits([(Sequence(prompt(SEED)), LENGTH)])
    assert_close(load_file(folder / "logits.safetensors")["logits"], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tp", [2, 3])
def test_ranks_give_the_logits_of_one_and_hold_their_share(tp: int, tmp_path: Path) -> None:
    with started_rank(0, tp, tmp_path, "a") as first, started_rank(1, tp, tmp_path, "a") as second:
        if tp == 3:
            with started_rank(2, tp, tmp_path, "a") as third:
                assert third.wait(60) == 0
        assert (first.wait(60), second.wait(60)) == (0, 0)
    check_logits(tmp_path)
    whole = load_whole(random_checkpoint(DESCRIPTION, SEED), DESCRIPTION).nbytes
    for rank in range(tp):
        assert int((tmp_path / f"bytes{rank}").read_text()) < whole / tp * 1.1


def test_a_dead_peer_is_noticed_at_once_and_its_successor_joins_a_new_group(tmp_path: Path) -> None:
    with started_rank(0, 2, tmp_path, "lost", "next") as survivor:
        with started_rank(1, 2, tmp_path, "lost") as mortal:
            assert mortal.wait(60) == 0
        with started_rank(1, 2, tmp_path, "next") as successor:
            assert (survivor.wait(60), successor.wait(60)) == (0, 0)
    assert float((tmp_path / "noticed0").read_text()) < 20
    check_logits(tmp_path)


def wait_for_file(path: Path) -> None:
    until_s = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until_s, path
        time.sleep(0.01)


def test_a_rank_killed_in_the_middle_of_a_sum_is_noticed_and_leaves_nothing(tmp_path: Path) -> None:
    before = set(Path("/dev/shm").iterdir())
    with (
        started_rank(0, 3, tmp_path, "endless") as first,
        started_rank(1, 3, tmp_path, "endless") as mortal,
        started_rank(2, 3, tmp_path, "endless") as third,
    ):
        for rank in range(3):
            wait_for_file(tmp_path / f"adding{rank}")
        time.sleep(random.uniform(0, 0.05))
        mortal.kill()
        killed_at_s = time.monotonic()
        assert (first.wait(20), third.wait(20)) == (0, 0)
    for rank in (0, 2):
        assert float((tmp_path / f"noticed_at{rank}").read_text()) - killed_at_s < 2
    assert set(Path("/dev/shm").iterdir()) <= before
