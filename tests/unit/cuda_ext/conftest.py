"""Runs each kernel test at every level of instructions that was compiled and that this processor has."""

from collections.abc import Iterator

import pytest
import torch

from shoal.cuda_ext import ops
from shoal.cuda_ext.binding import library


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    ops.set_threads(1)
    yield
    ops.set_threads(1)


def compiled_levels() -> list[str]:
    """Where nothing was compiled one name remains, so that each test is reported as skipped."""
    compiled = library()
    return list(compiled.levels()) if compiled else ["compiled"]


@pytest.fixture(params=compiled_levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    compiled = library()
    if compiled is None:
        pytest.skip("no CPU library was built: the operators are their own reference")
    before = compiled.level
    if not compiled.use_level(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    compiled.use_level(before)


@pytest.fixture
def fresh() -> torch.Generator:
    """New numbers in every run; the seed stands in the report of a failing test."""
    generator = torch.Generator()
    print("seed", generator.seed())  # noqa: T201
    return generator
