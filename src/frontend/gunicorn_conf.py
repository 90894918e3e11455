"""gunicorn's configuration for the frontends: ``gunicorn -c python:shoal.frontend.gunicorn_conf``.

Read in the master and in each worker; the settings file is named by the environment.
"""

import asyncio
import os
import signal
import ssl
import sys
from pathlib import Path
from typing import Any

from shoal import access, process
from shoal.config import load as load_settings
from shoal.errors import StartError
from shoal.frontend.app import SETTINGS_VARIABLE, application

_settings = load_settings(Path(os.environ[SETTINGS_VARIABLE]))
_host = f"[{_settings.server_name}]" if ":" in _settings.server_name else _settings.server_name

if _settings.ssl_certfile:
    keyfile, certfile = _settings.ssl_keyfile, _settings.ssl_certfile
    _tls = access.tls_context(keyfile, certfile)
    """Read once, before any worker: where gunicorn could not read the files later it would go on without TLS."""

bind = f"{_host}:{_settings.server_port}"
workers = _settings.frontends
worker_class = "asgi"
asgi_loop = "auto"
asgi_lifespan = "on"
asgi_disconnect_grace_period = 0
backlog = 2048
keepalive = 75
timeout = 60
graceful_timeout = max(1, int(_settings.drain_timeout_s))
limit_request_line = 8190
limit_request_fields = 100
limit_request_field_size = 8190
worker_tmp_dir = _settings.run_dir
control_socket_disable = True
accesslog = None
errorlog = "-"
loglevel = "warning"
proc_name = "shoal-frontend"

_FLUSH_S = 0.1
"""For the last bytes of the last answers to leave."""


def on_starting(server: Any) -> None:
    """The master ends with the supervisor; what cannot be served is told once, before any worker."""
    process.die_with_supervisor()
    try:
        application.prepare()
    except (StartError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(process.START_FAILED_EXIT)


def ssl_context(_config: Any, _default_factory: Any) -> ssl.SSLContext:
    """What the workers answer with; only called with TLS."""
    return _tls


def post_fork(server: Any, worker: Any) -> None:
    """A worker ends with the master."""
    process.die_with_parent(worker.ppid)


def post_worker_init(worker: Any) -> None:
    """On SIGTERM gunicorn would wait for idle keep-alive connections too; what counts are open requests."""
    worker.loop.add_signal_handler(signal.SIGTERM, _drain, worker)


def _drain(worker: Any) -> None:
    worker.handle_exit_signal()
    worker.shoal_drain = worker.loop.create_task(_quit_when_idle(worker))


async def _quit_when_idle(worker: Any) -> None:
    await application.wait_idle()
    await asyncio.sleep(_FLUSH_S)
    await application.stop()
    worker.handle_quit_signal()
