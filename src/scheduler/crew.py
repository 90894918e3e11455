"""The scheduler's socket to the ranks: the boot dance, the plans, the results, the deaths.

Ranks say RankHello, are sent Load and answer Loaded; once all have, Allocate goes to all; once all are Ready the
crew serves. From Allocate on the ranks depend on each other, so the loss of one ends the crew epoch: the others
are sent Load again, keep their weights and wait for the supervisor to restart the missing one. To sleep, all are sent
GiveUp; one that dies meanwhile may come back without being loaded, and Load wakes them all. Called by the loop; owns
who is who, knows nothing of requests.
"""

import logging
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shoal import transport
from shoal.logs import event
from shoal.messages import (
    PROTOCOL,
    Allocate,
    Broken,
    GivenUp,
    GiveUp,
    Load,
    Loaded,
    Loading,
    Message,
    RankHello,
    RankMessage,
    RankStatus,
    Ready,
    StepPlan,
    StepResult,
    Stop,
)
from shoal.scheduler import link
from shoal.scheduler.link import Watch, receive, send
from shoal.wire import Inbox, encode, fingerprint

_LOG = logging.getLogger("shoal.scheduler.crew")
_MOST_MESSAGES = 256
_EXIT_GRACE_NS = 5_000_000_000
"""How long a rank that has said it will exit may take."""


@dataclass(frozen=True, slots=True)
class CrewUp:
    """All ranks are ready, their caches empty."""

    crew_epoch: int
    num_blocks: int
    most_drafts: int
    """Tokens of a sequence that every rank can guess in a step."""


@dataclass(frozen=True, slots=True)
class CrewLost:
    """A crew that served has ended; results of it are not to be expected."""

    detail: str


CrewEvent = CrewUp | CrewLost | StepResult


@dataclass(slots=True)
class Rank:
    """One rank process."""

    number: int
    identity: bytes
    boot_id: int
    pid: int
    pidfd: int
    device: str
    level: str
    phase: str = "loading"
    done: int = 0
    total: int = 0
    num_blocks: int = 0
    most_drafts: int = 0


class Crew:
    """ROUTER to the ranks."""

    def __init__(self, watch: Watch, run_dir: str, boot_id: int, size: int) -> None:
        self.socket = transport.bind_router(watch.context, transport.crew_endpoint(run_dir))
        self.inbox: Inbox[RankMessage] = Inbox(RankMessage, boot_id)
        self.epoch = 1
        self.losses = 0
        """How many crews that served were lost."""
        self._size = size
        self._run_dir = Path(run_dir)
        self._boot_id = boot_id
        self._watch = watch
        self._ranks: dict[int, Rank] = {}
        self._exiting: dict[int, int] = {}
        """pidfd → when it has to be gone, in monotonic nanoseconds."""
        self._allocated = False
        self._allocated_ns = 0
        self.rest_level = 0
        """Level of sleep that the ranks are at or on their way to."""
        self._resting_ns = 0
        self._events: list[CrewEvent] = []
        watch.add(self.socket)

    @property
    def serving(self) -> bool:
        """Whether plans can be sent."""
        return len(self._ranks) == self._size and all(rank.phase == "ready" for rank in self._ranks.values())

    @property
    def warming_since_ns(self) -> int | None:
        """Since when the ranks form their group and warm up, in monotonic nanoseconds; None where they don't."""
        return self._allocated_ns if self._allocated and not self.serving else None

    @property
    def asleep(self) -> int:
        """Level of sleep that all ranks are at; 0 while one is awake. See ``Rest``."""
        return self.rest_level if all(rank.phase == "asleep" for rank in self._ranks.values()) else 0

    @property
    def resting_since_ns(self) -> int | None:
        """Since when the ranks give up their memory, in monotonic nanoseconds; None where they don't."""
        return self._resting_ns if self.rest_level and not self.asleep else None

    def rest(self, level: int) -> None:
        """Has the ranks, which serve or sleep less deeply, give up their memory. No plan may be in flight."""
        self.rest_level, self._resting_ns = level, time.monotonic_ns()
        self._allocated = False
        self._rendezvous.unlink(missing_ok=True)
        event(_LOG, "crew_rests", level=level, crew_epoch=self.epoch)
        for rank in [rank for rank in self._ranks.values() if rank.num_blocks]:
            rank.phase = "resting"
            self._send(rank, GiveUp(self.epoch, level))

    def wake(self) -> None:
        """Has the ranks load what they gave up."""
        self.rest_level = 0
        self.epoch += 1
        event(_LOG, "crew_wakes", crew_epoch=self.epoch)
        self._load_all()

    def status(self) -> tuple[RankStatus, ...]:
        """Each rank's phase and progress."""
        return tuple(self._status_of(number) for number in range(self._size))

    def receive(self, ready: link.Ready) -> list[CrewEvent]:
        """What has happened, in order."""
        for identity, frame in receive(self.socket, _MOST_MESSAGES):
            message = self.inbox.decode(frame)
            if message is not None:
                self._take(identity, message)
        self._bury(ready)
        events, self._events = self._events, []
        return events

    def send_plan(self, step: StepPlan) -> None:
        """The same plan to every rank."""
        for rank in list(self._ranks.values()):
            self._send(rank, step)

    def stop(self) -> None:
        """Ends every rank in good order."""
        for rank in self._ranks.values():
            send(self.socket, rank.identity, encode(Stop(), rank.boot_id))

    def kill(self, why: str) -> None:
        """Ends every rank at once: they hang, or contradict the scheduler. The supervisor starts new ones."""
        event(_LOG, "crew_killed", logging.ERROR, why=why, crew_epoch=self.epoch)
        served = self._end_epoch()
        for rank in list(self._ranks.values()):
            _end_process(rank.pidfd)
            self._forget(rank, exits=True)
        self._report_loss(served, why)

    def has_events(self) -> bool:
        """Whether something happened outside of ``receive``."""
        return bool(self._events)

    def next_exit_ns(self) -> int | None:
        """When patience with an exiting rank ends, in monotonic nanoseconds."""
        return min(self._exiting.values(), default=None)

    def _status_of(self, number: int) -> RankStatus:
        rank = self._ranks.get(number)
        if rank is None:
            return RankStatus(number, 0, "absent")
        return RankStatus(number, rank.pid, rank.phase, rank.done, rank.total, rank.device, rank.level)

    def _take(self, identity: bytes, message: RankMessage) -> None:
        if isinstance(message, RankHello):
            self._greet(identity, message)
            return
        rank = next((rank for rank in self._ranks.values() if rank.identity == identity), None)
        if rank is None:
            return
        match message:
            case Loading(phase=phase, done=done, total=total):
                event(_LOG, "loading", logging.DEBUG, rank=rank.number, phase=phase, done=done, total=total)
                rank.done, rank.total = done, total
            case Loaded(crew_epoch=epoch) if self._awaits(rank, epoch, "loading"):
                self._loaded(rank, message)
            case Ready(crew_epoch=epoch) if self._awaits(rank, epoch, "warming"):
                self._ready(rank)
            case GivenUp(crew_epoch=epoch) if self._awaits(rank, epoch, "resting"):
                rank.phase = "asleep"
            case StepResult() if rank.number == 0:
                self._events.append(message)
            case Broken(crew_epoch=epoch) if epoch == self.epoch:
                self._broken(rank, message)
            case _:
                event(_LOG, "message_out_of_turn", logging.WARNING, rank=rank.number, message=message)

    def _awaits(self, rank: Rank, epoch: int, phase: str) -> bool:
        return epoch == self.epoch and rank.phase == phase

    def _greet(self, identity: bytes, hello: RankHello) -> None:
        if fault := self._fault(hello):
            event(_LOG, "rank_refused", logging.ERROR, rank=hello.rank, pid=hello.pid, detail=fault)
            send(self.socket, identity, encode(Stop(), hello.boot_id))
            return
        known = self._ranks.get(hello.rank)
        if known and known.identity == identity:
            return
        if known:
            self._forget(known, exits=known.boot_id != hello.boot_id)
            self._restart_epoch(f"rank {known.number} connected anew")
        pidfd = self._watch.add_process(hello.pid)
        if pidfd is None:
            return
        rank = Rank(hello.rank, identity, hello.boot_id, hello.pid, pidfd, hello.device, hello.level)
        self._ranks[hello.rank] = rank
        event(_LOG, "rank_connected", rank=hello.rank, pid=hello.pid, crew_epoch=self.epoch)
        if self.rest_level:
            rank.phase = "asleep"
        else:
            self._send(rank, Load(self._boot_id, self.epoch))

    def _fault(self, hello: RankHello) -> str:
        if hello.protocol != PROTOCOL or hello.fingerprint != fingerprint():
            return f"it has protocol {hello.protocol} and schema {hello.fingerprint}, not {fingerprint()}"
        if not 0 <= hello.rank < self._size:
            return f"there are {self._size} ranks"
        return ""

    def _loaded(self, rank: Rank, loaded: Loaded) -> None:
        if loaded.num_blocks < 1:
            self._broken(rank, Broken(self.epoch, "load_failed", "no memory is left for a single KV block"))
            return
        rank.phase, rank.num_blocks, rank.most_drafts = "loaded", loaded.num_blocks, loaded.most_drafts
        if len(self._ranks) == self._size and all(each.phase == "loaded" for each in self._ranks.values()):
            self._allocate()

    def _allocate(self) -> None:
        message = Allocate(self.epoch, self._num_blocks(), str(self._rendezvous))
        self._allocated, self._allocated_ns = True, time.monotonic_ns()
        ranks = list(self._ranks.values())
        for rank in ranks:
            rank.phase = "warming"
        for rank in ranks:
            if self.epoch == message.crew_epoch:
                self._send(rank, message)

    def _num_blocks(self) -> int:
        return min(rank.num_blocks for rank in self._ranks.values())

    def _ready(self, rank: Rank) -> None:
        rank.phase = "ready"
        if self.serving:
            event(_LOG, "crew_ready", crew_epoch=self.epoch, ranks=self._size, blocks=self._num_blocks())
            most_drafts = min(rank.most_drafts for rank in self._ranks.values())
            self._events.append(CrewUp(self.epoch, self._num_blocks(), most_drafts))

    def _broken(self, rank: Rank, broken: Broken) -> None:
        event(_LOG, "rank_broken", logging.ERROR, rank=rank.number, kind=broken.kind, detail=broken.detail)
        if broken.kind == "peer_lost":
            self._restart_epoch(f"rank {rank.number} lost a peer")
        else:
            self._lose(rank, f"rank {rank.number}: {broken.kind}: {broken.detail}")

    def _bury(self, ready: link.Ready) -> None:
        """Ranks whose process has ended are lost; those that should have ended by now are ended."""
        for rank in [rank for rank in self._ranks.values() if self._watch.ended(rank.pidfd, ready)]:
            self._lose(rank, f"rank {rank.number} (pid {rank.pid}) died")
        now_ns = time.monotonic_ns()
        for pidfd, until_ns in list(self._exiting.items()):
            if self._watch.ended(pidfd, ready):
                del self._exiting[pidfd]
                self._watch.drop_process(pidfd)
            elif until_ns <= now_ns:
                _end_process(pidfd)
                self._exiting[pidfd] = now_ns + _EXIT_GRACE_NS

    def _lose(self, rank: Rank, why: str) -> None:
        """Once a rank: its death may be noticed by its process handle and by a message that cannot be sent."""
        if self._ranks.get(rank.number) is rank:
            self._forget(rank, exits=True)
            self._restart_epoch(why)

    def _forget(self, rank: Rank, *, exits: bool) -> None:
        """The rank does not count any more; if its process is to exit it is watched until it has."""
        event(_LOG, "rank_lost", logging.WARNING, rank=rank.number, pid=rank.pid)
        del self._ranks[rank.number]
        if exits:
            self._exiting[rank.pidfd] = time.monotonic_ns() + _EXIT_GRACE_NS
        else:
            self._watch.drop_process(rank.pidfd)

    def _restart_epoch(self, why: str) -> None:
        """Has the ranks that are left start over, where they had begun to depend on each other."""
        if not self._allocated:
            event(_LOG, "boot_interrupted", logging.WARNING, why=why)
            return
        served = self._end_epoch()
        self._load_all()
        self._report_loss(served, why)

    def _load_all(self) -> None:
        for rank in list(self._ranks.values()):
            rank.phase, rank.done, rank.total = "loading", 0, 0
            self._send(rank, Load(self._boot_id, self.epoch))

    @property
    def _rendezvous(self) -> Path:
        return self._run_dir / f"rendezvous-{self._boot_id:x}-{self.epoch}"

    def _end_epoch(self) -> bool:
        """The next epoch begins; whether the old one may have served."""
        served, self._allocated = self._allocated, False
        self._rendezvous.unlink(missing_ok=True)
        self.epoch += 1
        return served

    def _report_loss(self, served: bool, why: str) -> None:
        if served:
            self.losses += 1
            self._events.append(CrewLost(why))

    def _send(self, rank: Rank, message: Message) -> None:
        if self._ranks.get(rank.number) is not rank:
            return
        if not send(self.socket, rank.identity, encode(message, rank.boot_id)):
            self._lose(rank, f"rank {rank.number} (pid {rank.pid}) cannot be reached")


def _end_process(pidfd: int) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
