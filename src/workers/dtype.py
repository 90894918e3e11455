"""The number format of the matrices and the KV cache; called once by ``main`` before the weights are loaded."""

from pathlib import Path

import torch

from shoal.config import Dtype

_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
_NAMED = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_dtype(wanted: Dtype, cpuinfo: Path = Path("/proc/cpuinfo")) -> torch.dtype:
    """ "auto" is bfloat16 where the processor multiplies it natively: elsewhere torch is faster with float32."""
    if wanted == "auto":
        return torch.bfloat16 if _BF16_FLAGS & _processor_flags(cpuinfo) else torch.float32
    return _NAMED[wanted]


def _processor_flags(cpuinfo: Path) -> frozenset[str]:
    if not cpuinfo.exists():
        return frozenset()
    with cpuinfo.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip() == "flags":
                return frozenset(value.split())
    return frozenset()
