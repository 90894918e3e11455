"""Sums over ranks, in one step and in two, and columns side by side: ranks are launches here, all of whose blocks take
turns."""

import pytest
import torch
from emulated import DTYPES
from torch import Tensor

from shoal.cuda_ext import reference
from shoal.cuda_ext.cuda_binding import Call, CudaLibrary

HEADER_BYTES = 4096


class Crew:
    """Ranks that share memory."""

    def __init__(self, ranks: int, most: int, dtype: torch.dtype) -> None:
        self.slot_bytes = -(-most * dtype.itemsize // 32) * 32
        self.regions = [
            torch.zeros(HEADER_BYTES + 2 * self.slot_bytes, dtype=torch.uint8) for _ in range(ranks)
        ]
        self.pointers = torch.tensor([region.data_ptr() for region in self.regions])
        self.faults = [torch.zeros(1, dtype=torch.int32) for _ in range(ranks)]
        self.stop = torch.zeros(1, dtype=torch.int32)

    def call(self, rank: int, x: Tensor, steps: int = 0) -> Call:
        return "all_reduce", {
            "x": x, "regions": self.pointers, "stop": self.stop, "fault": self.faults[rank], "count": x.numel(),
            "rank": rank, "ranks": len(self.regions), "slot_bytes": self.slot_bytes, "dtype": DTYPES[x.dtype],
            "steps": steps,
        }  # fmt: skip

    def add_up(self, cuda: CudaLibrary, parts: list[Tensor], steps: int = 0) -> None:
        """Overwrites every rank's part."""
        cuda.run([self.call(rank, part, steps) for rank, part in enumerate(parts)], together=True)
        assert not any(fault.item() for fault in self.faults)


def sum_in_order(parts: list[Tensor]) -> Tensor:
    return reference.all_reduce([part.float() for part in parts]).to(parts[0].dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
def test_every_rank_has_the_sum_in_the_order_of_ranks(
    cuda: CudaLibrary, fresh: torch.Generator, dtype: torch.dtype, ranks: int
) -> None:
    """Several calls through the same regions, in one step and in two, of counts that use other numbers of blocks."""
    crew = Crew(ranks, 2600, dtype)
    for steps, count in ((1, 2600), (2, 2600), (2, 8), (2, 2599), (1, 1), (2, 1), (1, 1100), (2, 77)):
        parts = [torch.randn(count, generator=fresh).to(dtype) for _ in range(ranks)]
        expected = sum_in_order(parts)
        crew.add_up(cuda, parts, steps)
        assert all(torch.equal(part, expected) for part in parts)


@pytest.mark.parametrize("steps", [1, 2])
def test_blocks_with_several_pieces(cuda: CudaLibrary, fresh: torch.Generator, steps: int) -> None:
    """More pieces than blocks: some blocks have two, the last one is no whole chunk."""
    count = 64 * 1024 + 3 * 1024 + 300
    crew = Crew(3, count, torch.bfloat16)
    parts = [torch.randn(count, generator=fresh).bfloat16() for _ in range(3)]
    expected = sum_in_order(parts)
    crew.add_up(cuda, parts, steps)
    assert all(torch.equal(part, expected) for part in parts)


def test_what_is_larger_than_a_slot_goes_in_parts(cuda: CudaLibrary, fresh: torch.Generator) -> None:
    """One rank here; tests/process/test_cuda_group.py has several."""
    crew = Crew(1, 1040, torch.bfloat16)
    x = torch.randn(3000, generator=fresh).bfloat16()
    expected = x.clone()
    for steps in (0, 1, 2):
        cuda.run([crew.call(0, x, steps)])
        assert torch.equal(x, expected)
    calls_of_the_first_block = crew.regions[0][:HEADER_BYTES].view(torch.int32)[64 * 8]
    assert calls_of_the_first_block == 3 * 3


@pytest.mark.parametrize("steps", [1, 2])
def test_tensors_that_are_not_aligned(cuda: CudaLibrary, fresh: torch.Generator, steps: int) -> None:
    crew = Crew(2, 540, torch.bfloat16)
    parts = [torch.randn(541, generator=fresh).bfloat16()[1:] for _ in range(2)]
    expected = sum_in_order(parts)
    crew.add_up(cuda, parts, steps)
    assert torch.equal(parts[0], expected)
    assert torch.equal(parts[1], expected)


@pytest.mark.parametrize(
    ("ranks", "count", "steps"),
    [(2, 1 << 23, 1), (3, 1 << 20, 2), (4, 1 << 16, 1), (4, 1 << 19, 2), (8, 1 << 15, 1), (8, 1 << 17, 2)],
)
def test_the_form_is_picked_by_size_and_ranks(cuda: CudaLibrary, ranks: int, count: int, steps: int) -> None:
    """A rank alone, told to stop: it goes by as many meetings as there are steps, and leaves their last sign."""
    crew = Crew(ranks, count, torch.bfloat16)
    crew.stop[0] = 1
    cuda.run([crew.call(0, torch.zeros(count).bfloat16())], together=True)
    assert crew.regions[1][:HEADER_BYTES].view(torch.int32)[0] == 2 + steps - 1


@pytest.mark.parametrize("steps", [1, 2])
def test_a_rank_that_waits_in_vain_can_be_stopped(cuda: CudaLibrary, steps: int) -> None:
    crew = Crew(2, 40, torch.bfloat16)
    crew.stop[0] = 1
    cuda.run([crew.call(0, torch.ones(40).bfloat16(), steps)], together=True)
    assert crew.faults[0].item() == 6


def test_waiting_for_ever_is_a_deadlock_by_name(emulation: CudaLibrary) -> None:
    crew = Crew(2, 40, torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"deadlock in all_reduce.*another block's sign"):
        emulation.run([crew.call(0, torch.ones(40).bfloat16())], together=True)


def test_more_ranks_than_there_may_be_and_other_steps_are_refused(cuda: CudaLibrary) -> None:
    for crew, steps in ((Crew(9, 40, torch.bfloat16), 0), (Crew(2, 40, torch.bfloat16), 3)):
        with pytest.raises(NotImplementedError):
            cuda.run([crew.call(0, torch.ones(40).bfloat16(), steps)], together=True)


@pytest.mark.parametrize("widths", [[7], [300, 130], [2, 0, 0], [33, 1, 500]])
def test_columns_are_put_side_by_side(cuda: CudaLibrary, fresh: torch.Generator, widths: list[int]) -> None:
    """On those that want them: here the first and the last. More rows than blocks, then fewer."""
    ranks, total = len(widths), sum(widths)
    crew = Crew(ranks, 80 * max(widths), torch.float32)
    for rows in (80, 1, 3):
        parts = [torch.randn(rows, width + 3, generator=fresh)[:, :width] for width in widths]
        outs = [torch.zeros(rows, total) for _ in widths]

        def call(rank: int) -> Call:
            out = outs[rank] if rank in (0, ranks - 1) else None  # noqa: B023
            return "gather_columns", {
                "out": out, "x": parts[rank], "widths": torch.tensor(widths), "regions": crew.pointers,  # noqa: B023
                "stop": crew.stop, "fault": crew.faults[rank], "rows": rows, "x_stride": widths[rank] + 3,  # noqa: B023
                "out_stride": total, "rank": rank, "ranks": ranks, "slot_bytes": crew.slot_bytes,
            }  # fmt: skip

        cuda.run([call(rank) for rank in range(ranks)], together=True)
        assert torch.equal(outs[0], torch.cat(parts, 1))
        assert torch.equal(outs[-1], outs[0])
    assert not any(fault.item() for fault in crew.faults)
