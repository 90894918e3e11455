"""The number formats of the matrices and of the KV cache; called once by ``loop`` before the weights are loaded."""

from typing import Final

import torch

from shoal.config import CacheDtype, Dtype
from shoal.cuda_ext.binding import library
from shoal.errors import StartError

_NAMED: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
_CPU_CACHES: Final = ("float32", "bfloat16", "int8")
_CUDA_CACHES: Final = ("bfloat16", "float16", "fp8")


def resolve_dtype(wanted: Dtype, *, cuda: bool = False) -> torch.dtype:
    """ "auto" is bfloat16, half the bytes to read, where compiled kernels run: the processor's widen weights as they
    read them, on any processor. torch, which serves without them, is many times slower with bfloat16 on most.

    Raises StartError where there are no kernels for what is wanted."""
    if wanted == "auto":
        return torch.float32 if library() is None and not cuda else torch.bfloat16
    if cuda and wanted == "float32":
        raise StartError("--dtype float32: not on a GPU; take bfloat16 or float16, or --device cpu")
    if not cuda and wanted == "float16":
        raise StartError("--dtype float16: only on a GPU (--device cuda); take auto, bfloat16 or float32")
    return _NAMED[wanted]


def resolve_cache_dtype(wanted: CacheDtype, matrices: torch.dtype, *, cuda: bool = False) -> torch.dtype:
    """ "auto" is the matrices' own. Raises StartError where there are no kernels for what is wanted."""
    if wanted == "auto":
        return matrices
    known, others = (_CUDA_CACHES, "a GPU") if cuda else (_CPU_CACHES, "the CPU")
    if wanted not in known:
        hint = ", or --device cpu" if cuda else " (--device cuda has float16 and fp8)"
        raise StartError(f"--kv_cache_dtype {wanted}: not on {others}; take auto, {', '.join(known)}{hint}")
    return _NAMED[wanted]
