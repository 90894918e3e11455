"""Ranks as threads of one process that share a region: sums, gathered columns, and what a lost rank does to them."""

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from shoal.cuda_ext import ops, reference
from shoal.cuda_ext.binding import PeerLost, library
from shoal.cuda_ext.program import Count, Program
from shoal.cuda_ext.shared_region import CHUNK, SharedRegion


@pytest.fixture(params=["compiled", "twin"])
def runs_on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "compiled" and library() is None:
        pytest.skip("no CPU library was built")
    if request.param == "twin":
        monkeypatch.setattr("shoal.cuda_ext.program.library", lambda: None)
        monkeypatch.setattr("shoal.cuda_ext.shared_region.library", lambda: None)


pytestmark = pytest.mark.usefixtures("runs_on")


def regions(ranks: int, chunk: int = CHUNK, pids: Sequence[int] = ()) -> list[SharedRegion]:
    memory = mmap.mmap(-1, SharedRegion.bytes_for(ranks, chunk))
    return [SharedRegion(memory, rank, pids or [os.getpid()] * ranks, chunk) for rank in range(ranks)]


def on_ranks(work: Callable[[SharedRegion], None], among: Sequence[SharedRegion]) -> None:
    with ThreadPoolExecutor(len(among)) as pool:
        for running in [pool.submit(work, region) for region in among]:
            running.result(60)


def all_reduced(parts: list[Tensor], among: Sequence[SharedRegion], count: int | None = None) -> list[Tensor]:
    results = [part.clone() for part in parts]
    rows = Count(len(parts[0]))
    rows.set(rows.most if count is None else count)

    def work(region: SharedRegion) -> None:
        program = Program()
        ops.all_reduce(program, results[region.rank], region, rows)
        program.run()

    on_ranks(work, among)
    return results


def numbers(fresh: torch.Generator, ranks: int, *shape: int) -> list[Tensor]:
    return [torch.randn(shape, generator=fresh) * 10.0 ** (rank % 3) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("columns", [1, 7, 576, 4099])
def test_every_rank_gets_the_sum_in_the_order_of_ranks(
    fresh: torch.Generator, ranks: int, columns: int
) -> None:
    among = regions(ranks)
    for rows in (1, 16, 3):
        parts = numbers(fresh, ranks, rows, columns)
        found = all_reduced(parts, among)
        assert all(torch.equal(one, reference.all_reduce(parts)) for one in found)
        wide = torch.stack(parts).double()
        assert_close(found[0].double(), wide.sum(0), atol=float(wide.abs().sum(0).max()) * 1e-6, rtol=0)


@pytest.mark.parametrize(("ranks", "chunk"), [(2, 16), (3, 37), (5, 4096), (9, 1000)])
def test_sums_longer_than_the_region(fresh: torch.Generator, ranks: int, chunk: int) -> None:
    among = regions(ranks, chunk)
    parts = numbers(fresh, ranks, 29, 577)
    expected = reference.all_reduce(parts)
    for _ in range(3):
        assert all(torch.equal(found, expected) for found in all_reduced(parts, among))


def test_only_the_counted_rows_are_added(fresh: torch.Generator) -> None:
    parts = numbers(fresh, 2, 6, 10)
    for part, found in zip(parts, all_reduced(parts, regions(2), 4), strict=True):
        assert torch.equal(found[:4], parts[0][:4] + parts[1][:4])
        assert torch.equal(found[4:], part[4:])
    assert torch.equal(all_reduced(parts, regions(2), 0)[1], parts[1])


def test_no_sum_is_overtaken_by_the_next_ones(fresh: torch.Generator) -> None:
    """Ranks that run at once through sums and gatherings of many sizes, without a pause between them."""
    ranks, steps = 3, 40
    sizes = torch.randint(1, 3000, (steps,), generator=fresh).tolist()
    inputs = [numbers(fresh, ranks, 1, size) for size in sizes]
    among = regions(ranks, 1024)
    wrong: list[int] = []

    def work(region: SharedRegion) -> None:
        program, kept = Program(), []
        for parts in inputs:
            x = parts[region.rank].clone()
            out, widths = torch.zeros(1, ranks * x.shape[1]), torch.full((ranks,), x.shape[1])
            ops.gather_columns(program, out, parts[region.rank], widths, region)
            ops.all_reduce(program, x, region)
            kept.append((x, out))
        program.run()
        for step, (parts, (x, out)) in enumerate(zip(inputs, kept, strict=True)):
            if not (torch.equal(x, reference.all_reduce(parts)) and torch.equal(out, torch.cat(parts, 1))):
                wrong.append(step)

    on_ranks(work, among)
    assert wrong == []


@pytest.mark.parametrize("chunk", [13, CHUNK])
def test_columns_are_put_side_by_side(fresh: torch.Generator, chunk: int) -> None:
    widths = torch.tensor([5, 0, 31])
    parts = [torch.randn((7, width), generator=fresh) for width in widths.tolist()]
    outs = [torch.full((7, 36), torch.nan) for _ in parts]
    rows = Count(7)
    rows.set(6)

    def work(region: SharedRegion) -> None:
        program, rank = Program(), region.rank
        ops.gather_columns(program, None if rank == 1 else outs[rank], parts[rank], widths, region, rows)
        program.run()

    on_ranks(work, regions(3, chunk))
    for rank in (0, 2):
        assert torch.equal(outs[rank][:6], torch.cat(parts, dim=1)[:6])
        assert bool(outs[rank][6].isnan().all())
    assert bool(outs[1].isnan().all())


def seconds_until_lost(region: SharedRegion) -> float:
    program = Program()
    ops.all_reduce(program, torch.ones(2, 3), region)
    began_s = time.monotonic()
    with pytest.raises(PeerLost, match="gone"):
        program.run()
    return time.monotonic() - began_s


def test_a_rank_that_leaves_ends_the_waiting() -> None:
    first, second = regions(2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(seconds_until_lost, first)
        time.sleep(0.2)
        second.close()
        assert 0.1 < waiting.result(10) < 1
    second.close()
    first.close()


def test_a_rank_that_is_dead_ends_the_waiting() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as peer:
        region = regions(2, pids=[os.getpid(), peer.pid])[0]
        peer.kill()
        assert seconds_until_lost(region) < 1
    with pytest.raises(ProcessLookupError):
        regions(2, pids=[os.getpid(), peer.pid])
    region.close()


def test_what_does_not_fit_is_refused() -> None:
    region, program = regions(2)[0], Program()
    with pytest.raises(ValueError, match="65 ranks"):
        SharedRegion.bytes_for(65)
    with pytest.raises(ValueError, match="contiguous float32"):
        ops.all_reduce(program, torch.zeros(3, 4).t(), region)
    with pytest.raises(ValueError, match="another width"):
        ops.gather_columns(program, None, torch.zeros(3, 4), torch.tensor([3, 4]), region)
    with pytest.raises(ValueError, match="out does not fit"):
        ops.gather_columns(program, torch.zeros(3, 6), torch.zeros(3, 4), torch.tensor([4, 3]), region)
