"""The draw: shares against probabilities, single draws against the twin, rows apart."""

import math

import pytest
import torch
from torch import Tensor

from shoal.cuda_ext import reference
from shoal.cuda_ext.cuda_binding import CudaLibrary

pytestmark = [pytest.mark.usefixtures("chip"), pytest.mark.parametrize("chip", ["80", "90"], indirect=True)]

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
TYPES = {"temperature": torch.float32, "top_k": torch.int64, "top_p": torch.float32, "min_p": torch.float32}

FILTERS = [
    {},
    {"temperature": 0.3},
    {"temperature": 1.9},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 1000},
    {"top_p": 0.4},
    {"top_p": 0.97},
    {"top_p": 0.0},
    {"min_p": 0.08},
    {"min_p": 1.0},
    {"temperature": 1.4, "top_k": 12, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 40.0, "top_p": 0.9},
    {"top_k": 30, "top_p": 0.999},
]


def columns_of(rows: int, sampling: dict[str, float]) -> dict[str, Tensor]:
    return {name: torch.full((rows,), value, dtype=TYPES[name]) for name, value in (OFF | sampling).items()}


def draw_rows(cuda: CudaLibrary, logits: Tensor, uniform: Tensor, **columns: Tensor) -> Tensor:
    rows, vocabulary = logits.shape
    ids = torch.full((rows,), -7)
    cuda.call(
        "draw", ids=ids, logits=logits, uniform=uniform, rows=rows, vocabulary=vocabulary,
        row_stride=logits.stride(0), **columns,
    )  # fmt: skip
    return ids


def draw(cuda: CudaLibrary, logits: Tensor, uniform: Tensor, **sampling: float) -> Tensor:
    """The same sampling for every row."""
    return draw_rows(cuda, logits, uniform, **columns_of(len(logits), sampling))


def kept_probabilities(logits: Tensor, **sampling: float) -> list[float]:
    """Straight from the definitions, in float64 and plain Python."""
    wanted = OFF | sampling
    peak = max(logits.tolist())
    weights = [math.exp((x - peak) / wanted["temperature"]) for x in logits.tolist()]
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    if wanted["top_k"]:
        order = order[: int(wanted["top_k"])]
    total, mass, kept = sum(weights[i] for i in order), 0.0, set()
    for i in order:
        kept.add(i)
        mass += weights[i]
        if mass >= wanted["top_p"] * total:
            break
    kept = {i for i in kept if weights[i] >= wanted["min_p"] * weights[order[0]]}
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_every_token_is_drawn_in_its_share(
    cuda: CudaLibrary, fresh: torch.Generator, filters: dict[str, float]
) -> None:
    """An even grid of uniform numbers turns the draw into the distribution itself."""
    logits, grid = torch.randn(61, generator=fresh) * 2, 60
    uniform = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    drawn = draw(cuda, logits.expand(grid, -1).contiguous(), uniform, **filters)
    shares = torch.bincount(drawn, minlength=61) / grid
    expected = torch.tensor(kept_probabilities(logits, **filters))
    torch.testing.assert_close(shares, expected, rtol=0, atol=1.01 / grid)


@pytest.mark.parametrize("vocabulary", [1, 2, 31, 513, 5003])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_it_agrees_with_its_twin(
    cuda: CudaLibrary, fresh: torch.Generator, vocabulary: int, filters: dict[str, float]
) -> None:
    rows = 4
    logits = torch.randn(rows, vocabulary, generator=fresh) * 3
    uniform = torch.rand(rows, generator=fresh, dtype=torch.float64)
    ours = draw(cuda, logits, uniform, **filters)
    twin = reference.draw(logits, uniform=uniform, **columns_of(rows, filters))
    # The two round their sums differently: a number within 1e-6 of a token's edge may fall on either side.
    assert (ours != twin).sum() <= 1


def test_a_vocabulary_that_a_cluster_does_not_hold(cuda: CudaLibrary, fresh: torch.Generator) -> None:
    logits = torch.randn(1, 470_001, generator=fresh) * 3
    uniform = torch.tensor([0.4], dtype=torch.float64)
    for filters in ({}, {"top_k": 9, "top_p": 0.8}):
        twin = reference.draw(logits, uniform=uniform, **columns_of(1, filters))
        assert torch.equal(draw(cuda, logits, uniform, **filters), twin)


def test_flat_and_peaked_distributions(cuda: CudaLibrary, fresh: torch.Generator) -> None:
    flat, half = torch.zeros(1, 9001), torch.tensor([0.5], dtype=torch.float64)
    almost_one = torch.tensor([0.999], dtype=torch.float64)
    assert draw(cuda, flat, half).item() == 4500
    assert draw(cuda, flat, almost_one, top_p=0.5).item() == pytest.approx(4496, abs=2)
    assert draw(cuda, flat, almost_one, top_k=10).item() == 9
    peaked = torch.full((1, 9001), -80.0)
    peaked[0, 4321] = 30.0
    for filters in FILTERS[:-2]:
        uniform = torch.rand(1, generator=fresh, dtype=torch.float64)
        assert draw(cuda, peaked, uniform, **filters).item() == 4321


def test_the_ends_of_the_unit_interval(cuda: CudaLibrary) -> None:
    logits = torch.full((1, 700), -torch.inf)
    logits[0, [33, 600]] = 1.0
    first, last = torch.zeros(1, dtype=torch.float64), torch.full((1,), 1 - 2**-53, dtype=torch.float64)
    for filters in ({}, {"top_k": 5}, {"top_p": 0.99}, {"min_p": 0.5}):
        assert draw(cuda, logits, first, **filters).item() == 33
        assert draw(cuda, logits, last, **filters).item() == 600


def test_greedy_takes_the_lowest_id_among_equals(cuda: CudaLibrary, fresh: torch.Generator) -> None:
    logits = torch.randn(5, 1003, generator=fresh).clamp_max(2.0)
    logits[:, [1002, 400, 77]] = 3.0
    logits[3, 5] = 3.0
    drawn = draw(cuda, logits, torch.full((5,), 0.9, dtype=torch.float64), temperature=0.0)
    assert drawn.tolist() == [77, 77, 77, 5, 77]


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-8])
def test_tiny_temperatures_do_not_overflow(
    cuda: CudaLibrary, fresh: torch.Generator, temperature: float
) -> None:
    logits = torch.randn(4, 300, generator=fresh) * 50
    uniform = torch.rand(4, generator=fresh, dtype=torch.float64)
    assert torch.equal(draw(cuda, logits, uniform, temperature=temperature), logits.argmax(dim=1))


@pytest.mark.parametrize("filters", [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 3}], ids=str)
def test_a_row_that_is_not_finite_stays_alone(
    cuda: CudaLibrary, fresh: torch.Generator, filters: dict[str, float]
) -> None:
    logits = torch.randn(7, 531, generator=fresh)
    uniform = torch.rand(7, generator=fresh, dtype=torch.float64)
    healthy = draw(cuda, logits, uniform, **filters)
    logits[1, 530], logits[3, 2], logits[4] = torch.nan, torch.inf, -torch.inf
    logits[6, 17] = -torch.inf if healthy[6] != 17 else logits[6, 17]
    drawn = draw(cuda, logits, uniform, **filters)
    assert drawn[[1, 3, 4]].tolist() == [-1, -1, -1]
    assert drawn[[0, 2, 5]].tolist() == healthy[[0, 2, 5]].tolist()
    assert drawn[6] >= 0


def test_rows_do_not_depend_on_their_batch(cuda: CudaLibrary, fresh: torch.Generator) -> None:
    rows = 12
    logits = torch.randn(rows, 1503, generator=fresh)[:, :1500] * 2
    columns = {
        "temperature": torch.rand(rows, generator=fresh).mul(2).where(torch.arange(rows) % 5 > 0, 0.0),
        "top_k": torch.randint(0, 3, (rows,), generator=fresh) * 20,
        "top_p": torch.rand(rows, generator=fresh).where(torch.arange(rows) % 2 > 0, 1.0),
        "min_p": torch.rand(rows, generator=fresh).mul(0.1).where(torch.arange(rows) % 3 > 0, 0.0),
        "uniform": torch.rand(rows, generator=fresh, dtype=torch.float64),
    }
    together = draw_rows(cuda, logits, **columns)
    order = torch.randperm(rows, generator=fresh)
    for some in (*(torch.tensor([i]) for i in range(rows)), order):
        apart = draw_rows(cuda, logits[some], **{name: column[some] for name, column in columns.items()})
        assert torch.equal(apart, together[some])
