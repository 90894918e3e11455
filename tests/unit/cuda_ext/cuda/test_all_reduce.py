"""The one-step sum over ranks that are launches here, all of whose blocks take turns."""

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

    def call(self, rank: int, x: Tensor) -> Call:
        return "all_reduce", {
            "x": x, "regions": self.pointers, "stop": self.stop, "fault": self.faults[rank], "count": x.numel(),
            "rank": rank, "ranks": len(self.regions), "slot_bytes": self.slot_bytes, "dtype": DTYPES[x.dtype],
        }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_every_rank_has_the_sum_in_the_order_of_ranks(
    cuda: CudaLibrary, fresh: torch.Generator, dtype: torch.dtype, ranks: int
) -> None:
    """Several calls through the same regions, of counts that use other numbers of blocks."""
    crew = Crew(ranks, 2600, dtype)
    for count in (2600, 8, 1, 1100, 2600, 77):
        parts = [torch.randn(count, generator=fresh).to(dtype) for _ in range(ranks)]
        expected = reference.all_reduce([part.float() for part in parts]).to(dtype)
        cuda.run([crew.call(rank, part) for rank, part in enumerate(parts)], together=True)
        assert all(torch.equal(part, expected) for part in parts)
    assert not any(fault.item() for fault in crew.faults)


def test_tensors_that_are_not_aligned(cuda: CudaLibrary, fresh: torch.Generator) -> None:
    crew = Crew(2, 40, torch.bfloat16)
    parts = [torch.randn(41, generator=fresh).bfloat16()[1:] for _ in range(2)]
    expected = (parts[0].float() + parts[1].float()).bfloat16()
    cuda.run([crew.call(rank, part) for rank, part in enumerate(parts)], together=True)
    assert torch.equal(parts[0], expected)


def test_a_rank_that_waits_in_vain_can_be_stopped(cuda: CudaLibrary) -> None:
    crew = Crew(2, 40, torch.bfloat16)
    crew.stop[0] = 1
    cuda.run([crew.call(0, torch.ones(40).bfloat16())], together=True)
    assert crew.faults[0].item() == 6


def test_waiting_for_ever_is_a_deadlock_by_name(emulation: CudaLibrary) -> None:
    crew = Crew(2, 40, torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"deadlock in all_reduce.*another block's sign"):
        emulation.run([crew.call(0, torch.ones(40).bfloat16())], together=True)


def test_what_does_not_fit_is_refused(cuda: CudaLibrary) -> None:
    crew = Crew(2, 40, torch.bfloat16)
    with pytest.raises(NotImplementedError):
        cuda.run([crew.call(0, torch.ones(100).bfloat16())], together=True)


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
