"""``python tests/fakes/fake_worker.py SETTINGS.json RANK``: a rank process without a model.

Speaks the real protocol, answers with ``fake_rank.FakeRank``. How it is to misbehave is read before each step
from ``fake_faults.json`` in the run directory, if that exists, else from the environment's SHOAL_FAKE_FAULTS:
a JSON object with the fields of ``Faults``.
"""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from shoal import config, process, transport
from shoal.messages import (
    PROTOCOL,
    Allocate,
    Broken,
    CrewMessage,
    GivenUp,
    GiveUp,
    Load,
    Loaded,
    Loading,
    Message,
    RankHello,
    Ready,
    Sampling,
    StepPlan,
    Stop,
)
from shoal.wire import Inbox, encode, fingerprint, new_boot_id

sys.path.append(str(Path(__file__).resolve().parents[1]))
from fakes.fake_rank import FakeRank, PlanInvalid

_HELLO_MS = 200
FAULTS_FILE = "fake_faults.json"


class Faults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What goes wrong; step numbers are the plans' step ids, 0 is never."""

    num_blocks: int = 256
    vocab: int = 1000
    ranks: tuple[int, ...] = ()
    """Which ranks misbehave; empty: all."""
    delay_ms: float = 0.0
    """Added to each step."""
    die_from_step: int = 0
    hang_from_step: int = 0
    twice_from_step: int = 0
    """Each result is sent twice."""
    late_step: int = 0
    """The result of this step is sent after that of the next one."""
    bad_seeds: tuple[int, ...] = ()
    """Requests with these seeds get logits that are not finite."""
    bad_from_token: int = 0
    """… from this many generated tokens on."""
    load_fails: str = ""
    hang_at_warm_up: bool = False
    hang_at_sleep: bool = False


class FakeWorker:
    """One rank's process."""

    def __init__(self, settings: config.Settings, rank: int) -> None:
        self._settings = settings
        self._rank = rank
        self._boot_id = new_boot_id()
        self._scheduler = 0
        self._crew_epoch = 0
        self._core: FakeRank | None = None
        self._held: list[Message] = []
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = transport.connect_dealer(context, transport.crew_endpoint(settings.run_dir))
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._inbox: Inbox[CrewMessage] = Inbox(CrewMessage, self._boot_id)

    def run(self) -> None:
        """Until Stop."""
        for message in self._messages():
            match message:
                case Load(boot_id=boot_id, crew_epoch=epoch):
                    self._scheduler, self._crew_epoch, self._core = boot_id, epoch, None
                    self._load()
                case Allocate(crew_epoch=epoch, num_blocks=blocks) if epoch == self._crew_epoch:
                    while self._faults().hang_at_warm_up:
                        time.sleep(0.05)
                    size = self._settings.cache_block_seq_len
                    self._core = FakeRank(blocks, size, self._faults().vocab, self._is_bad)
                    self._send(Ready(epoch, blocks, 0))
                case GiveUp(crew_epoch=epoch) if epoch == self._crew_epoch:
                    while self._faults().hang_at_sleep:
                        time.sleep(0.05)
                    self._core = None
                    self._send(GivenUp(epoch))
                case StepPlan(crew_epoch=epoch) if epoch == self._crew_epoch and self._core:
                    self._step(self._core, message)
                case Stop():
                    return
                case _:
                    pass

    def _messages(self) -> Iterator[CrewMessage]:
        """What the scheduler says; says hello while there is none."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        while True:
            if not self._scheduler:
                hello = RankHello(
                    PROTOCOL, fingerprint(), self._boot_id, self._rank, os.getpid(), "cpu", "none"
                )
                self._socket.send(encode(hello, 0))
            ready = dict(poller.poll(_HELLO_MS))
            if self._monitor in ready:
                recv_monitor_message(self._monitor)
                self._scheduler = 0
            if self._socket in ready and (message := self._inbox.decode(self._socket.recv())) is not None:
                yield message

    def _load(self) -> None:
        faults = self._faults()
        if faults.load_fails:
            self._send(Broken(self._crew_epoch, "load_failed", faults.load_fails))
            sys.stderr.write(f"error: {faults.load_fails}\n")
            sys.exit(process.START_FAILED_EXIT)
        self._send(Loading("weights", 1, 2))
        self._send(Loaded(self._crew_epoch, faults.num_blocks))

    def _step(self, core: FakeRank, plan: StepPlan) -> None:
        faults = self._faults()
        self._misbehave(faults, plan.step_id)
        try:
            result = core.step(plan)
        except PlanInvalid as error:
            self._send(Broken(self._crew_epoch, "plan_invalid", str(error)))
            raise
        if self._rank == 0:
            self._answer(faults, plan.step_id, result)

    def _misbehave(self, faults: Faults, step_id: int) -> None:
        if faults.ranks and self._rank not in faults.ranks:
            return
        if 0 < faults.die_from_step <= step_id:
            os._exit(9)
        while 0 < faults.hang_from_step <= step_id:
            time.sleep(60)
        time.sleep(faults.delay_ms / 1000)

    def _answer(self, faults: Faults, step_id: int, result: Message) -> None:
        if step_id == faults.late_step:
            self._held.append(result)
            return
        twice = 0 < faults.twice_from_step <= step_id
        for message in [result] * (2 if twice else 1) + self._held:
            self._send(message)
        self._held.clear()

    def _is_bad(self, sampling: Sampling, generated: int) -> bool:
        faults = self._faults()
        return sampling.seed in faults.bad_seeds and generated >= faults.bad_from_token

    def _faults(self) -> Faults:
        try:
            told = (Path(self._settings.run_dir) / FAULTS_FILE).read_text()
        except FileNotFoundError:
            told = os.environ.get("SHOAL_FAKE_FAULTS", "{}")
        return msgspec.json.decode(told, type=Faults)

    def _send(self, message: Message) -> None:
        self._socket.send(encode(message, self._scheduler))


if __name__ == "__main__":
    process.die_with_supervisor()
    FakeWorker(config.load(Path(sys.argv[1])), int(sys.argv[2])).run()
