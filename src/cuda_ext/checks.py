"""What the operators ask of their tensors before anything is recorded; for ``ops`` and ``cuda_ops``."""

import torch
from torch import Tensor


def require(condition: bool, what: str) -> None:
    """Raises ValueError with ``what`` where the condition does not hold."""
    if not condition:
        raise ValueError(what)


def is_vector(x: Tensor, dtype: torch.dtype, length: int) -> bool:
    """Whether x is contiguous, of the type and [length]."""
    return x.dtype == dtype and x.shape == (length,) and x.is_contiguous()
