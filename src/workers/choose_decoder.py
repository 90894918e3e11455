"""Which library a rank computes with. Called by ``loop`` once a crew epoch."""

from shoal.checkpoint.description import ModelDescription
from shoal.cuda_ext.cuda_device import CudaDevice
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
    device: CudaDevice | None,
) -> Decoder | CudaDecoder:
    """device: None for the processor. Raises StartError where its kernels cannot serve this crew."""
    if device is None:
        return Decoder(description, shard, parameters, cache, group, session_len)
    if shard.tp > 1:
        raise StartError("--device cuda: one rank only so far, leave --tp out")
    return CudaDecoder(description, parameters, cache, session_len, device.library, device.torch_device)
