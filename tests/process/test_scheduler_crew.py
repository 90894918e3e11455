"""The crew's socket and process handles, against ranks whose every word the test chooses."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from tempfile import TemporaryDirectory

import zmq

from shoal import transport
from shoal.messages import (
    PROTOCOL,
    Allocate,
    Broken,
    CrewMessage,
    Load,
    Loaded,
    Message,
    RankHello,
    Ready,
    StepPlan,
    StepResult,
    Stop,
)
from shoal.scheduler.crew import Crew, CrewEvent, CrewLost, CrewUp
from shoal.scheduler.link import Watch
from shoal.wire import Inbox, encode, fingerprint, new_boot_id

BOOT_ID = new_boot_id()
PLAN = StepPlan(1, 1, b"", (), b"", b"", b"", b"", b"", b"")


class Rank:
    """A process that does nothing, and the socket that speaks for it."""

    def __init__(self, run_dir: str, number: int) -> None:
        self.number = number
        self.boot_id = new_boot_id()
        self.process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        self._endpoint = transport.crew_endpoint(run_dir)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._inbox: Inbox[CrewMessage] = Inbox(CrewMessage, self.boot_id)
        self.connect()

    def connect(self) -> None:
        """A new connection: the scheduler sees a new routing id."""
        self._socket = transport.connect_dealer(self._context, self._endpoint)

    def disconnect(self) -> None:
        """As when the process has ended."""
        self._socket.close(linger=0)

    def hello(self, schema: str = "") -> None:
        hello = RankHello(
            PROTOCOL, schema or fingerprint(), self.boot_id, self.number, self.process.pid, "cpu", "avx2"
        )
        self.send(hello)

    def send(self, message: Message) -> None:
        self._socket.send(encode(message, BOOT_ID))

    def heard(self) -> list[CrewMessage | None]:
        """Everything that has come."""
        messages = []
        while self._socket.poll(50):
            messages.append(self._inbox.decode(self._socket.recv()))
        return messages

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self._socket.close(linger=0)
        self._context.term()


class Stage:
    """A crew of two and its ranks, moved by the test."""

    def __init__(self, run_dir: str, stack: ExitStack) -> None:
        self.watch = Watch()
        self.crew = Crew(self.watch, run_dir, BOOT_ID, 2)
        self.events: list[CrewEvent] = []
        self.ranks = [Rank(run_dir, number) for number in range(2)]
        for rank in self.ranks:
            stack.callback(rank.close)

    def turn_until(self, condition: Callable[[], bool]) -> None:
        """As the loop does."""
        give_up_s = time.monotonic() + 5
        while not condition():
            assert time.monotonic() < give_up_s
            self.events += self.crew.receive(self.watch.wait(20))

    def phases(self) -> list[str]:
        return [status.phase for status in self.crew.status()]

    def boot(self, epoch: int = 1) -> None:
        """From Loaded to serving."""
        for rank, blocks, most_drafts in zip(self.ranks, (50, 40), (7, 15), strict=True):
            rank.send(Loaded(epoch, blocks, most_drafts))
        self.turn_until(lambda: self.phases() == ["warming"] * 2)
        for rank in self.ranks:
            rank.send(Ready(epoch, 40, 0))
        self.turn_until(lambda: self.crew.serving)


@contextmanager
def staged() -> Iterator[Stage]:
    """Two ranks that have been greeted."""
    with TemporaryDirectory(prefix="shoal-") as run_dir, ExitStack() as stack:
        stage = Stage(run_dir, stack)
        stack.callback(lambda: stage.watch.close([stage.crew.socket]))
        for rank in stage.ranks:
            rank.hello()
        stage.turn_until(lambda: stage.phases() == ["loading"] * 2)
        yield stage


def test_the_boot_dance() -> None:
    with staged() as stage:
        assert [rank.heard() for rank in stage.ranks] == [[Load(BOOT_ID, 1)]] * 2
        stage.boot()
        allocates = [rank.heard()[0] for rank in stage.ranks]
        assert allocates[0] == allocates[1]
        assert isinstance(allocates[0], Allocate)
        assert (allocates[0].crew_epoch, allocates[0].num_blocks) == (1, 40)
        assert not os.path.exists(allocates[0].rendezvous)
        assert stage.events == [CrewUp(1, 40, 7)]
        assert [(status.device, status.level) for status in stage.crew.status()] == [("cpu", "avx2")] * 2


def test_both_ranks_die_at_once() -> None:
    with staged() as stage:
        stage.boot()
        for rank in stage.ranks:
            rank.process.kill()
            rank.process.wait()
            rank.disconnect()
        stage.turn_until(lambda: stage.phases() == ["absent"] * 2)
        assert [type(event) for event in stage.events] == [CrewUp, CrewLost]
        assert stage.crew.epoch == 2


def test_an_unreachable_rank_is_noticed_by_sending() -> None:
    with staged() as stage:
        stage.boot()
        stage.ranks[1].disconnect()
        time.sleep(0.1)
        stage.crew.send_plan(PLAN)
        assert stage.crew.has_events()
        stage.turn_until(lambda: len(stage.events) == 2)
        assert stage.phases() == ["loading", "absent"]
        assert Load(BOOT_ID, 2) in stage.ranks[0].heard()


def test_a_lost_peer_starts_everybody_over_and_late_words_of_the_old_epoch_do_nothing() -> None:
    with staged() as stage:
        stage.boot()
        for rank in stage.ranks:
            rank.send(Broken(1, "peer_lost", "connection closed"))
        stage.turn_until(lambda: len(stage.events) == 2)
        stage.ranks[0].send(Ready(1, 40, 0))
        stage.ranks[0].send(Loaded(1, 7))
        stage.ranks[1].send(StepResult(1, 1, b"", b"", b""))
        stage.boot(epoch=2)
        assert stage.events[2:] == [CrewUp(2, 40, 7)]
        assert stage.crew.losses == 1


def test_a_rank_that_connects_anew_is_not_ended_one_that_is_replaced_is() -> None:
    with staged() as stage:
        stage.ranks[0].disconnect()
        stage.ranks[0].connect()
        stage.ranks[0].hello()
        stage.turn_until(lambda: True)
        stage.events += stage.crew.receive(stage.watch.wait(200))
        assert stage.crew.next_exit_ns() is None
        stage.ranks[1].boot_id += 1
        stage.ranks[1].disconnect()
        stage.ranks[1].connect()
        stage.ranks[1].hello()
        stage.turn_until(lambda: stage.crew.next_exit_ns() is not None)
        assert stage.ranks[0].process.poll() is None


def test_another_version_or_rank_is_told_to_stop() -> None:
    with staged() as stage:
        first = stage.ranks[0]
        first.disconnect()
        first.connect()
        first.boot_id += 1
        first._inbox = Inbox(CrewMessage, first.boot_id)
        first.hello("another schema")
        first.number = 2
        first.hello()
        stage.crew.receive(stage.watch.wait(200))
        time.sleep(0.1)
        stage.crew.receive(stage.watch.wait(200))
        assert first.heard() == [Stop(), Stop()]


def test_kill_ends_every_rank() -> None:
    with staged() as stage:
        stage.boot()
        stage.crew.kill("a test")
        stage.turn_until(lambda: len(stage.events) == 2)
        assert [rank.process.wait(timeout=2) for rank in stage.ranks] == [-signal.SIGKILL] * 2
        stage.turn_until(lambda: stage.crew.next_exit_ns() is None)
