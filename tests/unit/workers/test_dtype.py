import pytest
import torch

from shoal.cuda_ext import binding
from shoal.workers import dtype
from shoal.workers.dtype import resolve_dtype


def test_auto_takes_half_the_bytes_where_the_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtype, "library", lambda: None)
    assert resolve_dtype("auto") == torch.float32
    monkeypatch.setattr(dtype, "library", lambda: object())
    assert resolve_dtype("auto") == torch.bfloat16


def test_a_named_format_is_taken() -> None:
    assert resolve_dtype("bfloat16") == torch.bfloat16
    assert resolve_dtype("float32") == torch.float32
    assert resolve_dtype("auto") == (torch.float32 if binding.library() is None else torch.bfloat16)
