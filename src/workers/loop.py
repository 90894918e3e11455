"""A rank's life: hello, load, allocate, then plan after plan until told to stop.

Weights survive everything but the process; slots, cache and process group belong to one crew epoch.
"""

import logging
import time
from functools import partial

import torch
from msgspec.structs import replace

from shoal import logs
from shoal.checkpoint import describe, locate_model, with_rope_scaling
from shoal.checkpoint.description import ModelDescription
from shoal.config import Settings
from shoal.cuda_ext.binding import PeerLost
from shoal.cuda_ext.cuda_device import CudaDevice
from shoal.errors import StartError
from shoal.messages import Allocate, Broken, GivenUp, GiveUp, Load, Loaded, Loading, Ready, StepPlan, Stop
from shoal.workers.choose_decoder import make_decoder
from shoal.workers.device import choose_device
from shoal.workers.dtype import resolve_cache_dtype, resolve_dtype
from shoal.workers.grammar import GrammarThreads, load_grammar_tokens
from shoal.workers.kv_cache import KVCache, available_bytes, count_blocks
from shoal.workers.link import SchedulerLink
from shoal.workers.load import Parameters, load_parameters
from shoal.workers.memory import return_freed_memory
from shoal.workers.parallel import Group, Shard, form_group, split
from shoal.workers.runner import Runner, warm_up
from shoal.workers.slots import PlanInvalid, SlotTable
from shoal.workers.weights.source import open_source

_LOG = logging.getLogger(__name__)
_LOADING_INTERVAL_S = 0.1
_WARM_UP_PROMPT_TOKENS = 6
"""With the two that are decoded after them no more than the smallest block."""


class RankLoop:
    """Receives one message at a time and answers it."""

    def __init__(self, settings: Settings, rank: int) -> None:
        self._settings = settings
        self._rank = rank
        self._device = choose_device(settings, rank)
        self._link = SchedulerLink(settings.run_dir, rank)
        self._model: _LoadedModel | None = None
        self._group: Group | None = None
        self._runner: Runner | None = None
        self._crew_epoch = 0
        self._grammars = _grammar_threads(settings) if rank == 0 and settings.task != "embed" else None

    def run(self) -> None:
        """Serves until ``Stop``. Raises StartError where the model cannot be loaded."""
        try:
            while True:
                match self._link.receive():
                    case Load() as load:
                        self._load(load)
                    case Allocate() as allocate if allocate.crew_epoch == self._crew_epoch:
                        self._allocate(allocate)
                    case StepPlan() as plan if plan.crew_epoch == self._crew_epoch and self._runner:
                        self._step(plan, self._runner)
                    case GiveUp() as give_up if give_up.crew_epoch == self._crew_epoch:
                        self._give_up(give_up)
                    case Stop():
                        return
                    case _:
                        pass
        finally:
            self._leave_group()
            self._link.close()
            if self._grammars is not None:
                self._grammars.close()

    def _load(self, load: Load) -> None:
        self._leave_group()
        self._crew_epoch = load.crew_epoch
        try:
            if self._model is None:
                self._model = _load_model(self._settings, self._rank, self._link, self._device)
            num_blocks = self._model.count_blocks(self._settings)
        except StartError as error:
            self._link.send(Broken(load.crew_epoch, "load_failed", str(error)))
            raise
        self._link.send(Loaded(load.crew_epoch, num_blocks))

    def _allocate(self, allocate: Allocate) -> None:
        if self._model is None:
            return
        try:
            self._group = form_group(self._settings.tp, self._rank, allocate.rendezvous)
            self._runner = self._model.make_runner(self._settings, self._group, allocate, self._grammars)
        except PeerLost as error:
            self._break("peer_lost", str(error))
            return
        self._link.send(Ready(allocate.crew_epoch, allocate.num_blocks, self._model.parameters.nbytes))

    def _give_up(self, give_up: GiveUp) -> None:
        self._leave_group()
        if self._model is not None:
            self._model.free_cache()
        if give_up.level > 1:
            self._model = None
        return_freed_memory()
        self._link.send(GivenUp(give_up.crew_epoch))

    def _step(self, plan: StepPlan, runner: Runner) -> None:
        try:
            result = runner.execute(plan)
        except PeerLost as error:
            self._break("peer_lost", str(error))
        except PlanInvalid as error:
            self._break("plan_invalid", str(error))
            raise
        except RuntimeError as error:
            self._break("compute_failed", str(error))
            raise
        else:
            if self._rank == 0:
                self._link.send(result)

    def _break(self, kind: str, detail: str) -> None:
        logs.event(_LOG, "rank_broken", logging.ERROR, kind=kind, detail=detail, crew_epoch=self._crew_epoch)
        self._link.send(Broken(self._crew_epoch, kind, detail))  # type: ignore[arg-type]
        self._leave_group()

    def _leave_group(self) -> None:
        self._runner = None
        if self._group is not None:
            self._group.close()
            self._group = None


class _LoadedModel:
    """This rank's shard of the weights, and what is built on it for a crew epoch."""

    def __init__(
        self, description: ModelDescription, shard: Shard, parameters: Parameters, device: CudaDevice | None
    ) -> None:
        self.device = device
        self.description = description
        self.shard = shard
        self.parameters = parameters
        self._cache: KVCache | None = None
        self._memory_bytes = available_bytes()

    def free_cache(self) -> None:
        """Nobody computes until ``make_runner`` allocates it again."""
        self._cache = None

    def count_blocks(self, settings: Settings) -> int:
        """Counted once, when the weights were just loaded: survivors of a crew keep their number."""
        return count_blocks(
            settings, self.description, self.shard, self._cache_dtype(settings), self._memory_bytes
        )

    def _cache_dtype(self, settings: Settings) -> torch.dtype:
        cuda = self.device is not None
        return resolve_cache_dtype(settings.kv_cache_dtype, self.parameters.dtype, cuda=cuda)

    def make_runner(
        self, settings: Settings, group: Group, allocate: Allocate, grammars: GrammarThreads | None
    ) -> Runner:
        """Allocates the cache (or keeps one of the right size) and runs a warm-up step."""
        if self._cache is None or self._cache.num_blocks != allocate.num_blocks:
            self._cache = None
            self._cache = KVCache(
                self.description,
                self.shard,
                self._cache_dtype(settings),
                allocate.num_blocks,
                settings.cache_block_seq_len,
            )
        decoder = make_decoder(
            self.description,
            self.shard,
            self.parameters,
            self._cache,
            group,
            settings.session_len,
            self.device,
        )
        warm_rows = min(settings.instance_num, allocate.num_blocks)
        warm_up(
            Runner(decoder, group, self._slots(settings, allocate.num_blocks), 0),
            warm_rows,
            _WARM_UP_PROMPT_TOKENS,
        )
        slots = self._slots(settings, allocate.num_blocks, grammars)
        return Runner(decoder, group, slots, allocate.crew_epoch)

    def _slots(self, settings: Settings, num_blocks: int, grammars: GrammarThreads | None = None) -> SlotTable:
        return SlotTable(
            settings.instance_num,
            settings.session_len,
            num_blocks,
            settings.cache_block_seq_len,
            self.description.vocab_size,
            sampling=self.shard.rank == 0,
            grammars=grammars,
        )


def _grammar_threads(settings: Settings) -> GrammarThreads:
    """One in four of the rank's threads for masks: they share the processor with the kernels."""
    mask_threads = max(1, settings.threads // settings.tp // 4)
    return GrammarThreads(partial(load_grammar_tokens, settings.model), mask_threads)


def _load_model(settings: Settings, rank: int, link: SchedulerLink, device: CudaDevice | None) -> _LoadedModel:
    began_s = time.monotonic()
    location = locate_model(settings.model)
    description = with_rope_scaling(describe(location), settings.rope_scaling_factor)
    if settings.task == "embed":
        # Nobody asks for logits, and embedding models are saved without a head.
        description = replace(description, tied_head=True)
    shard = split(description, settings.tp, rank)
    told_s = 0.0

    def tell(done: int, total: int) -> None:
        nonlocal told_s
        if done == total or time.monotonic() - told_s > _LOADING_INTERVAL_S:
            told_s = time.monotonic()
            link.send(Loading("weights", done, total))

    parameters = load_parameters(
        open_source(location),
        description,
        shard,
        resolve_dtype(settings.dtype, cuda=device is not None),
        progress=tell,
        quantization=settings.quantization,
    )
    logs.event(
        _LOG,
        "weights_loaded",
        family=description.family,
        dtype=str(parameters.dtype),
        bytes=parameters.nbytes,
        seconds=time.monotonic() - began_s,
    )
    return _LoadedModel(description, shard, parameters, device)
