"""The scheduler's loop: receive, apply requests, collect, apply results, plan, dispatch, send.

Moves messages between the gateway, the core and the crew, and knows the time; decides nothing itself but when
to stop. Called by main.
"""

import logging
import time
from collections.abc import Iterable

from shoal.config import Settings
from shoal.logs import event
from shoal.messages import (
    Abort,
    Aborted,
    Availability,
    Cancel,
    Query,
    Rejected,
    Rest,
    Stats,
    StepPlan,
    StepResult,
    Submit,
    Survey,
    Surveyed,
)
from shoal.scheduler.core import Core
from shoal.scheduler.crew import Crew, CrewEvent, CrewLost, CrewUp
from shoal.scheduler.gateway import Arrival, Departed, Gateway
from shoal.scheduler.link import Ready, Watch
from shoal.scheduler.pipeline import ResultMismatch
from shoal.scheduler.request import Emitted, Ended, Event, Pooled, Request
from shoal.scheduler.slumber import Slumber
from shoal.scheduler.stats import Statistics, milliseconds

_LOG = logging.getLogger("shoal.scheduler")
_LONGEST_SLEEP_NS = 1_000_000_000
_QUIET_NS = 200_000_000
_NS_PER_MS = 1_000_000
_WARM_UP_STEPS = 3
"""How many step time-outs a crew may take to form and to warm up: it computes three steps."""
_NS_PER_S = 1_000_000_000


class Loop:
    """One turn after the other, until drained."""

    def __init__(self, settings: Settings, core: Core, gateway: Gateway, crew: Crew, watch: Watch) -> None:
        self._core = core
        self._gateway = gateway
        self._crew = crew
        self._watch = watch
        self._stats = Statistics()
        self._slumber = Slumber()
        self._step_timeout_ns = int(settings.step_timeout_s * _NS_PER_S)
        self._drain_timeout_ns = int(settings.drain_timeout_s * _NS_PER_S)
        self._drain_asked = False
        self._drain_until_ns = 0
        self._ready: Ready = frozenset()
        self._may_plan = False
        self._progress_ns = time.monotonic_ns()
        self._ended_ns: int | None = None
        """When the last request ended, until the books are checked."""
        self._events: list[Event] = []

    def ask_to_drain(self) -> None:
        """Accept nothing new, finish what is here, then return from ``run``. Safe in a signal handler."""
        self._drain_asked = True

    def run(self) -> None:
        """Serves until drained."""
        while not self._drained():
            self._apply_requests(self._receive())
            self._apply_results(self._collect())
            # The ranks compute the next step while the frontends are told of the last one.
            self._dispatch(self._plan())
            self._send()
        self._check_books()
        self._crew.stop()

    def _receive(self) -> list[Arrival]:
        self._ready = self._watch.wait(self._sleep_ms())
        return self._gateway.receive(self._ready)

    def _apply_requests(self, arrivals: list[Arrival]) -> None:
        if not self._has_work():
            self._progress_ns = time.monotonic_ns()
        for frontend_no, message in arrivals:
            match message:
                case Submit():
                    self._submit(frontend_no, message)
                case Cancel():
                    self._events += self._core.cancel(frontend_no, message.request_no)
                case Departed():
                    self._events += self._core.cancel_frontend(frontend_no)
                case Query():
                    self._gateway.send(frontend_no, self._snapshot(message.query_no))
                case Abort():
                    self._abort(frontend_no, message)
                case Rest(query_no=query_no, level=level):
                    self._rest(frontend_no, query_no, level)
                case Survey(query_no=query_no, tenant=tenant):
                    found = self._core.survey(tenant, time.time_ns())
                    self._gateway.send(frontend_no, Surveyed(query_no, found))
        self._events += self._core.expire(time.time_ns())
        self._drain()
        self._fall_asleep_or_wake()
        self._may_plan = self._may_plan or bool(arrivals or self._events)

    def _plan(self) -> StepPlan | None:
        """The next plan, if there is one; else none is tried before something has happened."""
        if not self._may_plan or not self._core.pipeline.has_room:
            return None
        step = self._core.plan()
        self._may_plan = step is not None
        if step is None:
            return None
        self._stats.planned(step, self._core.rules.block_size, time.time_ns())
        return self._core.dispatch(step, time.monotonic_ns())

    def _dispatch(self, step: StepPlan | None) -> None:
        if step is not None:
            self._crew.send_plan(step)

    def _collect(self) -> list[CrewEvent]:
        self._watch_for_hang()
        return self._crew.receive(self._ready)

    def _apply_results(self, happened: list[CrewEvent]) -> None:
        for each in happened:
            match each:
                case StepResult():
                    self._apply_result(each)
                case CrewUp(crew_epoch=epoch, num_blocks=num_blocks, most_drafts=most_drafts):
                    self._events += self._core.crew_up(epoch, num_blocks, most_drafts)
                case CrewLost(detail=detail):
                    self._lose_crew(detail)
        self._may_plan = self._may_plan or bool(happened)

    def _send(self) -> None:
        events, self._events = self._events, []
        now_ns = time.time_ns()
        for each in events:
            if isinstance(each, Emitted):
                self._stats.emitted(each, now_ns)
            self._gateway.post(each)
        self._gateway.flush(self._core.pipeline.last_step_id)
        for each in events:
            self._account(each, now_ns)
        self._gateway.tell(Availability(self._ready_to_serve, self._core.limits, self._slumber.level))
        self._answer_who_waits_for_sleep()
        if self._ended_ns is not None and time.monotonic_ns() >= self._ended_ns + _QUIET_NS:
            self._check_books()

    def _submit(self, frontend_no: int, submit: Submit) -> None:
        outcome = self._core.submit(frontend_no, submit, time.time_ns(), self._stats.speed)
        match outcome:
            case Request():
                event(_LOG, "accepted", logging.DEBUG, id=submit.label, prompt=outcome.prompt_len)
            case Rejected(code=code, detail=detail):
                self._stats.rejected(outcome)
                event(_LOG, "rejected", id=submit.label, code=code, detail=detail)
                self._gateway.send(frontend_no, outcome)
            case None:
                event(_LOG, "submitted_twice", logging.WARNING, id=submit.label, request=submit.request_no)

    def _abort(self, frontend_no: int, abort: Abort) -> None:
        ended, requests = self._core.abort(abort.label, abort.tenant)
        event(_LOG, "aborted", id=abort.label or "all", tenant=abort.tenant or "any", requests=requests)
        self._events += ended
        self._gateway.send(frontend_no, Aborted(abort.query_no, requests))

    def _rest(self, frontend_no: int, query_no: int, level: int) -> None:
        event(_LOG, "sleep_asked" if level else "wake_asked", level=level, open_requests=len(self._core.book))
        self._slumber.ask(frontend_no, query_no, level, time.monotonic_ns() + self._drain_timeout_ns)
        self._core.rest(level)

    def _fall_asleep_or_wake(self) -> None:
        """Once nothing is open the ranks rest; where there is still something when patience is over, it is aborted."""
        level, crew = self._slumber.level, self._crew
        if not level and crew.rest_level:
            crew.wake()
        if level <= crew.rest_level:
            return
        if len(self._core.book) and time.monotonic_ns() >= self._slumber.until_ns:
            self._events += self._core.abort("", None)[0]
        idle = not len(self._core.book) and not len(self._core.pipeline)
        if idle and (crew.serving or crew.asleep):
            self._core.crew_lost()
            crew.rest(level)

    def _answer_who_waits_for_sleep(self) -> None:
        if self._slumber.is_settled(self._crew.asleep, self._core.serving):
            for frontend_no, query_no in self._slumber.take_askers():
                self._gateway.send(frontend_no, self._snapshot(query_no))

    def _apply_result(self, result: StepResult) -> None:
        try:
            collected = self._core.collect(result)
        except ResultMismatch as error:
            self._crew.kill(str(error))
            return
        if collected is not None:
            self._progress_ns = time.monotonic_ns()
            self._stats.stepped(collected, result.drafted, self._progress_ns)
            self._events += collected.events

    def _lose_crew(self, detail: str) -> None:
        running = len(self._core.book.seated)
        failed = self._core.crew_lost()
        resumed = running - len(failed)
        self._stats.count("requests_resumed_total", resumed)
        event(
            _LOG,
            "crew_lost",
            logging.ERROR,
            cause=detail,
            requests_resumed=resumed,
            requests_failed=len(failed),
        )
        self._events += failed

    def _account(self, happened: Event, now_ns: int) -> None:
        if isinstance(happened, Pooled):
            self._stats.pooled(happened)
        if not isinstance(happened, Ended):
            return
        self._stats.ended(happened, now_ns)
        _log_end(happened, now_ns)
        self._ended_ns = time.monotonic_ns()

    def _watch_for_hang(self) -> None:
        if (hung_at_ns := self._hung_at_ns()) is not None and hung_at_ns < time.monotonic_ns():
            self._crew.kill(
                f"the ranks have not answered within --step_timeout ({self._step_timeout_ns / _NS_PER_S:g} s)"
            )

    def _hung_at_ns(self) -> int | None:
        """When the ranks count as hung, unless they answer; None where no answer is waited for."""
        for since_ns in (self._crew.warming_since_ns, self._crew.resting_since_ns):
            if since_ns is not None:
                return since_ns + _WARM_UP_STEPS * self._step_timeout_ns
        sent_ns = self._core.pipeline.oldest_sent_ns
        return None if sent_ns is None else max(sent_ns, self._progress_ns) + self._step_timeout_ns

    @property
    def _ready_to_serve(self) -> bool:
        return self._core.serving and not self._core.draining and not self._slumber.level

    def _has_work(self) -> bool:
        """Whether steps should be ending now."""
        return self._core.serving and len(self._core.book) > 0

    def _drain(self) -> None:
        if not self._drain_asked:
            return
        if not self._core.draining:
            self._core.drain()
            self._drain_until_ns = time.monotonic_ns() + self._drain_timeout_ns
            event(_LOG, "draining", open_requests=len(self._core.book))
            self._gateway.announce_draining()
        elif time.monotonic_ns() >= self._drain_until_ns:
            self._events += self._core.cancel_all()

    def _drained(self) -> bool:
        return self._core.draining and not len(self._core.book)

    def _sleep_ms(self) -> int:
        """Until something is due; not at all where there is something to do."""
        plannable = self._may_plan and self._core.serving and self._core.pipeline.has_room
        if plannable or self._gateway.has_departed() or self._crew.has_events():
            return 0
        now_ns = time.monotonic_ns()
        due_ns = [now_ns + _LONGEST_SLEEP_NS, *self._alarms_ns(now_ns)]
        return max(0, -(-(min(due_ns) - now_ns) // _NS_PER_MS))

    def _alarms_ns(self, now_ns: int) -> Iterable[int]:
        """When something is due, in monotonic nanoseconds."""
        if (hung_at_ns := self._hung_at_ns()) is not None:
            yield hung_at_ns
        if self._drain_asked:
            yield self._drain_until_ns
        if self._slumber.level > self._crew.rest_level and len(self._core.book):
            yield self._slumber.until_ns
        if (deadline_ns := self._core.book.next_deadline_ns()) is not None:
            yield now_ns + deadline_ns - time.time_ns()
        if (exit_ns := self._crew.next_exit_ns()) is not None:
            yield exit_ns
        if self._ended_ns is not None and not self._core.book.seated:
            yield self._ended_ns + _QUIET_NS

    def _check_books(self) -> None:
        """Blocks conserve, or the process says so by name. Nobody waits for it: it is done when all is quiet."""
        if self._ended_ns is None or self._core.book.seated:
            return
        self._ended_ns = None
        if fault := self._core.discrepancy():
            event(_LOG, "blocks_do_not_add_up", logging.ERROR, fault=fault)

    def _snapshot(self, query_no: int) -> Stats:
        core, gateway, crew = self._core, self._gateway, self._crew
        stalled_ns = time.monotonic_ns() - self._progress_ns if self._has_work() else 0
        messages = {
            "messages_stale_total": float(gateway.inbox.stale + crew.inbox.stale),
            "messages_malformed_total": float(gateway.inbox.malformed + crew.inbox.malformed),
            "messages_of_strangers_total": float(gateway.strangers),
            "crews_lost_total": float(crew.losses),
        }
        return Stats(
            query_no=query_no,
            ready=self._ready_to_serve,
            draining=core.draining,
            ranks=crew.status(),
            limits=core.limits,
            stalled_ms=stalled_ns // _NS_PER_MS,
            asleep=crew.asleep,
            gauges=self._stats.gauges(core, crew.asleep),
            counters=self._stats.counters(core, messages),
            histograms=self._stats.histograms(),
        )


def _log_end(ended: Ended, now_ns: int) -> None:
    request = ended.request
    event(
        _LOG,
        "finished",
        id=request.label,
        reason=ended.reason,
        prompt=request.prompt_len,
        cached=max(0, request.cached_tokens),
        generated=request.generated,
        **milliseconds(request, now_ns),
        **({"detail": ended.detail} if ended.detail else {}),
    )
