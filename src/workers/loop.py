"""A rank's life: hello, load, allocate, then plan after plan until told to stop.

Weights survive everything but the process; slots, cache and process group belong to one crew epoch.
"""

import logging
import time
from functools import partial

from shoal import logs
from shoal.config import Settings
from shoal.cuda_ext.binding import PeerLost
from shoal.cuda_ext.cuda_binding import CudaError
from shoal.errors import StartError
from shoal.messages import (
    Allocate,
    Broken,
    CrewMessage,
    GivenUp,
    GiveUp,
    Load,
    Loaded,
    Loading,
    Ready,
    StepPlan,
    StepResult,
    Stop,
)
from shoal.workers.device import choose_device, describe_device
from shoal.workers.grammar import GrammarThreads, load_grammar_tokens
from shoal.workers.link import SchedulerLink
from shoal.workers.load import Progress
from shoal.workers.loaded_model import LoadedModel, load_model
from shoal.workers.memory import return_freed_memory
from shoal.workers.runner import PlanRunner
from shoal.workers.slots import PlanInvalid

_LOG = logging.getLogger(__name__)
_LOADING_INTERVAL_S = 0.1
_IDLE_S = 0.005
"""Longer than from one step of a batch to the next."""


class RankLoop:
    """Receives one message at a time and answers it."""

    def __init__(self, settings: Settings, rank: int) -> None:
        self._settings = settings
        self._rank = rank
        self._device = choose_device(settings, rank)
        device, level = describe_device(self._device)
        logs.event(_LOG, "device", device=device, level=level)
        self._link = SchedulerLink(settings.run_dir, rank, device, level)
        self._model: LoadedModel | None = None
        self._runner: PlanRunner | None = None
        self._crew_epoch = 0
        self._has_idle_work = True
        self._grammars = _grammar_threads(settings) if rank == 0 and settings.task != "embed" else None

    @property
    def is_on_host(self) -> bool:
        """Whether the model runs on the processor."""
        return self._device is None

    def run(self) -> None:
        """Serves until ``Stop``. Raises StartError where the model cannot be loaded."""
        try:
            while True:
                match self._receive():
                    case Load() as load:
                        self._load(load)
                    case Allocate() as allocate if allocate.crew_epoch == self._crew_epoch:
                        self._allocate(allocate)
                    case StepPlan() as plan if plan.crew_epoch == self._crew_epoch and self._runner:
                        self._step(self._runner, plan)
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

    def _receive(self) -> CrewMessage | None:
        """The next message. Meanwhile a step that was started is finished as soon as it is done."""
        while self._runner is not None and self._runner.is_waiting:
            message = self._link.receive(0)
            if message is not None:
                return message
            self._step(self._runner, None)
        timeout_s = _IDLE_S
        while self._runner is not None and self._has_idle_work:
            message = self._link.receive(timeout_s)
            if message is not None:
                return message
            timeout_s = 0
            self._has_idle_work = self._runner.use_idle_time()
        return self._link.receive()

    def _load(self, load: Load) -> None:
        self._leave_group()
        self._crew_epoch = load.crew_epoch
        try:
            if self._model is None:
                self._model = load_model(self._settings, self._rank, self._device, self._tell_loading())
            num_blocks = self._model.count_blocks()
        except (StartError, CudaError) as error:
            self._link.send(Broken(load.crew_epoch, "load_failed", str(error)))
            raise
        self._link.send(Loaded(load.crew_epoch, num_blocks, self._model.most_drafts))

    def _tell_loading(self) -> Progress:
        told_s = 0.0

        def tell(done: int, total: int) -> None:
            nonlocal told_s
            if done == total or time.monotonic() - told_s > _LOADING_INTERVAL_S:
                told_s = time.monotonic()
                self._link.send(Loading("weights", done, total))

        return tell

    def _allocate(self, allocate: Allocate) -> None:
        if self._model is None:
            return
        try:
            self._runner = self._model.make_runner(allocate, self._grammars)
        except PeerLost as error:
            self._break("peer_lost", str(error))
            return
        except (StartError, CudaError) as error:
            self._link.send(Broken(allocate.crew_epoch, "load_failed", str(error)))
            raise
        self._link.send(Ready(allocate.crew_epoch, allocate.num_blocks, self._model.weight_bytes))

    def _give_up(self, give_up: GiveUp) -> None:
        self._leave_group()
        if self._model is not None:
            self._model.free_cache()
        if give_up.level > 1:
            self._model = None
        return_freed_memory()
        self._link.send(GivenUp(give_up.crew_epoch))

    def _step(self, runner: PlanRunner, plan: StepPlan | None) -> None:
        """Starts a step, or without a plan looks whether the one that was started is done; tells what is known."""
        self._has_idle_work = True
        result: StepResult | None = None
        try:
            if plan is not None:
                result = runner.start(plan)
            elif runner.is_done():
                result = runner.finish()
        except PeerLost as error:
            self._break("peer_lost", str(error))
        except PlanInvalid as error:
            self._break("plan_invalid", str(error))
            raise
        except (RuntimeError, IndexError, MemoryError) as error:
            self._break("compute_failed", str(error))
            raise
        else:
            if self._rank == 0 and result is not None:
                self._link.send(result)

    def _break(self, kind: str, detail: str) -> None:
        logs.event(_LOG, "rank_broken", logging.ERROR, kind=kind, detail=detail, crew_epoch=self._crew_epoch)
        self._link.send(Broken(self._crew_epoch, kind, detail))  # type: ignore[arg-type]
        self._leave_group()

    def _leave_group(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.close()


def _grammar_threads(settings: Settings) -> GrammarThreads:
    """One in four of the rank's threads for masks: they share the processor with the kernels."""
    mask_threads = max(1, settings.threads // settings.tp // 4)
    return GrammarThreads(partial(load_grammar_tokens, settings.model), mask_threads)
