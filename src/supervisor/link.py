"""The supervisor's socket to the scheduler: an observer that asks how far the start has come, and then whether it
still answers."""

import os
import time
from typing import Final

import zmq

from shoal import transport, wire
from shoal.errors import StartError
from shoal.messages import PROTOCOL, GatewayMessage, Goodbye, Hello, Query, Refused, Stats, Welcome

_INTERVAL_S: Final = 0.2


class Observer:
    """One DEALER."""

    def __init__(self, run_dir: str) -> None:
        self.unanswered = 0
        """Questions since the last answer: not a time, since a supervisor that was stopped for an hour has asked
        nothing meanwhile."""
        self._boot_id = wire.new_boot_id()
        self._scheduler_boot_id = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = transport.connect_dealer(self._context, transport.gateway_endpoint(run_dir))
        self._inbox: wire.Inbox[GatewayMessage] = wire.Inbox(GatewayMessage, self._boot_id)
        self._next_ask_s = 0.0
        self._latest: Stats | None = None

    def ask(self, interval_s: float = _INTERVAL_S) -> Stats | None:
        """The newest answer, None before the first; asks again when it is time. Never waits."""
        while self._socket.poll(0):
            self._take(self._socket.recv())
        if time.monotonic() >= self._next_ask_s:
            self._next_ask_s = time.monotonic() + interval_s
            self._say()
        return self._latest

    def close(self) -> None:
        """Takes leave of the scheduler."""
        if self._scheduler_boot_id:
            self._socket.send(wire.encode(Goodbye(), self._scheduler_boot_id))
        self._socket.close()
        self._context.term()

    def _say(self) -> None:
        self.unanswered += 1
        hello = Hello(PROTOCOL, wire.fingerprint(), self._boot_id, os.getpid(), "observer")
        if not self._scheduler_boot_id:
            self._socket.send(wire.encode(hello, 0))
        else:
            self._socket.send(wire.encode(Query(0), self._scheduler_boot_id))

    def forget_scheduler(self) -> None:
        """The scheduler died: the next one is greeted anew."""
        self._scheduler_boot_id = 0
        self._latest = None
        self.unanswered = 0

    def _take(self, frame: bytes) -> None:
        match self._inbox.decode(frame):
            case Welcome(boot_id=boot_id):
                self._scheduler_boot_id = boot_id
                self._next_ask_s = 0.0
            case Stats() as stats:
                self._latest = stats
                self.unanswered = 0
            case Refused(detail=detail):
                raise StartError(f"the scheduler is of another version: {detail}")
            case _:
                pass
