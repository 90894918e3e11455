"""Tables of rotary position embedding: one row a position, cosines first, sines after.

The decoder builds one table for each distinct ``Rope`` of a model; ``cuda_ext.ops.rope_write_kv`` reads them.
All arithmetic is float32, as in the reference implementations: at large positions the angle's rounding shows.
"""

import math

import torch
from torch import Tensor

from shoal.checkpoint.description import ModelDescription, Rope
from shoal.errors import ModelError


def cos_sin_table(rope: Rope, head_dim: int, session_len: int) -> Tensor:
    """float32 [session_len, head_dim]: cos of every angle, then sin, both times yarn's attention factor."""
    if rope.dim != head_dim:
        raise ModelError(f"rope covers {rope.dim} of {head_dim} dimensions: partial rotation is not supported")
    if rope.dim < 4 or rope.dim % 2:
        raise ModelError(f"rope over {rope.dim} dimensions: head_dim must be even and at least 4")
    positions = torch.arange(session_len, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(rope, session_len))
    return torch.cat((angles.cos(), angles.sin()), dim=1) * attention_factor(rope)


def inverse_frequencies(rope: Rope, session_len: int) -> Tensor:
    """float32 [dim / 2]: radians a position for each pair of dimensions."""
    if rope.scaling == "dynamic":
        frequencies = _plain(_stretched_theta(rope, session_len), rope.dim)
    elif rope.scaling == "yarn":
        frequencies = _yarn(rope)
    elif rope.scaling == "llama3":
        frequencies = _llama3(rope)
    elif rope.scaling == "linear":
        frequencies = _plain(rope.theta, rope.dim) / rope.factor
    else:
        frequencies = _plain(rope.theta, rope.dim)
    return _divided_by_file(frequencies, rope.freq_factors)


def attention_factor(rope: Rope) -> float:
    """Yarn's factor on cos and sin, which sharpens attention over a stretched context; 1 elsewhere."""
    if rope.scaling != "yarn":
        return 1.0
    if rope.attention_factor:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _plain(theta: float, dim: int) -> Tensor:
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


def _divided_by_file(frequencies: Tensor, factors: tuple[float, ...]) -> Tensor:
    if not factors:
        return frequencies
    if len(factors) != len(frequencies):
        raise ModelError(
            f"rope_freqs.weight has {len(factors)} numbers where the model's heads need {len(frequencies)}: "
            "the file is damaged or was converted for another model"
        )
    return frequencies / torch.tensor(factors, dtype=torch.float32)


def _stretched_theta(rope: Rope, session_len: int) -> float:
    """Dynamic NTK at one length for the whole deployment: keys in the cache keep their rotation."""
    original = rope.original_max_position
    stretch = rope.factor * max(session_len, original) / original - (rope.factor - 1)
    return float(rope.theta * stretch ** (rope.dim / (rope.dim - 2)))


def _llama3(rope: Rope) -> Tensor:
    """Long wavelengths are interpolated, short ones kept, those between blended."""
    plain = _plain(rope.theta, rope.dim)
    turns = rope.original_max_position * plain / (2 * math.pi)
    kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - kept) * plain / rope.factor + kept * plain


def _yarn(rope: Rope) -> Tensor:
    """Dimensions that turn often are kept, those that turn seldom interpolated, with a ramp between."""
    plain = _plain(rope.theta, rope.dim)
    low, high = _yarn_ramp(rope)
    pairs = torch.arange(rope.dim // 2, dtype=torch.float32)
    interpolated = ((pairs - low) / (high - low)).clamp(0, 1)
    return interpolated * plain / rope.factor + (1 - interpolated) * plain


def _yarn_ramp(rope: Rope) -> tuple[float, float]:
    low, high = (_dimension_of(rope, turns) for turns in (rope.beta_fast, rope.beta_slow))
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0.0), min(high, rope.dim - 1.0)
    return low, high if high != low else high + 0.001


def _dimension_of(rope: Rope, turns: float) -> float:
    """Which pair of dimensions makes so many turns over the original context."""
    return rope.dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))


def _mscale(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_tables(description: ModelDescription, session_len: int) -> dict[Rope, Tensor]:
    """The table of each rope that the model has."""
    ropes = (description.rope, description.local_rope)
    return {rope: cos_sin_table(rope, description.head_dim, session_len) for rope in ropes if rope is not None}
