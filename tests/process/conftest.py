"""Tests marked ``ahead`` only wait for compilers and for programs of one thread: those of a module begin together, as
many at a time as there are processors, and each then tells how its own ended. They take parameters and ``tmp_path``
alone."""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest

Outcomes = dict[str, "Future[None]"]


@pytest.fixture(scope="module")
def begun(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcomes]:
    """By their ids, the module's marked tests that were chosen."""
    outcomes: Outcomes = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for item in request.session.items:
            if isinstance(item, pytest.Function) and item.path == request.path and is_ahead(item):
                outcomes[item.nodeid] = pool.submit(run, item, tmp_path_factory.mktemp("ahead"))
        yield outcomes
        for outcome in outcomes.values():
            outcome.cancel()


def is_ahead(item: pytest.Function) -> bool:
    return item.get_closest_marker("ahead") is not None


def run(item: pytest.Function, folder: Path) -> None:
    given: dict[str, Any] = dict(item.callspec.params) if hasattr(item, "callspec") else {}
    if "tmp_path" in item.fixturenames:
        given["tmp_path"] = folder
    item.function(**given)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and is_ahead(item):
            item.fixturenames.append("begun")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not is_ahead(pyfuncitem):
        return None
    cast("Outcomes", pyfuncitem.funcargs["begun"])[pyfuncitem.nodeid].result()
    return True
