"""ZeroMQ sockets, made in one place: high-water marks, linger, mandatory routing, endpoints.

The scheduler binds two ROUTERs in the run directory; frontends and ranks connect one DEALER each. Every
socket gets a fresh routing id (libzmq's default), so a restarted peer is a new peer.
"""

from pathlib import Path
from typing import Final

import zmq
import zmq.asyncio

_HIGH_WATER_MESSAGES: Final = 100_000
_LINGER_MS: Final = 200
_RECONNECT_MS: Final = 20
_RECONNECT_MAX_MS: Final = 200
_MAX_IPC_PATH_BYTES: Final = 107


def gateway_endpoint(run_dir: str) -> str:
    """Where the scheduler listens for frontends."""
    return _ipc(run_dir, "gateway")


def crew_endpoint(run_dir: str) -> str:
    """Where the scheduler listens for ranks."""
    return _ipc(run_dir, "crew")


def bind_router(context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str) -> "zmq.Socket[bytes]":
    """A bound ROUTER that raises EHOSTUNREACH for an unknown peer and EAGAIN for a full one, never drops."""
    router = context.socket(zmq.ROUTER)
    _configure(router)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    router.bind(endpoint)
    return router


def connect_dealer(context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str) -> "zmq.Socket[bytes]":
    """A connected DEALER."""
    dealer = context.socket(zmq.DEALER)
    _configure(dealer)
    dealer.connect(endpoint)
    return dealer


def connect_async_dealer(context: zmq.asyncio.Context, endpoint: str) -> zmq.asyncio.Socket:
    """A connected DEALER for an asyncio loop."""
    dealer = context.socket(zmq.DEALER)
    _configure(dealer)
    dealer.connect(endpoint)
    return dealer


def _configure(socket: "zmq.Socket[bytes] | zmq.asyncio.Socket") -> None:
    socket.setsockopt(zmq.SNDHWM, _HIGH_WATER_MESSAGES)
    socket.setsockopt(zmq.RCVHWM, _HIGH_WATER_MESSAGES)
    socket.setsockopt(zmq.LINGER, _LINGER_MS)
    socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)


def _ipc(run_dir: str, name: str) -> str:
    path = str(Path(run_dir) / name)
    if len(path.encode()) > _MAX_IPC_PATH_BYTES:
        raise ValueError(f"the run directory's path is too long for a socket: {path}")
    return f"ipc://{path}"
