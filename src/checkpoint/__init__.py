"""A model on disk: where it is, what it is, and the GGUF container. Shared by every process; knows no torch."""

from shoal.checkpoint.hf_quantization import Fp8Scheme, fp8_scheme_of
from shoal.checkpoint.locate import ModelLocation, locate_model
from shoal.checkpoint.opened import describe, generation_defaults, with_rope_scaling
from shoal.checkpoint.pooling import PoolingKind, declared_pooling

__all__ = [
    "Fp8Scheme",
    "ModelLocation",
    "PoolingKind",
    "declared_pooling",
    "describe",
    "fp8_scheme_of",
    "generation_defaults",
    "locate_model",
    "with_rope_scaling",
]
