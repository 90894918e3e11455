"""Which library a rank computes with. Called by ``loop`` once a crew epoch.

``SHOAL_CUDA_LIBRARY`` names a CUDA library, or one whose kernels are emulated, and the rank uses it; without it, the
CPU library.
"""

import os

import torch

from shoal.checkpoint.description import ModelDescription
from shoal.cuda_ext import cuda_binding
from shoal.errors import StartError
from shoal.workers.cuda_decoder import CudaDecoder
from shoal.workers.decoder import Decoder
from shoal.workers.kv_cache import KVCache
from shoal.workers.layers import Parameters
from shoal.workers.parallel import Group, Shard


def make_decoder(
    description: ModelDescription,
    shard: Shard,
    parameters: Parameters,
    cache: KVCache,
    group: Group,
    session_len: int,
) -> Decoder | CudaDecoder:
    """Raises StartError where the CUDA library that was named cannot serve this model here."""
    if not os.environ.get("SHOAL_CUDA_LIBRARY"):
        return Decoder(description, shard, parameters, cache, group, session_len)
    library = cuda_binding.library()
    if library is None:
        raise StartError(f"SHOAL_CUDA_LIBRARY={cuda_binding.library_path()}: there is no such file")
    if shard.tp > 1:
        raise StartError("SHOAL_CUDA_LIBRARY: one rank only so far, leave --tp out")
    if cache.keys.dtype not in (torch.bfloat16, torch.float16):
        raise StartError(
            f"SHOAL_CUDA_LIBRARY: a cache of {cache.keys.dtype} has no kernels, use --dtype bfloat16"
        )
    if not library.is_emulated and not torch.cuda.is_available():
        raise StartError("SHOAL_CUDA_LIBRARY: torch finds no GPU (is it the CPU's wheel?)")
    device = torch.device("cpu" if library.is_emulated else "cuda")
    return CudaDecoder(description, parameters, cache, session_len, library, device)
