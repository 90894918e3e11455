"""Drives the decoder of a device, emulated or not, as ``decoding`` does the CPU's; and a small model for both."""

import random
from typing import Final

import numpy as np
import torch
from decoding import Driver, Sequence
from torch import Tensor

from shoal.checkpoint.description import ModelDescription, Rope
from shoal.cuda_ext.cuda_device import CudaDevice
from shoal.cuda_ext.cuda_weight import CudaWeight
from shoal.workers.cuda_decoder import CudaBuffers, CudaDecoder
from shoal.workers.cuda_group import SoloDeviceGroup
from shoal.workers.cuda_inputs import StepLimits
from shoal.workers.kv_cache import KVCache
from shoal.workers.layers import Parameters
from shoal.workers.parallel import split

LENGTH: Final = 41
"""Tokens of the longest sequence."""
PLAIN = ModelDescription(
    family="qwen3",
    vocab_size=149,
    hidden_size=48,
    num_layers=3,
    num_heads=6,
    num_kv_heads=3,
    head_dim=16,
    ffn_size=80,
    max_position=64,
    norm_eps=1e-5,
    qk_norm=True,
    rope=Rope(dim=16),
    layer_windows=(0, 0, 0),
    attention_scale=0.25,
)


class CudaDriver(Driver):
    """A ``Driver`` of the other decoder."""

    def __init__(
        self,
        device: CudaDevice,
        description: ModelDescription,
        parameters: Parameters[CudaWeight],
        cache_dtype: torch.dtype | None = None,
        num_blocks: int = 64,
    ) -> None:
        shard = split(description, 1, 0)
        self._block_size = 8
        self._free = random.Random(num_blocks).sample(range(num_blocks), num_blocks)
        cache = KVCache(
            description, shard, cache_dtype or parameters.dtype, num_blocks, self._block_size, device
        )
        limits = StepLimits(tokens=128, sequences=128, context=LENGTH, block_size=self._block_size)
        buffers = CudaBuffers(device, description, shard, parameters.dtype, limits)
        self.decoder = CudaDecoder(description, shard, parameters, cache, SoloDeviceGroup(), buffers)
        self.device = device

    def step(self, rows: list[tuple[Sequence, int]], sources: list[int] | None = None) -> Tensor:
        inputs = self._begin(rows)
        tokens = len(inputs.token_ids)
        self.decoder.start(inputs, np.array(sources or [-1] * tokens, np.int32))
        results = self.decoder.bring_results()
        self.device.wait()
        self.decoder.check(results)
        return self.device.fetch(self.decoder.logits[:tokens])
