"""The paged key-value cache of one rank, and how large it may be.

``loop`` counts the blocks once the weights are loaded and allocates what the scheduler then settles on; the
decoder writes and reads through ``cuda_ext.ops``. Who owns which block is the scheduler's business.
"""

import math
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from shoal.checkpoint.description import ModelDescription
from shoal.config import Settings
from shoal.cuda_ext.cuda_device import CudaDevice
from shoal.cuda_ext.ops import cache_row_elements
from shoal.cuda_ext.weight_memory import map_huge
from shoal.errors import StartError
from shoal.workers.memory_ahead import MemoryAhead, Part
from shoal.workers.parallel import Shard

_MIB = 1 << 20
_LEAST_AHEAD: Final = 512 * _MIB
_SHARE_AHEAD: Final = 8
"""One part in so many of the memory that is left is taken ahead of use."""


class KVCache:
    """Keys and values of every layer: [layers, blocks, kv heads, block size, elements of a head]; on a device there is
    one block more, for tokens that only fill up a step."""

    def __init__(
        self,
        description: ModelDescription,
        shard: Shard,
        dtype: torch.dtype,
        num_blocks: int,
        block_size: int,
        device: CudaDevice | None = None,
    ) -> None:
        shape = (
            description.num_layers,
            num_blocks + (device is not None),
            len(shard.kv_heads),
            block_size,
            cache_row_elements(description.head_dim, dtype),
        )
        parts: list[Part] = []
        if device is None:
            self.keys, self.values = (_allocate(shape, dtype, parts) for _ in range(2))
        else:
            self.keys, self.values = (device.zeros(*shape, dtype=dtype) for _ in range(2))
        self._ahead: MemoryAhead | None = None
        if parts:
            self._ahead = MemoryAhead(parts, max(_LEAST_AHEAD, available_bytes() // _SHARE_AHEAD))
        self.num_blocks = num_blocks
        self.block_size = block_size

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def prepare_start(self) -> None:
        """Has the system give some memory of the first blocks, for a second at most."""
        if self._ahead is not None:
            self._ahead.take_at_start()

    def prepare(self, block: int) -> bool:
        """For a rank that has nothing to do: has the system give some memory of the blocks that come after ``block``,
        the last one in use. Returns whether that goes on."""
        return self._ahead is not None and self._ahead.take_when_idle(block * self.keys[0, 0].nbytes)


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, parts: list[Part]) -> Tensor:
    """Zeros, which the operating system gives page by page as blocks are first written (torch.zeros writes them
    all at once: gigabytes of memory and seconds of start-up). Adds a part for each layer."""
    size = math.prod(shape) * dtype.itemsize
    try:
        mapping, begin = map_huge(size)
        layer = size // shape[0]
        parts += [Part(mapping, begin + number * layer, layer) for number in range(shape[0])]
        return torch.frombuffer(mapping, dtype=torch.uint8, count=size, offset=begin).view(dtype).view(shape)
    except MemoryError as error:
        raise StartError(
            f"no memory for {shape[1]} KV blocks: lower --instance_num, --session_len or "
            f"--cache_max_entry_count ({error})"
        ) from error


def bytes_per_block(description: ModelDescription, shard: Shard, dtype: torch.dtype, block_size: int) -> int:
    """Memory of one block over all layers of this rank, keys and values."""
    row = cache_row_elements(description.head_dim, dtype)
    return 2 * description.num_layers * len(shard.kv_heads) * block_size * row * dtype.itemsize


def count_blocks(
    settings: Settings,
    description: ModelDescription,
    shard: Shard,
    dtype: torch.dtype,
    available_bytes: int,
) -> int:
    """The blocks this rank can hold: no more than all sequences at full length need, than its part of
    ``cache_bytes``, and of the share ``cache_max_entry_count`` of the available memory."""
    block_size = settings.cache_block_seq_len
    block_bytes = bytes_per_block(description, shard, dtype, block_size)
    session_len = settings.session_len or description.max_position
    blocks_a_sequence = -(-session_len // block_size)
    allowed_bytes = shard.cache_share * min(
        settings.cache_max_entry_count * available_bytes, settings.cache_bytes
    )
    num_blocks = min(settings.instance_num * blocks_a_sequence + 1, int(allowed_bytes // block_bytes))
    if num_blocks < blocks_a_sequence:
        raise StartError(
            f"one sequence of --session_len {session_len} tokens needs {blocks_a_sequence} KV blocks "
            f"({_mib(blocks_a_sequence * block_bytes)} on rank {shard.rank}), but only {num_blocks} fit in "
            f"{_mib(allowed_bytes)}, this rank's part of the cache (--cache_max_entry_count "
            f"{settings.cache_max_entry_count:g} of {_mib(available_bytes)} available, at most "
            f"{_mib(settings.cache_bytes)}): lower --session_len or raise --cache_max_entry_count"
        )
    return num_blocks


def count_device_blocks(
    settings: Settings,
    description: ModelDescription,
    shard: Shard,
    dtype: torch.dtype,
    free_bytes: int,
) -> int:
    """The blocks that fit a device: the share ``cache_max_entry_count`` of what is free once all else is there, less
    the spare block."""
    block_bytes = bytes_per_block(description, shard, dtype, settings.cache_block_seq_len)
    session_len = settings.session_len or description.max_position
    blocks_a_sequence = -(-session_len // settings.cache_block_seq_len)
    num_blocks = int(settings.cache_max_entry_count * free_bytes // block_bytes) - 1
    if num_blocks < blocks_a_sequence:
        raise StartError(
            f"one sequence of --session_len {session_len} tokens needs {blocks_a_sequence + 1} KV blocks "
            f"({_mib((blocks_a_sequence + 1) * block_bytes)} on GPU {shard.rank}), but only {num_blocks + 1} fit in "
            f"--cache_max_entry_count {settings.cache_max_entry_count:g} of the {_mib(free_bytes)} that are free: "
            "lower --session_len, raise --cache_max_entry_count, take --kv_cache_dtype fp8 or --quantization w4, or "
            "more GPUs with --tp"
        )
    return num_blocks


def _mib(count: float) -> str:
    return f"{count / _MIB:.1f} MiB"


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this process could still take: the system's, or less where a control group limits it."""
    return max(0, min([_system_available(proc / "meminfo"), *_cgroup_available(proc / "self/cgroup", cgroups)]))


def _system_available(meminfo: Path) -> int:
    for line in meminfo.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise StartError(f"{meminfo} has no MemAvailable: the kernel is too old to tell the free memory")


def _cgroup_available(membership: Path, cgroups: Path) -> list[int]:
    """limit − use + what the kernel would drop, of every group from this process's own up to the root."""
    if not membership.exists():
        return []
    found = []
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            found += _walk_up(cgroups, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            found += _walk_up(cgroups / "memory", path, *names)
    return found


def _walk_up(root: Path, path: str, limit: str, usage: str, droppable: str) -> list[int]:
    """In a container the path may be the host's and not exist here: then the root is the process's own group."""
    found = []
    group = root / path.lstrip("/")
    for folder in (group, *group.parents):
        allowed, used = _number(folder / limit), _number(folder / usage)
        if allowed is not None and used is not None:
            found.append(allowed - used + _statistic(folder / "memory.stat", droppable))
        if folder == root:
            break
    return found


def _number(file: Path) -> int | None:
    """None where the file is missing or says "max"."""
    if not file.exists():
        return None
    text = file.read_text().strip()
    return int(text) if text.isdecimal() else None


def _statistic(file: Path, key: str) -> int:
    if not file.exists():
        return 0
    for line in file.read_text().splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    return 0
