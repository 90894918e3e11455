"""Our decoder as a teacher, as a rank loads and drives it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from forcing.teacher import ROWS
from shoal.checkpoint import describe, locate_model
from shoal.checkpoint.description import ModelDescription
from shoal.config import CacheDtype, Quantization
from shoal.workers.decoder import Decoder
from shoal.workers.dtype import resolve_cache_dtype
from shoal.workers.inputs import StepInputs
from shoal.workers.kv_cache import KVCache
from shoal.workers.layers import Parameters
from shoal.workers.load import load_parameters
from shoal.workers.parallel import SoloGroup, split
from shoal.workers.weights.places import HostPlace
from shoal.workers.weights.source import open_source

_BLOCK_SIZE = 16


def load(path: Path, quantization: Quantization, dtype: torch.dtype) -> tuple[ModelDescription, Parameters]:
    """The model on one rank."""
    location = locate_model(str(path))
    description = describe(location)
    source, shard = open_source(location), split(description, 1, 0)
    return description, load_parameters(
        source, description, shard, HostPlace(dtype), lambda done, total: None, quantization
    )


class Ours:
    """One way of holding weights and cache, for texts of up to ``length`` tokens."""

    def __init__(
        self,
        name: str,
        description: ModelDescription,
        parameters: Parameters,
        cache: CacheDtype,
        length: int,
    ) -> None:
        self.name = f"ours, {name}"
        self.cache = cache
        blocks, shard = -(-length // _BLOCK_SIZE), split(description, 1, 0)
        dtype = resolve_cache_dtype(cache, parameters.dtype)
        held = KVCache(description, shard, dtype, blocks, _BLOCK_SIZE)
        self._decoder = Decoder(description, shard, parameters, held, SoloGroup(), length)
        self._table = np.arange(blocks, dtype=np.int32).reshape(1, -1)

    def logits(self, ids: list[int]) -> Iterator[Tensor]:
        """See ``Teacher``."""
        self._decoder.compute(self._step(ids))
        for begin in range(0, len(ids), ROWS):
            logits = self._decoder.logits(np.arange(begin, min(begin + ROWS, len(ids))))
            assert logits is not None
            yield torch.from_numpy(logits)

    def _step(self, ids: list[int]) -> StepInputs:
        """The whole text at once, block after block."""
        count = len(ids)
        return StepInputs(
            token_ids=np.array(ids),
            positions=np.arange(count, dtype=np.int32),
            cache_slots=np.arange(count),
            query_starts=np.array([0, count], np.int32),
            context_lens=np.array([count], np.int32),
            block_tables=self._table,
            state_starts=np.array([0, count], np.int32),
            state_tokens=np.arange(count),
            sample_indices=np.arange(count),
        )
