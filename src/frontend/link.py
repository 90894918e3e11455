"""The frontend's ZeroMQ side: one DEALER to the scheduler, greetings, and notice of the scheduler's death.

``app.py`` starts and stops it; what arrives goes to the ``Switchboard``.
"""

import asyncio
import logging
import os
import signal
from typing import Any, Final

import zmq
import zmq.asyncio

from shoal import transport, wire
from shoal.frontend.switchboard import LOGGER, Switchboard
from shoal.logs import event
from shoal.messages import PROTOCOL, FrontendMessage, GatewayMessage, Goodbye, Hello

_HELLO_EVERY_S: Final = 0.2


class Link:
    """Lives as long as the process; survives any number of schedulers."""

    def __init__(self, run_dir: str) -> None:
        self.switchboard = Switchboard(self._send)
        self._endpoint = transport.gateway_endpoint(run_dir)
        self._boot_id = wire.new_boot_id()
        self._inbox: wire.Inbox[GatewayMessage] = wire.Inbox(GatewayMessage, self._boot_id)
        self._hello = Hello(PROTOCOL, wire.fingerprint(), self._boot_id, os.getpid(), "frontend")
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Connects; to be called on the event loop that will use the link."""
        self._context = zmq.asyncio.Context()
        self._socket = transport.connect_async_dealer(self._context, self._endpoint)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._tasks = [
            asyncio.create_task(coroutine) for coroutine in (self._receive(), self._greet(), self._watch())
        ]
        for task in self._tasks:
            task.add_done_callback(_report_end)

    async def stop(self) -> None:
        """Says goodbye and closes."""
        if self.switchboard.scheduler_id:
            self._send(Goodbye(), self.switchboard.scheduler_id)
        self.switchboard.leave()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close()
        self._context.term()

    async def _receive(self) -> None:
        while True:
            message = self._inbox.decode(await self._socket.recv())
            if message is not None:
                self.switchboard.accept(message)

    async def _greet(self) -> None:
        """Says hello until welcomed, and again after each loss."""
        while True:
            if not self.switchboard.scheduler_id:
                self._send(self._hello, 0)
            self.switchboard.look_at_clock()
            await asyncio.sleep(_HELLO_EVERY_S)

    async def _watch(self) -> None:
        """The kernel closes a dead scheduler's socket at once; libzmq tells it here."""
        while True:
            await self._monitor.recv_multipart()
            self.switchboard.lose_scheduler()

    def _send(self, message: FrontendMessage, scheduler_id: int) -> bool:
        """Never waits; False where the scheduler has not read for very long and the queue is full."""
        sending: Any = self._socket.send(wire.encode(message, scheduler_id), zmq.DONTWAIT)
        failure = sending.exception() if sending.done() else None
        if failure is not None:
            event(LOGGER, "scheduler does not read", logging.ERROR, cause=failure)
        return failure is None


def _report_end(task: "asyncio.Task[None]") -> None:
    """Without its link a frontend is of no use: it ends in good order, and gunicorn starts another."""
    if not task.cancelled() and task.exception() is not None:
        LOGGER.error("link task ended", exc_info=task.exception())
        signal.raise_signal(signal.SIGTERM)
