"""The rank's end of its socket to the scheduler: says hello until answered, and again when the scheduler died."""

import os
import time
from typing import Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from shoal import transport, wire
from shoal.messages import PROTOCOL, CrewMessage, Load, Message, RankHello

_HELLO_INTERVAL_S: Final = 0.2


class SchedulerLink:
    """One DEALER; ``receive`` gives the next message meant for this process, or None."""

    def __init__(self, run_dir: str, rank: int, device: str, level: str) -> None:
        """device, level: as ``RankHello`` has them."""
        self._rank = rank
        self._device, self._level = device, level
        self._boot_id = wire.new_boot_id()
        self._scheduler_boot_id = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = transport.connect_dealer(self._context, transport.crew_endpoint(run_dir))
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._inbox: wire.Inbox[CrewMessage] = wire.Inbox(CrewMessage, self._boot_id)
        self._next_hello_s = 0.0

    def send(self, message: Message) -> None:
        """Sends to the scheduler that welcomed this rank last."""
        self._socket.send(wire.encode(message, self._scheduler_boot_id))

    def receive(self, timeout_s: float = _HELLO_INTERVAL_S) -> CrewMessage | None:
        """Waits at most one hello interval."""
        self._say_hello()
        ready = dict(self._poller.poll(int(timeout_s * 1000)))
        if self._monitor in ready:
            recv_monitor_message(self._monitor)
            self._scheduler_boot_id = 0
            self._next_hello_s = 0.0
        if self._socket not in ready:
            return None
        message = self._inbox.decode(self._socket.recv())
        if isinstance(message, Load):
            self._scheduler_boot_id = message.boot_id
        return message

    def close(self) -> None:
        """Closes the sockets; what is queued is still sent (within the linger time)."""
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()
        self._context.term()

    def _say_hello(self) -> None:
        now_s = time.monotonic()
        if self._scheduler_boot_id or now_s < self._next_hello_s:
            return
        self._next_hello_s = now_s + _HELLO_INTERVAL_S
        hello = RankHello(
            PROTOCOL, wire.fingerprint(), self._boot_id, self._rank, os.getpid(), self._device, self._level
        )
        self._socket.send(wire.encode(hello, 0))
