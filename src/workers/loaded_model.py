"""A rank's shard of the weights, and what is built on it for a crew epoch: on the host, or on a GPU. Called by
``loop``."""

import logging
import time
from typing import Generic, Protocol

import torch
from msgspec.structs import replace

from shoal import logs
from shoal.checkpoint import describe, locate_model, with_rope_scaling
from shoal.checkpoint.description import ModelDescription
from shoal.config import Settings
from shoal.cuda_ext.cuda_device import CudaDevice
from shoal.cuda_ext.cuda_weight import CudaWeight
from shoal.errors import StartError
from shoal.messages import Allocate
from shoal.workers.cuda_decoder import CudaBuffers, CudaDecoder
from shoal.workers.cuda_group import DeviceGroup, PeerGroup, PeerRegions, SoloDeviceGroup
from shoal.workers.cuda_inputs import StepLimits
from shoal.workers.cuda_runner import CudaRunner
from shoal.workers.cuda_sampler import CudaSampler
from shoal.workers.decoder import Decoder
from shoal.workers.device import describe_device
from shoal.workers.drafts import Drafter, free_rows
from shoal.workers.dtype import resolve_cache_dtype, resolve_dtype
from shoal.workers.grammar import GrammarThreads
from shoal.workers.kv_cache import KVCache, available_bytes, count_blocks, count_device_blocks
from shoal.workers.layers import HostWeight, Parameters, W
from shoal.workers.load import Progress, load_parameters
from shoal.workers.parallel import Group, Shard, form_group, split
from shoal.workers.runner import WARM_UP_PROMPT_TOKENS, PlanRunner, Runner, warm_up
from shoal.workers.slots import SlotTable
from shoal.workers.weights.places import DevicePlace, HostPlace
from shoal.workers.weights.source import open_source

_LOG = logging.getLogger(__name__)


class LoadedModel(Protocol):
    """What a rank keeps between crew epochs."""

    @property
    def weight_bytes(self) -> int: ...

    @property
    def most_drafts(self) -> int:
        """How many tokens of a sequence it can guess in a step."""

    def count_blocks(self) -> int:
        """Counted once, when the weights were just loaded: survivors of a crew keep their number."""

    def make_runner(self, allocate: Allocate, grammars: GrammarThreads | None) -> PlanRunner:
        """Joins the other ranks, allocates the cache (or keeps one of the right size) and runs a warm-up step."""

    def free_cache(self) -> None:
        """Nobody computes until ``make_runner`` allocates it again."""


def load_model(settings: Settings, rank: int, device: CudaDevice | None, progress: Progress) -> LoadedModel:
    """Raises StartError where the model cannot be served, here or at all."""
    began_s = time.monotonic()
    location = locate_model(settings.model)
    description = with_rope_scaling(describe(location), settings.rope_scaling_factor)
    if settings.task == "embed":
        # Nobody asks for logits, and embedding models are saved without a head.
        description = replace(description, tied_head=True)
    shard = split(description, settings.tp, rank)
    dtype = resolve_dtype(settings.dtype, cuda=device is not None)
    cache_dtype = resolve_cache_dtype(settings.kv_cache_dtype, dtype, cuda=device is not None)
    source = open_source(location)
    model: LoadedModel
    if device is None:
        parameters = load_parameters(
            source, description, shard, HostPlace(dtype), progress, settings.quantization
        )
        model = _HostModel(settings, description, shard, parameters, cache_dtype)
    else:
        try:
            there = load_parameters(
                source, description, shard, DevicePlace(device, dtype), progress, settings.quantization
            )
        except MemoryError as error:
            raise StartError(
                f"the weights do not fit GPU {device.index} of {_gib(device)} ({error}): take --quantization w4 or w8, "
                "or more GPUs with --tp"
            ) from error
        device.drop_stage()
        model = _DeviceModel(settings, description, shard, there, cache_dtype, device)
    logs.event(
        _LOG,
        "weights_loaded",
        family=description.family,
        dtype=str(dtype),
        bytes=model.weight_bytes,
        seconds=time.monotonic() - began_s,
    )
    return model


def _gib(device: CudaDevice) -> str:
    return f"{device.total_bytes() / 2**30:.1f} GiB"


class _RankModel(Generic[W]):
    """What either kind holds."""

    def __init__(
        self,
        settings: Settings,
        description: ModelDescription,
        shard: Shard,
        parameters: Parameters[W],
        cache_dtype: torch.dtype,
    ) -> None:
        self._settings = settings
        self._description = description
        self._shard = shard
        self._parameters = parameters
        self._cache_dtype = cache_dtype
        self._cache: KVCache | None = None

    @property
    def weight_bytes(self) -> int:
        return self._parameters.nbytes

    def free_cache(self) -> None:
        self._cache = None

    def _slots(
        self, num_blocks: int, grammars: GrammarThreads | None = None, drafter: Drafter | None = None
    ) -> SlotTable:
        return SlotTable(
            self._settings.instance_num,
            self._settings.session_len,
            num_blocks,
            self._settings.cache_block_seq_len,
            self._description.vocab_size,
            sampling=self._shard.rank == 0,
            grammars=grammars,
            drafter=drafter,
        )


class _HostModel(_RankModel[HostWeight]):
    def __init__(
        self,
        settings: Settings,
        description: ModelDescription,
        shard: Shard,
        parameters: Parameters[HostWeight],
        cache_dtype: torch.dtype,
    ) -> None:
        super().__init__(settings, description, shard, parameters, cache_dtype)
        self._memory_bytes = available_bytes()
        self._free_rows = free_rows(describe_device(None)[1])

    @property
    def most_drafts(self) -> int:
        return self._settings.speculative_num_draft_tokens if self._free_rows else 0

    def count_blocks(self) -> int:
        return count_blocks(
            self._settings, self._description, self._shard, self._cache_dtype, self._memory_bytes
        )

    def make_runner(self, allocate: Allocate, grammars: GrammarThreads | None) -> Runner:
        group = form_group(self._shard.tp, self._shard.rank, allocate.rendezvous)
        try:
            return self._make_runner(group, allocate, grammars)
        except BaseException:
            group.close()
            raise

    def _make_runner(self, group: Group, allocate: Allocate, grammars: GrammarThreads | None) -> Runner:
        settings, description, shard = self._settings, self._description, self._shard
        if self._cache is None or self._cache.num_blocks != allocate.num_blocks:
            self._cache = None
            self._cache = KVCache(
                description, shard, self._cache_dtype, allocate.num_blocks, settings.cache_block_seq_len
            )
            self._cache.prepare_start()
        decoder = Decoder(description, shard, self._parameters, self._cache, group, settings.session_len)
        warm_up(
            Runner(decoder, group, self._slots(allocate.num_blocks), 0),
            min(settings.instance_num, allocate.num_blocks),
        )
        slots = self._slots(allocate.num_blocks, grammars, Drafter(self._free_rows))
        return Runner(decoder, group, slots, allocate.crew_epoch)


class _DeviceModel(_RankModel[CudaWeight]):
    """What a step takes is allocated before the blocks are counted: what is then free, the cache may have."""

    most_drafts = 0
    """The host, which guesses, learns a step's tokens when the next is on its way."""

    def __init__(
        self,
        settings: Settings,
        description: ModelDescription,
        shard: Shard,
        parameters: Parameters[CudaWeight],
        cache_dtype: torch.dtype,
        device: CudaDevice,
    ) -> None:
        super().__init__(settings, description, shard, parameters, cache_dtype)
        self._device = device
        limits = StepLimits(
            tokens=max(settings.max_prefill_token_num, settings.instance_num * WARM_UP_PROMPT_TOKENS),
            sequences=settings.instance_num,
            context=settings.session_len,
            block_size=settings.cache_block_seq_len,
        )
        try:
            self._buffers = CudaBuffers(device, description, shard, parameters.dtype, limits)
            self._sampler = self._make_sampler() if shard.rank == 0 else None
            self._regions = self._share_regions(limits) if shard.tp > 1 else None
        except MemoryError as error:
            raise StartError(
                f"GPU {device.index} has no room for a step beside the weights ({error}): lower --instance_num, "
                "--session_len or --max_prefill_token_num, take --quantization w4, or more GPUs with --tp"
            ) from error
        self._free_bytes = device.free_bytes()

    def count_blocks(self) -> int:
        return count_device_blocks(
            self._settings, self._description, self._shard, self._cache_dtype, self._free_bytes
        )

    def make_runner(self, allocate: Allocate, grammars: GrammarThreads | None) -> CudaRunner:
        group: DeviceGroup = SoloDeviceGroup()
        if self._regions is not None:
            group = PeerGroup(self._shard.rank, allocate.rendezvous, self._regions)
        try:
            return self._make_runner(group, allocate, grammars)
        except BaseException:
            group.close()
            raise

    def _make_runner(
        self, group: DeviceGroup, allocate: Allocate, grammars: GrammarThreads | None
    ) -> CudaRunner:
        settings, description, shard = self._settings, self._description, self._shard
        if self._cache is None or self._cache.num_blocks != allocate.num_blocks:
            self._cache = None
            self._cache = self._make_cache(allocate.num_blocks)
        decoder = CudaDecoder(description, shard, self._parameters, self._cache, group, self._buffers)
        warm = self._runner(decoder, group, self._slots(allocate.num_blocks), 0)
        try:
            warm_up(warm, min(settings.instance_num, allocate.num_blocks))
        except NotImplementedError as error:
            raise StartError(
                f"--device cuda: {error} (heads of {description.head_dim}, a cache of {self._cache_dtype}): take "
                "--kv_cache_dtype bfloat16, or --device cpu"
            ) from error
        return self._runner(decoder, group, self._slots(allocate.num_blocks, grammars), allocate.crew_epoch)

    def _runner(
        self, decoder: CudaDecoder, group: DeviceGroup, slots: SlotTable, crew_epoch: int
    ) -> CudaRunner:
        return CudaRunner(decoder, self._sampler, slots, self._device, group, crew_epoch)

    def _make_sampler(self) -> CudaSampler:
        return CudaSampler(self._device, self._buffers.logits, self._buffers.results.device["ids"])

    def _share_regions(self, limits: StepLimits) -> PeerRegions:
        return PeerRegions(
            self._device,
            self._shard.vocab_widths,
            self._description.hidden_size,
            limits.tokens,
            limits.sequences,
            self._buffers.results.device["fault"],
        )

    def _make_cache(self, num_blocks: int) -> KVCache:
        size = self._settings.cache_block_seq_len
        try:
            return KVCache(self._description, self._shard, self._cache_dtype, num_blocks, size, self._device)
        except MemoryError as error:
            raise StartError(
                f"GPU {self._device.index} has no memory for {num_blocks} KV blocks ({error}): lower "
                f"--cache_max_entry_count {self._settings.cache_max_entry_count:g}"
            ) from error
