"""The operators in torch's dispatcher: torch's own checks of each, and each against its twin."""

from collections.abc import Callable, Iterator
from typing import Any

import eager
import pytest
import torch
from torch import Tensor

from shoal.cuda_ext import binding, reference, registration
from shoal.cuda_ext.packed_weight import pack_weight
from shoal.cuda_ext.quantised import QuantisedGroups, WeightFormat, pack_quantised, quantise_weight

Case = tuple[tuple[Any, ...], Callable[[], Any]]
"""An operator's arguments, and what its twin makes of clones of them: the result, or the arguments it changes."""

NOT_REGISTERED = {"all_reduce", "gather_columns", "gated_linear", "take_rows"}
"""Operators that mean nothing outside of a rank, or give what only one that is not registered takes."""

FORM = WeightFormat(4, 32, True)


@pytest.fixture(scope="module", autouse=True)
def registered() -> torch.library.Library:
    return registration.register()


def randn(fresh: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=fresh)


def rms_norm(fresh: torch.Generator) -> Case:
    x, weight = randn(fresh, 5, 3, 40), randn(fresh, 40)
    return (x, weight, 1e-5), lambda: reference.rms_norm(x, weight, 1e-5)


def add_rms_norm(fresh: torch.Generator) -> Case:
    residual, x, weight = randn(fresh, 5, 40), randn(fresh, 5, 40), randn(fresh, 40)
    before = residual.clone()
    return (residual, x, weight, 1e-5), lambda: reference.add_rms_norm(before, x, weight, 1e-5)


def caches(fresh: torch.Generator) -> list[Tensor]:
    return [randn(fresh, 7, 2, 8, 32).bfloat16() for _ in range(2)]


def rope_write_kv(fresh: torch.Generator) -> Case:
    q, k, v = (randn(fresh, 9, heads, 32) for heads in (6, 2, 2))
    cos_sin = torch.cat((randn(fresh, 50, 16).cos(), randn(fresh, 50, 16).sin()), dim=1)
    positions = torch.randint(0, 50, (9,), generator=fresh, dtype=torch.int32)
    slots = torch.randperm(56, generator=fresh)[:9]
    changed = [q.clone(), *caches(fresh)]

    def twin() -> list[Tensor]:
        reference.rope_write_kv(changed[0], k, v, cos_sin, positions, *changed[1:], slots)
        return changed

    given = [cache.clone() for cache in changed[1:]]
    return (q, k, v, cos_sin, positions, *given, slots), twin


def paged_attention(fresh: torch.Generator) -> Case:
    q = randn(fresh, 4, 6, 32)
    tables = torch.randperm(6, generator=fresh).to(torch.int32).view(2, 3)
    starts, lengths = torch.tensor([0, 3, 4], dtype=torch.int32), torch.tensor([20, 9], dtype=torch.int32)
    arguments = (q, *caches(fresh), tables, starts, lengths, 0.2, 0, 30.0)
    return arguments, lambda: reference.paged_attention(*arguments)


def gated_activation(fresh: torch.Generator) -> Case:
    gate_up = randn(fresh, 5, 80)
    return (gate_up, "gelu_tanh"), lambda: reference.gated_activation(gate_up, "gelu_tanh")


def pack(fresh: torch.Generator) -> Case:
    matrix = randn(fresh, 37, 40).bfloat16()
    return (matrix,), lambda: pack_weight(matrix).storage


def linear(fresh: torch.Generator) -> Case:
    matrix, x, bias = randn(fresh, 37, 40).bfloat16(), randn(fresh, 5, 40), randn(fresh, 37)
    return (x, pack_weight(matrix).storage, bias, 37), lambda: reference.linear(x, matrix, bias)


def quantise(fresh: torch.Generator) -> Case:
    x = randn(fresh, 5, 72)
    return (x,), lambda: reference.quantise(x, eager.quantise(x).storage.shape[1])


def groups_of(fresh: torch.Generator) -> QuantisedGroups:
    return quantise_weight(randn(fresh, 37, 96), FORM.bits)


def pack_groups(fresh: torch.Generator) -> Case:
    groups = groups_of(fresh)
    return (
        (groups.codes, groups.scales, groups.offsets, FORM.bits),
        lambda: pack_quantised(groups, 96).storage,
    )


def linear_quantised(fresh: torch.Generator) -> Case:
    groups, rows = groups_of(fresh), eager.quantise(randn(fresh, 5, 96))
    panels = pack_quantised(groups, 96).storage
    return (
        (rows.storage, panels, None, 96, 37, FORM.bits, FORM.group, FORM.has_offset),
        lambda: reference.linear(rows.dequantise().float(), groups.dequantise(), None),
    )


def linear_integers(fresh: torch.Generator) -> Case:
    groups, x = groups_of(fresh), randn(fresh, 5, 96).bfloat16()
    panels = pack_quantised(groups, 96).storage
    return (
        (x.float(), panels, None, 37, FORM.bits, FORM.group, FORM.has_offset),
        lambda: reference.linear(x.float(), eager.tile_weights(groups), None),
    )


def embed(fresh: torch.Generator) -> Case:
    matrix, ids = randn(fresh, 37, 40), torch.randint(0, 80, (9,), generator=fresh)
    panels = pack_weight(matrix).storage
    return (ids, panels, 37, 40, 1.5, 30), lambda: reference.embed(ids, matrix, 1.5, 30)


def embed_quantised(fresh: torch.Generator) -> Case:
    groups, ids = groups_of(fresh), torch.randint(0, 37, (9,), generator=fresh)
    form = (FORM.bits, FORM.group, FORM.has_offset)
    return (
        (ids, pack_quantised(groups, 96).storage, 37, 96, 1.0, 0, *form),
        lambda: reference.embed(ids, groups.dequantise(), 1.0, 0),
    )


def draw(fresh: torch.Generator) -> Case:
    columns = (
        torch.tensor([0.0, 1.0, 0.5]),
        torch.tensor([0, 5, 0]),
        torch.tensor([1.0, 1.0, 0.9]),
        torch.tensor([0.0, 0.0, 0.1]),
        torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64),
    )
    logits = randn(fresh, 3, 50)
    return (logits, *columns), lambda: reference.draw(logits, *columns)


CASES = [
    ("rms_norm", rms_norm),
    ("add_rms_norm", add_rms_norm),
    ("rope_write_kv", rope_write_kv),
    ("paged_attention", paged_attention),
    ("gated_activation", gated_activation),
    ("pack_weight", pack),
    ("linear", linear),
    ("quantise", quantise),
    ("linear_quantised", linear_quantised),
    ("linear", linear_integers),
    ("pack_quantised", pack_groups),
    ("embed", embed),
    ("embed", embed_quantised),
    ("draw", draw),
]


def case_of(name: str, make: Callable[[torch.Generator], Case], fresh: torch.Generator) -> Case:
    compiled = binding.library()
    if compiled is None and make in (linear_quantised, linear_integers, pack_groups, embed_quantised):
        pytest.skip("no CPU library was built: there are no quantised weights")
    if compiled is not None and make is linear_integers and not compiled.has_tiles:
        pytest.skip(f"{compiled.level} has no tiles for quantised weights")
    return make(fresh)


@pytest.fixture(autouse=True)
def level_without_tiles(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where an operator is used at no other."""
    compiled, call = binding.library(), getattr(request.node, "callspec", None)
    if compiled is None or call is None or call.params.get("make") is not linear_quantised:
        yield
        return
    before = compiled.level
    assert compiled.use_level("scalar")
    yield
    assert compiled.use_level(before)


def test_every_operator_is_registered_and_has_a_case() -> None:
    operators = set(binding.OPERATORS) - NOT_REGISTERED
    assert set(registration.OPERATORS) == operators
    assert {name for name, _ in CASES} == operators


@pytest.mark.parametrize(("name", "make"), CASES)
def test_torchs_own_checks(name: str, make: Callable[[torch.Generator], Case], fresh: torch.Generator) -> None:
    """The schema says what is changed, nothing else is, and fake tensors trace to the same shapes."""
    arguments, _ = case_of(name, make, fresh)
    torch.library.opcheck(getattr(torch.ops.shoal, name).default, arguments)


@pytest.mark.parametrize(("name", "make"), CASES)
def test_an_operator_gives_what_its_twin_gives(
    name: str, make: Callable[[torch.Generator], Case], fresh: torch.Generator
) -> None:
    arguments, twin = case_of(name, make, fresh)
    found, expected = getattr(torch.ops.shoal, name)(*arguments), twin()
    if found is None:
        found = [arguments[0], *arguments[5:7]]
    # where pairs of bfloat16 are multiplied, queries have 8 bits
    tolerance = 0.03 if name == "paged_attention" and eager.attention_is_rounded() else 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize(("name", "make"), CASES)
def test_tensors_without_data_give_their_shapes(
    name: str, make: Callable[[torch.Generator], Case], fresh: torch.Generator
) -> None:
    arguments, _ = case_of(name, make, fresh)
    call = getattr(torch.ops.shoal, name)
    empty = call(*(x.to("meta") if isinstance(x, Tensor) else x for x in arguments))
    found = call(*arguments)
    if found is not None:
        assert empty.is_meta
        assert (empty.shape, empty.dtype, empty.stride()) == (found.shape, found.dtype, found.stride())


def test_a_layer_is_traced_whole(fresh: torch.Generator) -> None:
    weight, gates, down = randn(fresh, 40), randn(fresh, 96, 40), randn(fresh, 40, 48)
    packed = pack_weight(gates).storage, pack_weight(down).storage
    shoal = torch.ops.shoal

    def layer(residual: Tensor, x: Tensor) -> Tensor:
        normed = shoal.add_rms_norm(residual, x, weight, 1e-5)
        active = shoal.gated_activation(shoal.linear(normed, packed[0], None, 96), "silu")
        return shoal.linear(active, packed[1], None, 40) + residual

    traced = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 8):
        residual, x = randn(fresh, rows, 40), randn(fresh, rows, 40)
        kept = residual.clone()
        assert torch.equal(traced(residual, x), layer(kept, x))
        assert torch.equal(residual, kept)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="rms_norm: weight"):
        torch.ops.shoal.rms_norm(torch.zeros(2, 8), torch.ones(9), 1e-5)
