"""The supervisor's loop: wait, reap, start again, watch the scheduler; at a signal drain and end everything.

Children are started from this thread alone: the kernel ends them with it (``process.die_with_parent``).
"""

import http.client
import logging
import os
import selectors
import signal
import socket
import ssl
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Final

from shoal import access, logs, process
from shoal.config import Settings
from shoal.errors import StartError
from shoal.messages import Limits, Stats
from shoal.supervisor import report
from shoal.supervisor.children import Child, Death
from shoal.supervisor.console import Console
from shoal.supervisor.link import Observer

_LOG = logging.getLogger(__name__)
_TICK_S: Final = 0.1
_IDLE_TICK_S: Final = 1.0
_MOST_DEATHS_AT_START: Final = 3
_FRONTENDS_READY_S: Final = 60.0
"""From a ready crew to a frontend that says so."""
_QUESTION_EVERY_S: Final = 0.9
"""Less than a tick: one question to the scheduler each."""
_LEAST_SILENCE_S: Final = 5.0
_GATEWAY_GRACE_S: Final = 5.0
_BATCHES_GRACE_S: Final = 3.0
_FRONTENDS_GRACE_S: Final = 10.0
_RANKS_GRACE_S: Final = 3.0
_NOT_HANDED_ON: Final = ("GUNICORN_CMD_ARGS", access.KEYS_VARIABLE)
"""Variables of the environment that children do not see: the keys are in their settings, as digests."""
_GUNICORN_FAILED_EXITS: Final = (3, 4)
"""A worker that did not boot, an application that could not be loaded."""


class Supervisor:
    """One server: its children, and whether they serve yet."""

    def __init__(
        self,
        settings: Settings,
        settings_path: Path,
        console: Console,
        rank_command: Sequence[str],
        daemon: bool,
    ) -> None:
        self._settings = settings
        self._console = console
        self._daemon = daemon
        self._signals: list[signal.Signals] = []
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._observer: Observer | None = None
        self._announced = False
        self._crew_ready_s = 0.0
        self._deaths_at_start: Counter[str] = Counter()
        self._ranks = [
            self._child(f"rank{rank}", [*rank_command, str(settings_path), str(rank)], settings_path)
            for rank in range(settings.tp)
        ]
        self._scheduler = self._child(
            "scheduler", [*_PYTHON, "shoal.scheduler.main", str(settings_path)], settings_path
        )
        self._frontends = self._child("frontends", _GUNICORN, settings_path)
        self._batches = self._child("batches", [*_PYTHON, "shoal.batches", str(settings_path)], settings_path)

    def run(self) -> int:
        """Until a signal: the exit code. Raises StartError where the server cannot start."""
        process.adopt_orphans()
        self._listen_to_signals()
        self._observer = Observer(self._settings.run_dir)
        try:
            while not self._signals:
                self._wait()
                self._reap()
                self._start_what_is_due()
                self._watch(self._observer)
            self._drain()
        finally:
            self._end_all()
            self._stop_observing()
        if len(self._signals) > 1:
            return 128 + self._signals[1]
        return 0

    @property
    def _children(self) -> list[Child]:
        return [self._scheduler, self._frontends, self._batches, *self._ranks]

    @property
    def _starting(self) -> bool:
        return not self._announced

    # --- children ----------------------------------------------------------------------------------------

    def _child(self, name: str, command: Sequence[str], settings_path: Path) -> Child:
        env = {key: value for key, value in os.environ.items() if key not in _NOT_HANDED_ON}
        env["SHOAL_SETTINGS"] = str(settings_path)
        # torch's OpenMP threads would else spin at barriers on the cores that frontends and clients need.
        env.setdefault("OMP_WAIT_POLICY", "passive")
        return Child(name, command, env, settings_path.parent, self._console.relay)

    def _start_what_is_due(self) -> None:
        now_s = time.monotonic()
        for child in self._children:
            if child.start_due_s is not None and now_s >= child.start_due_s:
                child.start()
                self._tell("child_started", logging.DEBUG, child=child.name, pid=child.pid)

    def _reap(self) -> None:
        for child in self._children:
            death = child.reap()
            if death is None:
                continue
            if self._starting:
                self._raise_where_hopeless(death)
            self._tell("child_ended", logging.ERROR, child=death.name, manner=death.manner, cause=death.cause)
            child.schedule_restart()
            if child is self._scheduler and self._observer is not None:
                self._observer.forget_scheduler()
        process.reap_orphans([child.pid for child in self._children])

    def _raise_where_hopeless(self, death: Death) -> None:
        """What failed at start, and would fail again."""
        self._deaths_at_start[death.name] += 1
        told = death.exit_code == process.START_FAILED_EXIT
        unbootable = death.name == "frontends" and death.exit_code in _GUNICORN_FAILED_EXITS
        if told or unbootable or self._deaths_at_start[death.name] >= _MOST_DEATHS_AT_START:
            raise StartError(
                death.cause if told and death.cause else f"{death.name} {death.manner}: {death.cause}"
            )

    # --- start -------------------------------------------------------------------------------------------

    def _watch(self, observer: Observer) -> None:
        if self._starting:
            self._watch_the_start(observer.ask())
        else:
            observer.ask(_QUESTION_EVERY_S)
            self._end_what_hangs(observer)

    def _watch_the_start(self, stats: Stats | None) -> None:
        if stats is None or not stats.ready or stats.limits is None:
            self._crew_ready_s = 0.0
            self._console.progress(*report.phase(stats))
        elif self._frontends_ready():
            self._announce(stats.limits)
        else:
            self._console.progress(*report.phase(stats))

    def _end_what_hangs(self, observer: Observer) -> None:
        """A scheduler that does not answer for as long as a step may take is ended, and so started again. (It ends
        ranks that hang, and gunicorn's master workers.)"""
        patience_s = max(self._settings.step_timeout_s, _LEAST_SILENCE_S)
        if self._scheduler.pid and observer.unanswered * _IDLE_TICK_S > patience_s:
            self._tell(
                "child_hangs", logging.ERROR, child="scheduler", questions_unanswered=observer.unanswered
            )
            self._scheduler.signal(signal.SIGKILL)
            observer.forget_scheduler()

    def _frontends_ready(self) -> bool:
        self._crew_ready_s = self._crew_ready_s or time.monotonic()
        if _answers_ready(self._settings):
            return True
        if time.monotonic() - self._crew_ready_s > _FRONTENDS_READY_S:
            raise StartError(f"the frontends do not answer at {report.url(self._settings)}/ready")
        return False

    def _announce(self, limits: Limits) -> None:
        self._announced = True
        self._console.ready(report.ready(self._settings, limits))
        self._tell("ready", logging.INFO, url=report.url(self._settings), model=self._settings.model_name)

    def _stop_observing(self) -> None:
        if self._observer is not None:
            self._observer.close()
            self._observer = None

    # --- end ---------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """The scheduler finishes what runs and stops the ranks; then the frontends have nothing open."""
        self._tell("draining", logging.INFO, signal=self._signals[0].name)
        self._end([self._batches], _BATCHES_GRACE_S)
        self._end([self._scheduler], self._settings.drain_timeout_s + _GATEWAY_GRACE_S)
        self._end([self._frontends], _FRONTENDS_GRACE_S)
        self._end(self._ranks, _RANKS_GRACE_S)
        self._tell("ended", logging.INFO)

    def _end(self, children: Sequence[Child], grace_s: float) -> None:
        """SIGTERM, and a time to follow it; a second signal cuts that short."""
        for child in children:
            child.signal(signal.SIGTERM)
        self._wait_for_ends(children, grace_s, lambda: len(self._signals) > 1)

    def _end_all(self) -> None:
        for child in self._children:
            child.signal(signal.SIGKILL)
        self._wait_for_ends(self._children, _IDLE_TICK_S, lambda: False)

    def _wait_for_ends(
        self, children: Sequence[Child], grace_s: float, is_cut_short: Callable[[], bool]
    ) -> None:
        until_s = time.monotonic() + grace_s
        while any(child.pid for child in children) and time.monotonic() < until_s and not is_cut_short():
            self._wait()
            for child in self._children:
                child.reap()

    # --- waiting -----------------------------------------------------------------------------------------

    def _wait(self) -> None:
        """Until a child writes or ends, a signal comes, or it is time to look again; hands on what was written."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_reader, selectors.EVENT_READ)
            for child in self._children:
                for descriptor in child.descriptors if child.pid else ():
                    selector.register(descriptor, selectors.EVENT_READ)
            ready = selector.select(self._tick_s())
        if any(key.fileobj is self._wake_reader for key, _ in ready):
            self._wake_reader.recv(64)
        for child in self._children:
            if child.pid:
                child.relay()

    def _tick_s(self) -> float:
        due_s = [child.start_due_s for child in self._children if child.start_due_s is not None]
        longest_s = _TICK_S if self._starting or self._signals else _IDLE_TICK_S
        return max(0.0, min([longest_s, *(due - time.monotonic() for due in due_s)]))

    def _listen_to_signals(self) -> None:
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        signal.set_wakeup_fd(self._wake_writer.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._note_signal)
        signal.signal(signal.SIGINT, self._note_signal)
        if self._daemon:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        elif signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._note_signal)

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(signal.Signals(number))

    def _tell(self, name: str, level: int, /, **fields: object) -> None:
        self._console.clear()
        logs.event(_LOG, name, level, **fields)


_PYTHON: Final = (sys.executable, "-P", "-m")
_GUNICORN: Final = (
    *_PYTHON,
    "gunicorn",
    "-c",
    "python:shoal.frontend.gunicorn_conf",
    "shoal.frontend.app:application",
)


def _trusting() -> ssl.SSLContext:
    """The certificate is our own, and for the name that clients use: it is not what is to be found out."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _answers_ready(settings: Settings) -> bool:
    """Whether a frontend says that a request would be served now."""
    host, port = report.reachable(settings)
    connection = http.client.HTTPConnection(host, port, timeout=1)
    if settings.ssl_certfile:
        connection = http.client.HTTPSConnection(host, port, timeout=1, context=_trusting())
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
