"""What log-probabilities are made of, against torch in float64 and against the host's arithmetic."""

import numpy as np
import pytest
import torch
from torch import Tensor

from shoal.cuda_ext.cuda_binding import CudaLibrary
from shoal.workers.logprobs import token_logprob

pytestmark = [pytest.mark.usefixtures("chip"), pytest.mark.parametrize("chip", ["80", "90"], indirect=True)]

WIDTH = 7


class Scores:
    """Of some rows of logits. The places that nothing is written to hold what was there."""

    def __init__(self, cuda: CudaLibrary, logits: Tensor, rows: list[int], tops: list[int]) -> None:
        count = len(rows)
        self.totals = torch.full((count,), 1e9, dtype=torch.float64)
        self.ids = torch.full((count, WIDTH), -7, dtype=torch.int32)
        self.values = torch.full((count, WIDTH), 1e9)
        sizes = {"logits_rows": len(logits), "vocabulary": logits.shape[1], "row_stride": logits.stride(0)}
        cuda.call(
            "score_logits", totals=self.totals, top_ids=self.ids, top_values=self.values, logits=logits,
            rows=torch.tensor(rows), tops=torch.tensor(tops, dtype=torch.int32), count=count, width=WIDTH, **sizes,
        )  # fmt: skip


@pytest.mark.parametrize("vocabulary", [1, 31, 513, 5003])
def test_sums_and_the_best(cuda: CudaLibrary, fresh: torch.Generator, vocabulary: int) -> None:
    """Rows of a wider matrix, in any order, one of them twice."""
    logits = torch.randn(6, vocabulary + 3, generator=fresh)[:, :vocabulary] * 5
    rows, tops = [5, 0, 2, 2, 3], [7, 0, 1, 3, 12]
    scores = Scores(cuda, logits, rows, tops)
    torch.testing.assert_close(scores.totals, logits.double().logsumexp(1)[rows], rtol=0, atol=3e-7)
    for place, (row, top) in enumerate(zip(rows, tops, strict=True)):
        told = min(top, WIDTH)
        best = logits[row].sort(descending=True, stable=True)
        expected = best.indices[:told].tolist() + [-1] * max(0, told - vocabulary)
        assert scores.ids[place].tolist() == expected + [-7] * (WIDTH - told)
        held = min(told, vocabulary)
        assert torch.equal(scores.values[place, :held], best.values[:held])


def test_the_hosts_log_probabilities_but_for_the_last_bits(cuda: CudaLibrary, fresh: torch.Generator) -> None:
    """Which ids are best and what lies between them are the host's to the bit; the sum is not."""
    logits = torch.randn(9, 4001, generator=fresh) * 6
    scores = Scores(cuda, logits, list(range(9)), [5] * 9)
    for row, view in enumerate(logits.numpy()):
        expected = token_logprob(view, 17, 5)
        total = scores.totals[row].item()
        assert float(view[17]) - total == pytest.approx(expected.logprob, abs=3e-7)
        assert scores.ids[row, :5].tolist() == [token for token, _ in expected.top]
        told = [value - total for value in scores.values[row, :5].tolist()]
        assert told == pytest.approx([logprob for _, logprob in expected.top], abs=3e-7)


def test_equals_go_by_their_ids(cuda: CudaLibrary) -> None:
    logits = torch.full((1, 3000), -2.0)
    logits[0, [7, 600, 2999]] = 1.5
    assert Scores(cuda, logits, [0], [6]).ids.tolist() == [[7, 600, 2999, 0, 1, 2, -7]]


def test_a_row_does_not_depend_on_the_others(cuda: CudaLibrary, fresh: torch.Generator) -> None:
    logits = torch.randn(5, 2000, generator=fresh)
    together = Scores(cuda, logits, [4, 1, 3], [3, 3, 3])
    for place, row in enumerate([4, 1, 3]):
        alone = Scores(cuda, logits[row : row + 1], [0], [3])
        assert torch.equal(alone.totals[0], together.totals[place])
        assert torch.equal(alone.values[0], together.values[place])


def test_rows_that_are_not_finite(cuda: CudaLibrary, fresh: torch.Generator) -> None:
    logits = torch.randn(4, 700, generator=fresh)
    logits[0, 300], logits[1, 300], logits[2] = torch.nan, torch.inf, -torch.inf
    logits[3, 5:] = -torch.inf
    scores = Scores(cuda, logits, [0, 1, 2, 3], [2, 2, 2, 7])
    assert scores.totals.isnan().tolist() == [True, True, True, False]
    assert scores.ids[1, 0] == 300
    assert scores.ids[2, :2].tolist() == [-1, -1]
    assert sorted(scores.ids[3].tolist()) == [-1, -1, 0, 1, 2, 3, 4]


def test_rows_and_ids_out_of_range_are_left_out(cuda: CudaLibrary, fresh: torch.Generator) -> None:
    logits = torch.randn(3, 600, generator=fresh)
    scores = Scores(cuda, logits, [3, -1, 2], [1, 1, 1])
    assert scores.totals[:2].tolist() == [1e9, 1e9]
    assert scores.ids[:2, 0].tolist() == [-7, -7]
    assert scores.ids[2, 0] == logits[2].argmax()

    values, ids = torch.full((4,), -7.0), torch.tensor([599, 600, -1])
    sizes = {"count": 4, "logits_rows": 3, "vocabulary": 600, "row_stride": 600}
    cuda.call("pick_logits", values=values, logits=logits, rows=torch.tensor([0, 1, 2, 3]), ids=ids, **sizes)
    assert values.tolist() == [logits[0, 599].item(), -7, -7, -7]


@pytest.mark.parametrize("count", [1, 512, 700])
def test_logits_of_ids_are_picked(cuda: CudaLibrary, fresh: torch.Generator, count: int) -> None:
    logits = torch.randn(700, 40, generator=fresh)[:, :37]
    ids, rows = torch.randint(37, (700,), generator=fresh), torch.randperm(700, generator=fresh)[:count]
    values = torch.zeros(count)
    sizes = {"count": count, "logits_rows": 700, "vocabulary": 37, "row_stride": 40}
    cuda.call("pick_logits", values=values, logits=logits, rows=rows, ids=ids, **sizes)
    assert np.array_equal(values.numpy(), logits.numpy()[rows.numpy(), ids.numpy()[rows.numpy()]])
