"""The CUDA operators in torch's dispatcher, on the emulated library: torch's own checks of each, and each against its
twin."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.cuda_ext import cuda_registration, reference
from shoal.cuda_ext.cuda_binding import OPERATORS, CudaLibrary
from shoal.cuda_ext.quantised import QuantisedGroups, quantise_weight

Case = tuple[tuple[Any, ...], Callable[[], Any]]
"""An operator's arguments, and what its twin makes of clones of them: the result, or the arguments it changes."""

NOT_REGISTERED = {
    *("all_reduce", "gather_columns", "feed_tokens", "take_rows"),
    *("cap_logits", "adjust_logits", "mask_logits", "score_logits", "pick_logits"),
}
"""Means nothing outside of a rank."""


@pytest.fixture(scope="module")
def operators(cuda: CudaLibrary) -> Any:
    if not cuda.is_emulated:
        pytest.skip("torch's tensors here are on the CPU")
    cuda_registration.register(cuda)
    return torch.ops.shoal_cuda


def halves(fresh: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=fresh).bfloat16()


def no_fault() -> Tensor:
    return torch.zeros(1, dtype=torch.int32)


def rms_norm(fresh: torch.Generator, _: Any) -> Case:
    x, weight = halves(fresh, 5, 3, 40), torch.randn(40, generator=fresh)
    return (x, weight, 1e-5), lambda: reference.rms_norm(x.float(), weight, 1e-5)


def add_rms_norm(fresh: torch.Generator, _: Any) -> Case:
    residual, x = torch.randn(5, 40, generator=fresh), halves(fresh, 5, 40)
    weight, before = torch.randn(40, generator=fresh), residual.clone()
    return (residual, x, weight, 1e-5), lambda: reference.add_rms_norm(before, x.float(), weight, 1e-5)


def rope_write_kv(fresh: torch.Generator, _: Any) -> Case:
    q, k, v = (halves(fresh, 9, heads, 32) for heads in (6, 2, 2))
    angles = torch.randn(50, 16, generator=fresh)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    positions = torch.randint(0, 50, (9,), generator=fresh, dtype=torch.int32)
    slots = torch.randperm(56, generator=fresh)[:9]
    caches = [halves(fresh, 7, 2, 8, 32) for _ in range(2)]
    changed = [q.float(), *(cache.float() for cache in caches)]

    def twin() -> list[Tensor]:
        reference.rope_write_kv(changed[0], k.float(), v.float(), cos_sin, positions, *changed[1:], slots)
        return changed

    return (q, k, v, cos_sin, positions, *caches, slots, no_fault()), twin


def paged_attention(fresh: torch.Generator, _: Any) -> Case:
    q, caches = halves(fresh, 4, 6, 32), [halves(fresh, 7, 2, 8, 32) for _ in range(2)]
    tables = torch.randperm(6, generator=fresh).to(torch.int32).view(2, 3)
    starts, lengths = torch.tensor([0, 3, 4], dtype=torch.int32), torch.tensor([20, 9], dtype=torch.int32)
    floats = (q.float(), *(cache.float() for cache in caches))
    return (
        (q, *caches, tables, starts, lengths, no_fault(), 0.2, 3, 0, 30.0),
        lambda: reference.paged_attention(*floats, tables, starts, lengths, 0.2, 0, 30.0),
    )


def head_scales() -> list[Tensor]:
    """Of two KV heads' keys, and of their values."""
    return [torch.tensor([0.5, 1.3]), torch.tensor([1.7, 0.1])]


def write_fp8(fresh: torch.Generator, _: Any) -> Case:
    q, k, v, cos_sin, positions, _, _, slots, fault = rope_write_kv(fresh, _)[0]
    caches = [torch.zeros(7, 2, 8, 32).to(torch.float8_e4m3fn) for _ in range(2)]
    scales = head_scales()
    changed = [q.float(), *(cache.float() for cache in caches)]

    def twin() -> list[Tensor]:
        reference.rope_write_kv(changed[0], k.float(), v.float(), cos_sin, positions, *changed[1:], slots)
        narrow = [
            (cache / scale[:, None, None]).to(torch.float8_e4m3fn).float()
            for cache, scale in zip(changed[1:], scales, strict=True)
        ]
        return [changed[0], *narrow]

    return (q, k, v, cos_sin, positions, *caches, slots, fault, *scales), twin


def attend_to_fp8(fresh: torch.Generator, _: Any) -> Case:
    q, *caches, tables, starts, lengths, fault = paged_attention(fresh, _)[0][:7]
    narrow, scales = [cache.to(torch.float8_e4m3fn) for cache in caches], head_scales()
    wide = [cache.float() * scale[:, None, None] for cache, scale in zip(narrow, scales, strict=True)]
    return (
        (q, *narrow, tables, starts, lengths, fault, 0.2, 3, 0, 0.0, *scales),
        lambda: reference.paged_attention(q.float(), *wide, tables, starts, lengths, 0.2, 0, 0.0),
    )


def gated_activation(fresh: torch.Generator, _: Any) -> Case:
    gate_up = halves(fresh, 5, 80)
    return (gate_up, "gelu_tanh"), lambda: reference.gated_activation(gate_up.float(), "gelu_tanh")


def linear(fresh: torch.Generator, _: Any) -> Case:
    weight, x, bias = halves(fresh, 37, 40), halves(fresh, 5, 40), torch.randn(37, generator=fresh)
    return (x, weight, None, bias), lambda: reference.linear(x.float(), weight.float(), bias)


def linear_of_fp8(fresh: torch.Generator, _: Any) -> Case:
    weight, x = halves(fresh, 37, 40).to(torch.float8_e4m3fn), halves(fresh, 5, 40)
    scales = torch.rand(37, generator=fresh)
    return (
        (x, weight, scales, None),
        lambda: reference.linear(x.float(), weight.float() * scales[:, None], None),
    )


def groups_of(fresh: torch.Generator) -> QuantisedGroups:
    return quantise_weight(torch.randn(37, 96, generator=fresh), 4)


def pack_quantised(fresh: torch.Generator, operators: Any) -> Case:
    """Packed twice: its twin is what ``dequantise`` makes of it, below."""
    groups = groups_of(fresh)
    arguments = (groups.codes, groups.scales, groups.offsets, 4)
    return arguments, lambda: operators.pack_quantised(*arguments)


def packed(fresh: torch.Generator, operators: Any) -> tuple[QuantisedGroups, Tensor]:
    groups = groups_of(fresh)
    return groups, operators.pack_quantised(groups.codes, groups.scales, groups.offsets, 4)


def linear_quantised(fresh: torch.Generator, operators: Any) -> Case:
    (groups, panels), x = packed(fresh, operators), halves(fresh, 5, 96)
    return (
        (x, panels, None, 37, 4, 32, True),
        lambda: reference.linear(x.float(), groups.dequantise().float(), None),
    )


def dequantise(fresh: torch.Generator, operators: Any) -> Case:
    groups, panels = packed(fresh, operators)
    return (panels, 37, 96, torch.bfloat16, 4, 32, True), lambda: groups.dequantise().float()


def embed(fresh: torch.Generator, _: Any) -> Case:
    table, ids = halves(fresh, 37, 40), torch.randint(0, 80, (9,), generator=fresh)
    return (ids, table, 37, 40, 1.5, 30), lambda: reference.embed(ids, table.float(), 1.5, 30)


def embed_quantised(fresh: torch.Generator, operators: Any) -> Case:
    (groups, panels), ids = packed(fresh, operators), torch.randint(0, 37, (9,), generator=fresh)
    return (
        (ids, panels, 37, 96, 1.0, 0, 4, 32, True),
        lambda: reference.embed(ids, groups.dequantise(), 1.0, 0),
    )


def draw(fresh: torch.Generator, _: Any) -> Case:
    columns = (
        torch.tensor([0.0, 1.0, 0.5]),
        torch.tensor([0, 5, 0]),
        torch.tensor([1.0, 1.0, 0.9]),
        torch.tensor([0.0, 0.0, 0.1]),
        torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64),
    )
    logits = torch.randn(3, 50, generator=fresh)
    return (logits, *columns), lambda: reference.draw(logits, *columns)


CASES = [
    ("rms_norm", rms_norm),
    ("add_rms_norm", add_rms_norm),
    ("rope_write_kv", rope_write_kv),
    ("rope_write_kv", write_fp8),
    ("paged_attention", paged_attention),
    ("paged_attention", attend_to_fp8),
    ("gated_activation", gated_activation),
    ("linear", linear),
    ("linear", linear_of_fp8),
    ("linear_quantised", linear_quantised),
    ("pack_quantised", pack_quantised),
    ("dequantise", dequantise),
    ("embed", embed),
    ("embed", embed_quantised),
    ("draw", draw),
]
WITH_FP8 = (linear_of_fp8, write_fp8, attend_to_fp8)
Make = Callable[[torch.Generator, Any], Case]


def test_every_operator_is_registered_and_has_a_case() -> None:
    expected = set(OPERATORS) - NOT_REGISTERED
    assert set(cuda_registration.OPERATORS) == expected
    assert {name for name, _ in CASES} == expected


@pytest.mark.parametrize(("name", "make"), [case for case in CASES if case[1] not in WITH_FP8])
def test_torchs_own_checks(operators: Any, name: str, make: Make, fresh: torch.Generator) -> None:
    """The schema says what is changed, nothing else is, and fake tensors trace to the same shapes. They cannot compare
    fp8 tensors."""
    arguments, _ = make(fresh, operators)
    torch.library.opcheck(getattr(operators, name).default, arguments)


@pytest.mark.parametrize(("name", "make"), CASES)
def test_an_operator_gives_what_its_twin_gives(
    operators: Any, name: str, make: Make, fresh: torch.Generator
) -> None:
    arguments, twin = make(fresh, operators)
    found, expected = getattr(operators, name)(*arguments), twin()
    if found is None:
        found = [part.float() for part in (arguments[0], *arguments[5:7])]
    elif found.dtype == torch.bfloat16:
        found = found.float()
    # fp8 has four bits, and keys are rounded to bfloat16 on their way.
    rtol = 0.13 if make is write_fp8 else 1e-2
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-2)


def test_wrong_arguments_are_named(operators: Any) -> None:
    with pytest.raises(ValueError, match="rms_norm: weight"):
        operators.rms_norm(torch.zeros(2, 8, dtype=torch.bfloat16), torch.ones(9), 1e-5)
