import pytest
import torch

from shoal.cuda_ext import binding
from shoal.errors import StartError
from shoal.workers import dtype
from shoal.workers.dtype import resolve_cache_dtype, resolve_dtype


def test_auto_takes_half_the_bytes_where_the_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtype, "library", lambda: None)
    assert resolve_dtype("auto") == torch.float32
    monkeypatch.setattr(dtype, "library", lambda: object())
    assert resolve_dtype("auto") == torch.bfloat16


def test_a_named_format_is_taken() -> None:
    assert resolve_dtype("bfloat16") == torch.bfloat16
    assert resolve_dtype("float32") == torch.float32
    assert resolve_dtype("auto") == (torch.float32 if binding.library() is None else torch.bfloat16)


def test_a_gpu_has_formats_of_its_own() -> None:
    assert resolve_dtype("auto", cuda=True) == torch.bfloat16
    assert resolve_dtype("float16", cuda=True) == torch.float16
    with pytest.raises(StartError, match="--dtype float32: not on a GPU; take bfloat16 or float16"):
        resolve_dtype("float32", cuda=True)
    with pytest.raises(StartError, match="--dtype float16: only on a GPU"):
        resolve_dtype("float16")


def test_the_caches_formats() -> None:
    assert resolve_cache_dtype("auto", torch.float16, cuda=True) == torch.float16
    assert resolve_cache_dtype("fp8", torch.bfloat16, cuda=True) == torch.float8_e4m3fn
    assert resolve_cache_dtype("int8", torch.bfloat16) == torch.int8
    with pytest.raises(StartError, match="--kv_cache_dtype int8: not on a GPU; take auto, bfloat16, float16"):
        resolve_cache_dtype("int8", torch.bfloat16, cuda=True)
    with pytest.raises(StartError, match=r"--kv_cache_dtype fp8: not on the CPU; .*--device cuda"):
        resolve_cache_dtype("fp8", torch.bfloat16)
