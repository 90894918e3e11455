"""One rank of tests/process/test_gloo_group.py: ``gloo_rank.py RANK TP SEED FOLDER ROUND…``.

In each round it forms a group at FOLDER/ROUND and runs a sequence in two steps. In round "lost" rank 1 exits between
the two; the others write how long they took to notice. Rank 0 writes its logits, every rank its parameters' size.
"""

import os
import sys
import time
from pathlib import Path

import torch
from decoding import Driver, Sequence, load_whole, random_checkpoint
from safetensors.torch import save_file

from shoal.checkpoint.description import ModelDescription, Rope
from shoal.workers.parallel import PeerLost, form_group

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


def play_round(rank: int, tp: int, seed: int, folder: Path, name: str) -> None:
    parameters = load_whole(random_checkpoint(DESCRIPTION, seed), DESCRIPTION, tp, rank)
    group = form_group(tp, rank, str(folder / name))
    try:
        driver, sequence = Driver(DESCRIPTION, parameters, LENGTH, group, tp, rank), Sequence(prompt(seed))
        first = driver.step([(sequence, 13)])
        if name == "lost" and rank == 1:
            os._exit(0)
        rest = driver.step([(sequence, LENGTH - 13)])
        driver.step([])
        ids = torch.tensor([seed, rank])
        group.broadcast(ids)
    finally:
        group.close()
    assert ids.tolist() == [seed, 0]
    (folder / f"bytes{rank}").write_text(str(parameters.nbytes))
    if first is not None and rest is not None:
        save_file({"logits": torch.cat((first, rest))}, folder / "logits.safetensors")


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


if __name__ == "__main__":
    main()
