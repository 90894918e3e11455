"""The number formats of the matrices and of the KV cache; called once by ``loop`` before the weights are loaded."""

import torch

from shoal.config import CacheDtype, Dtype
from shoal.cuda_ext.binding import library

_NAMED = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_dtype(wanted: Dtype) -> torch.dtype:
    """ "auto" is bfloat16, half the bytes to read, where the compiled kernels run: they widen weights as they read
    them, on any processor. torch, which serves without them, is many times slower with bfloat16 on most."""
    if wanted == "auto":
        return torch.float32 if library() is None else torch.bfloat16
    return _NAMED[wanted]


def resolve_cache_dtype(wanted: CacheDtype, matrices: torch.dtype) -> torch.dtype:
    """ "auto" is the matrices' own."""
    if wanted == "auto":
        return matrices
    return torch.int8 if wanted == "int8" else _NAMED[wanted]
