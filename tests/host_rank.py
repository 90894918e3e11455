"""One rank of tests/process/test_host_group.py: ``host_rank.py RANK TP SEED FOLDER ROUND…``.

In each round it forms a group at FOLDER/ROUND and runs a sequence in two steps. In round "lost" rank 1 exits between
the two; in round "endless" the ranks add up until one of them is killed. The others write how long they took to notice,
or when. Rank 0 writes its logits, every rank its parameters' size.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from decoding import Driver, Sequence, load_whole, random_checkpoint
from safetensors.torch import save_file

from shoal.checkpoint.description import ModelDescription, Rope
from shoal.cuda_ext.binding import PeerLost
from shoal.cuda_ext.program import Count, Program
from shoal.workers.parallel import Group, form_group

LENGTH = 29
DESCRIPTION = ModelDescription(
    family="llama",
    vocab_size=607,
    hidden_size=54,
    num_layers=3,
    num_heads=9,
    num_kv_heads=3,
    head_dim=6,
    ffn_size=643,
    max_position=64,
    norm_eps=1e-5,
    rope=Rope(dim=6),
    layer_windows=(0, 5, 0),
    attention_scale=0.4,
)


def prompt(seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(DESCRIPTION.vocab_size, (LENGTH,), generator=generator).tolist()


def decode(rank: int, tp: int, seed: int, folder: Path, group: Group, dies: bool) -> None:
    parameters = load_whole(random_checkpoint(DESCRIPTION, seed), DESCRIPTION, tp, rank)
    driver, sequence = Driver(DESCRIPTION, parameters, LENGTH, group, tp, rank), Sequence(prompt(seed))
    first = driver.step([(sequence, 13)])
    if dies:
        os._exit(0)
    rest = driver.step([(sequence, LENGTH - 13)])
    driver.step([])
    for count in (2, 1, 5):
        ids = np.array([seed, -1, 1 << 40, rank, rank])[-count:]
        group.broadcast(ids)
        assert ids.tolist() == [seed, -1, 1 << 40, 0, 0][-count:]
    (folder / f"bytes{rank}").write_text(str(parameters.nbytes))
    if first is not None and rest is not None:
        save_file({"logits": torch.cat((first, rest))}, folder / "logits.safetensors")


def add_up_for_ever(rank: int, folder: Path, group: Group) -> None:
    program, x, rows = Program(), torch.zeros(5, 7), Count(5)
    for _ in range(100):
        group.add_up(program, x, rows)
    program.run()
    (folder / f"adding{rank}").touch()
    while True:
        program.run()


def play_round(rank: int, tp: int, seed: int, folder: Path, name: str) -> None:
    group = form_group(tp, rank, str(folder / name))
    try:
        if name == "endless":
            add_up_for_ever(rank, folder, group)
        decode(rank, tp, seed, folder, group, dies=name == "lost" and rank == 1)
    finally:
        group.close()


def main() -> None:
    torch.set_num_threads(1)
    rank, tp, seed = map(int, sys.argv[1:4])
    folder = Path(sys.argv[4])
    for name in sys.argv[5:]:
        began_s = time.monotonic()
        try:
            play_round(rank, tp, seed, folder, name)
        except PeerLost:
            (folder / f"noticed{rank}").write_text(str(time.monotonic() - began_s))
            (folder / f"noticed_at{rank}").write_text(str(time.monotonic()))


if __name__ == "__main__":
    main()
