"""Ranks that are processes add up through memory of each other's emulated devices."""

import os
import subprocess
import sys
from pathlib import Path

import emulated
import pytest

RANK = """
import sys

import torch

from shoal.cuda_ext.cuda_binding import library
from shoal.cuda_ext.cuda_device import CudaDevice
from shoal.cuda_ext.program import Count
from shoal.workers import cuda_group
from shoal.workers.cuda_group import PeerGroup, PeerRegions

rank, ranks, rendezvous, most_summed = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
cuda_group._MOST_SUMMED = most_summed
device = CudaDevice(library(), rank)
fault = device.zeros(1, dtype=torch.int32)
regions = PeerRegions(device, (1,) * ranks, 1024, 1500, 1, fault)
group = PeerGroup(rank, rendezvous, regions)
random = torch.Generator().manual_seed(5)
parts = [torch.randn(1500, 1024, generator=random).bfloat16() for _ in range(ranks)]
x = device.zeros(1500, 1024, dtype=torch.bfloat16)
rows, program = Count(1500), device.program()
group.add_up(program, x, rows)
with device.capture() as graph:
    program.run()
for count in (1500, 3, 700, 1500, 0, 0):
    device.send_whole(x, parts[rank])
    if count:
        rows.set(count)
        program.run()
    else:
        graph.launch()
        count = 1500
    expected = sum(part.float() for part in parts).bfloat16()
    expected[count:] = parts[rank][count:]
    assert torch.equal(device.fetch(x), expected), count
assert not device.fetch(fault).item()
"""
CLOSE = """
group.close()
"""
DIE = """
import os

if rank == 1:
    os._exit(0)
program.run()
assert device.fetch(fault).item() == 6
group.close()
"""
"""A rank is gone before a sum in two steps."""


def run(script: str, rendezvous: Path, most_summed: int) -> None:
    """On three ranks."""
    ranks = 3
    env = {**os.environ, "SHOAL_CUDA_LIBRARY": str(emulated.build()), "SHOAL_EMULATED_DEVICES": str(ranks)}
    arguments = (str(ranks), str(rendezvous), str(most_summed))
    crew = [
        subprocess.Popen((sys.executable, "-c", script, str(rank), *arguments), env=env, stderr=subprocess.PIPE)
        for rank in range(ranks)
    ]
    for rank in crew:
        _, said = rank.communicate(timeout=300)
        assert rank.returncode == 0, said.decode()


@pytest.mark.parametrize("most_summed", [16 << 20, 5 << 18])
def test_ranks_add_up_in_two_steps_and_in_parts(most_summed: int, tmp_path: Path) -> None:
    """Three megabytes, a few rows, one and a half, and a graph of three: in whole, or through slots of one and a
    quarter."""
    run(RANK + CLOSE, tmp_path / "rendezvous", most_summed)


def test_a_rank_that_dies_is_told_of_in_two_steps_too(tmp_path: Path) -> None:
    run(RANK + DIE, tmp_path / "rendezvous", 16 << 20)
