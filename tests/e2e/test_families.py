"""The decoder against Hugging Face transformers on tiny random checkpoints of every family (tests/tiny_models.py).

Prompts run past the sliding windows and past the original rope length.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from decoding import Driver, Sequence, load_file_or_folder
from tiny_models import (
    FAMILIES,
    LENGTH,
    Family,
    random_ids,
    random_model,
    reference_logits,
    reference_states,
)
from torch import Tensor
from torch.testing import assert_close

from shoal.checkpoint.description import ModelDescription
from shoal.workers.layers import Parameters


@dataclass(frozen=True)
class Case:
    """A family's checkpoint, loaded by Shoal, with transformers' logits for some prompts."""

    description: ModelDescription
    parameters: Parameters
    prompts: list[list[int]]
    expected: list[Tensor]
    states: list[Tensor]

    def driver(self) -> Driver:
        return Driver(self.description, self.parameters, LENGTH)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES.keys())
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("model")
    family: Family = request.param
    model = random_model(family)
    model.save_pretrained(folder)
    family.rewrite(folder)
    prompts = [random_ids(length) for length in (LENGTH, 38, 19, 27)]
    description, parameters = load_file_or_folder(folder)
    logits = [reference_logits(model, ids) for ids in prompts]
    return Case(description, parameters, prompts, logits, [reference_states(model, ids) for ids in prompts])


def close(found: Tensor, expected: Tensor) -> None:
    assert_close(found, expected, atol=1e-4, rtol=0)


def test_the_states_that_are_pooled_equal_transformers(case: Case) -> None:
    for ids, expected in zip(case.prompts, case.states, strict=True):
        close(case.driver().states([(Sequence(ids), len(ids))]), expected)


def test_prefill_equals_transformers(case: Case) -> None:
    for ids, expected in zip(case.prompts, case.expected, strict=True):
        assert expected.std() >= 1
        close(case.driver().logits([(Sequence(ids), len(ids))]), expected)


def test_every_parameter_counts(case: Case) -> None:
    """Else the comparison above would prove nothing about some of them."""
    ids, expected = case.prompts[3], case.expected[3]
    for tensor in case.parameters.tensors():
        kept = tensor.clone()
        tensor += 0.3 * tensor[torch.randperm(len(tensor))]
        changed = case.driver().logits([(Sequence(ids), len(ids))])
        tensor.copy_(kept)
        assert (changed - expected).abs().max() > 1e-2


def test_chunks_and_mixed_steps_equal_transformers(case: Case) -> None:
    driver = case.driver()
    sequences = [Sequence(ids) for ids in case.prompts]
    while open_ones := [sequence for sequence in sequences if sequence.computed < len(sequence.ids)]:
        rows = [
            (sequence, min(random.choice([1, 1, 3, 14]), len(sequence.ids) - sequence.computed))
            for sequence in random.sample(open_ones, random.randint(1, len(open_ones)))
        ]
        starts = [sequence.computed for sequence, _ in rows]
        parts = driver.logits(rows).split([count for _, count in rows])
        for (sequence, count), start, part in zip(rows, starts, parts, strict=True):
            close(part, case.expected[sequences.index(sequence)][start : start + count])


def test_a_cached_prefix_equals_transformers(case: Case) -> None:
    ids, expected = case.prompts[0], case.expected[0]
    driver = case.driver()
    other = Sequence(ids[:43] + random_ids(9))
    driver.logits([(other, 52)])
    sequence = driver.share(other, ids)
    computed = sequence.computed
    assert computed >= 40
    close(driver.logits([(sequence, LENGTH - computed)]), expected[computed:])
