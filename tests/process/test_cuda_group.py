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
for count in (1500, 3, 700, 1500):
    device.send_whole(x, parts[rank])
    rows.set(count)
    program.run()
    expected = sum(part.float() for part in parts).bfloat16()
    expected[count:] = parts[rank][count:]
    assert torch.equal(device.fetch(x), expected), count
assert not device.fetch(fault).item()
group.close()
"""


@pytest.mark.parametrize("most_summed", [16 << 20, 5 << 18])
def test_three_ranks_add_up_in_two_steps_and_in_parts(most_summed: int, tmp_path: Path) -> None:
    """Three megabytes, a few rows, and one and a half: in whole, or through slots of one and a quarter."""
    ranks = 3
    env = {**os.environ, "SHOAL_CUDA_LIBRARY": str(emulated.build()), "SHOAL_EMULATED_DEVICES": str(ranks)}
    arguments = (str(ranks), str(tmp_path / "rendezvous"), str(most_summed))
    crew = [
        subprocess.Popen((sys.executable, "-c", RANK, str(rank), *arguments), env=env, stderr=subprocess.PIPE)
        for rank in range(ranks)
    ]
    for rank in crew:
        _, said = rank.communicate(timeout=300)
        assert rank.returncode == 0, said.decode()
