"""The draw: filters against a plain float64 computation, frequencies against probabilities, rows apart."""

import math

import eager
import pytest
import torch
from torch import Tensor

from shoal.cuda_ext import reference

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
TYPES = {"temperature": torch.float32, "top_k": torch.int64, "top_p": torch.float32, "min_p": torch.float32}


def draw(logits: Tensor, uniform: Tensor, **sampling: float) -> Tensor:
    """The same sampling for every row."""
    columns = {
        name: torch.full((len(logits),), value, dtype=TYPES[name]) for name, value in (OFF | sampling).items()
    }
    return eager.draw(logits, uniform=uniform, **columns)


def kept_probabilities(logits: Tensor, **sampling: float) -> list[float]:
    """Straight from the definitions, in float64 and plain Python."""
    wanted = OFF | sampling
    peak = max(logits.tolist())
    weights = [math.exp((x - peak) / wanted["temperature"]) for x in logits.tolist()]
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    if wanted["top_k"]:
        order = order[: int(wanted["top_k"])]
    total, mass, kept = sum(weights[i] for i in order), 0.0, []
    for i in order:
        kept.append(i)
        mass += weights[i]
        if mass >= wanted["top_p"] * total:
            break
    kept = [i for i in kept if weights[i] >= wanted["min_p"] * weights[order[0]]]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


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


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_every_token_is_drawn_in_its_share(fresh: torch.Generator, filters: dict[str, float]) -> None:
    """An even grid of uniform numbers turns the draw into the distribution itself."""
    logits = torch.randn(61, generator=fresh) * 2
    grid = 4000
    uniform = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    drawn = draw(logits.expand(grid, -1).contiguous(), uniform, **filters)
    shares = torch.bincount(drawn, minlength=61) / grid
    expected = torch.tensor(kept_probabilities(logits, **filters))
    torch.testing.assert_close(shares, expected, rtol=0, atol=1.01 / grid)


@pytest.mark.usefixtures("level")
def test_chi_square_of_the_frequencies(fresh: torch.Generator) -> None:
    logits = torch.randn(40, generator=fresh)
    draws = 20_000
    seeded = torch.Generator().manual_seed(7)
    drawn = draw(
        logits.expand(draws, -1).contiguous(), torch.rand(draws, generator=seeded, dtype=torch.float64)
    )
    expected = torch.tensor(kept_probabilities(logits)) * draws
    chi_square = ((torch.bincount(drawn, minlength=40) - expected) ** 2 / expected).sum().item()
    assert chi_square < 39 + 6 * math.sqrt(2 * 39)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("vocabulary", [1, 2, 15, 255, 256, 257, 5003])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_it_agrees_with_its_twin(fresh: torch.Generator, vocabulary: int, filters: dict[str, float]) -> None:
    rows = 12
    logits = torch.randn(rows, vocabulary, generator=fresh) * 3
    uniform = torch.rand(rows, generator=fresh, dtype=torch.float64)
    columns = {name: torch.full((rows,), value, dtype=TYPES[name]) for name, value in (OFF | filters).items()}
    ours = eager.draw(logits, uniform=uniform, **columns)
    twin = reference.draw(logits, uniform=uniform, **columns)
    # The two round their sums differently: a number within 1e-6 of a token's edge may fall on either side.
    assert (ours != twin).sum() <= 1


@pytest.mark.usefixtures("level")
def test_flat_and_peaked_distributions(fresh: torch.Generator) -> None:
    flat = torch.zeros(1, 9001)
    assert draw(flat, torch.tensor([0.5], dtype=torch.float64)).item() == 4500
    assert draw(flat, torch.tensor([0.999], dtype=torch.float64), top_p=0.5).item() == pytest.approx(
        4496, abs=2
    )
    assert draw(flat, torch.tensor([0.999], dtype=torch.float64), top_k=10).item() == 9
    peaked = torch.full((1, 9001), -80.0)
    peaked[0, 4321] = 30.0
    for filters in FILTERS[:-2]:
        assert draw(peaked, torch.rand(1, generator=fresh, dtype=torch.float64), **filters).item() == 4321


@pytest.mark.usefixtures("level")
def test_the_ends_of_the_unit_interval(fresh: torch.Generator) -> None:
    logits = torch.full((1, 700), -float("inf"))
    logits[0, [33, 600]] = 1.0
    first, last = torch.zeros(1, dtype=torch.float64), torch.full((1,), 1 - 2**-53, dtype=torch.float64)
    for filters in ({}, {"top_k": 5}, {"top_p": 0.99}, {"min_p": 0.5}):
        assert draw(logits, first, **filters).item() == 33
        assert draw(logits, last, **filters).item() == 600


@pytest.mark.usefixtures("level")
def test_greedy_takes_the_lowest_id_among_equals(fresh: torch.Generator) -> None:
    logits = torch.randn(5, 1003, generator=fresh).clamp_max(2.0)
    logits[:, [1002, 400, 77]] = 3.0
    logits[3, 5] = 3.0
    drawn = draw(logits, torch.full((5,), 0.9, dtype=torch.float64), temperature=0.0)
    assert drawn.tolist() == [77, 77, 77, 5, 77]


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-8])
def test_tiny_temperatures_do_not_overflow(fresh: torch.Generator, temperature: float) -> None:
    logits = torch.randn(4, 300, generator=fresh) * 50
    drawn = draw(logits, torch.rand(4, generator=fresh, dtype=torch.float64), temperature=temperature)
    assert torch.equal(drawn, logits.argmax(dim=1))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("filters", [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 3}], ids=str)
def test_a_row_that_is_not_finite_stays_alone(fresh: torch.Generator, filters: dict[str, float]) -> None:
    logits = torch.randn(7, 531, generator=fresh)
    uniform = torch.rand(7, generator=fresh, dtype=torch.float64)
    healthy = draw(logits, uniform, **filters)
    logits[1, 530] = float("nan")
    logits[3, 2] = float("inf")
    logits[4] = -float("inf")
    logits[6, 17] = -float("inf") if healthy[6] != 17 else logits[6, 17]
    drawn = draw(logits, uniform, **filters)
    assert drawn[[1, 3, 4]].tolist() == [-1, -1, -1]
    assert drawn[[0, 2, 5]].tolist() == healthy[[0, 2, 5]].tolist()
    assert drawn[6] >= 0


@pytest.mark.usefixtures("level")
def test_rows_do_not_depend_on_batch_order_or_threads(fresh: torch.Generator) -> None:
    rows = 24
    logits = torch.randn(rows, 1500, generator=fresh) * 2
    columns = {
        "temperature": torch.rand(rows, generator=fresh).mul(2).where(torch.arange(rows) % 5 > 0, 0.0),
        "top_k": torch.randint(0, 3, (rows,), generator=fresh) * 20,
        "top_p": torch.rand(rows, generator=fresh).where(torch.arange(rows) % 2 > 0, 1.0),
        "min_p": torch.rand(rows, generator=fresh).mul(0.1).where(torch.arange(rows) % 3 > 0, 0.0),
        "uniform": torch.rand(rows, generator=fresh, dtype=torch.float64),
    }
    together = eager.draw(logits, **columns)
    alone = [
        eager.draw(logits[i : i + 1], **{k: v[i : i + 1] for k, v in columns.items()}) for i in range(rows)
    ]
    assert torch.equal(torch.cat(alone), together)
    order = torch.randperm(rows, generator=fresh)
    assert torch.equal(eager.draw(logits[order], **{k: v[order] for k, v in columns.items()}), together[order])
    for threads in (2, 3):
        eager.set_threads(threads)
        assert torch.equal(eager.draw(logits, **columns), together)


def test_the_twin_alone_draws_in_shares_too(fresh: torch.Generator) -> None:
    logits = torch.randn(17, generator=fresh)
    uniform = (torch.arange(500, dtype=torch.float64) + 0.5) / 500
    rows = logits.expand(500, -1)
    for filters in FILTERS:
        columns = {name: torch.full((500,), v, dtype=TYPES[name]) for name, v in (OFF | filters).items()}
        shares = torch.bincount(reference.draw(rows, uniform=uniform, **columns), minlength=17) / 500
        expected = torch.tensor(kept_probabilities(logits, **filters))
        torch.testing.assert_close(shares, expected, rtol=0, atol=1.01 / 500)
