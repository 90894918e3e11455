"""What the loop sleeps on: sockets, other processes' ends (pidfds), signals. Owned by main, used by the loop.

One ZeroMQ context a process; the gateway and the crew make their sockets of it.
"""

import os
import select
import signal
import socket
from collections.abc import Iterable
from typing import Any

import zmq

from shoal.process import open_pidfd

Socket = zmq.Socket[bytes]
Ready = frozenset[Any]
"""Sockets and descriptors that can be read."""


class Watch:
    """Poller and context."""

    def __init__(self) -> None:
        self.context: zmq.Context[Socket] = zmq.Context()
        self._poller = zmq.Poller()
        self._wake: tuple[socket.socket, socket.socket] | None = None

    def add(self, readable: Socket | int) -> None:
        """Wakes up for this from now on."""
        self._poller.register(readable, zmq.POLLIN)

    def add_process(self, pid: int) -> int | None:
        """A pidfd that is ready once the process has ended; None where it has already."""
        pidfd = open_pidfd(pid)
        if pidfd is not None:
            self.add(pidfd)
        return pidfd

    def drop_process(self, pidfd: int) -> None:
        """Closes what ``add_process`` gave."""
        self._poller.unregister(pidfd)
        os.close(pidfd)

    def ended(self, pidfd: int, ready: Ready) -> bool:
        """Whether the process has ended. ``ready`` alone could mean a descriptor closed since, its number reused."""
        if pidfd not in ready:
            return False
        asking = select.poll()
        asking.register(pidfd, select.POLLIN)
        return bool(asking.poll(0))

    def wake_on_signals(self) -> None:
        """A signal that has a handler ends ``wait``; only for the main thread."""
        self._wake = socket.socketpair()
        for end in self._wake:
            end.setblocking(False)
        signal.set_wakeup_fd(self._wake[1].fileno(), warn_on_full_buffer=False)
        self.add(self._wake[0].fileno())

    def wait(self, timeout_ms: int) -> Ready:
        """What is ready, after at most the given time."""
        ready = frozenset(readable for readable, _ in self._poller.poll(timeout_ms))
        if self._wake and self._wake[0].fileno() in ready:
            self._wake[0].recv(4096)
        return ready

    def close(self, sockets: Iterable[Socket]) -> None:
        """Closes sockets and context; queued messages still leave, within the linger time."""
        for each in sockets:
            each.close()
        self.context.term()


def receive(from_socket: Socket, most: int) -> Iterable[tuple[bytes, bytes]]:
    """(routing id, frame) of up to ``most`` waiting messages of a ROUTER; other shapes are passed over."""
    for _ in range(most):
        try:
            parts = from_socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
        if len(parts) == 2:
            yield parts[0], parts[1]


def send(to_socket: Socket, identity: bytes, frame: bytes) -> bool:
    """Whether the frame could be queued: not for a peer that is gone, or so slow that its queue is full."""
    try:
        to_socket.send_multipart([identity, frame], zmq.NOBLOCK)
    except zmq.ZMQError as error:
        if error.errno in (zmq.EAGAIN, zmq.EHOSTUNREACH):
            return False
        raise
    return True
