"""Which open sequence belongs to whom, and what the scheduler last said of itself. No socket in here.

``link.py`` feeds it what arrives and gives it the means to send; routes submit, cancel and ask through it.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Final, TypeVar

from msgspec import Struct, structs

from shoal.errors import RequestError
from shoal.frontend.mailbox import Lost, Mailbox, News
from shoal.logs import event
from shoal.messages import (
    Abort,
    Aborted,
    Availability,
    Cancel,
    Draining,
    Finished,
    FrontendMessage,
    GatewayMessage,
    Limits,
    PooledVector,
    Progress,
    Query,
    Refused,
    Rejected,
    Rest,
    ScoredPrompt,
    Stats,
    Submit,
    Survey,
    Surveyed,
    TokenRun,
    Welcome,
)

LOGGER: Final = logging.getLogger("shoal.frontend")
RETRY_AFTER_S: Final = 1.0
GREETING_PATIENCE_S: Final = 1.0
"""For a scheduler to say whether it serves: so that a server that is up never looks down from one frontend."""
_NEWS_PATIENCE_S: Final = 0.2
"""For the news that the ranks are ready."""

_ABORT_PATIENCE_S: Final = 5.0

Answer = Stats | Aborted | Surveyed
A = TypeVar("A", Stats, Aborted, Surveyed)


class OpenSequence(Struct):
    """One submit without a terminal event yet."""

    mailbox: Mailbox
    index: int
    """The choice it is in its HTTP exchange."""
    tokens: int = 0
    """Generated tokens received so far: the position that the next run must have."""


class Switchboard:
    """The frontend's side of the conversation with the scheduler."""

    def __init__(self, send: Callable[[FrontendMessage, int], bool]) -> None:
        self.scheduler_id = 0
        """Boot id of the scheduler that welcomed us; 0: none."""
        self.limits: Limits | None = None
        self.draining = False
        self.asleep = 0
        """Level of sleep that the model is at or on its way to."""
        self.unmatched = 0
        """News of sequences that are no longer open: late, and harmless."""
        self._send = send
        self._open: dict[int, OpenSequence] = {}
        self._last_request_no = 0
        self._queries: dict[int, asyncio.Future[Answer | None]] = {}
        self._last_query_no = 0
        self._informed = asyncio.Event()
        self._ready = asyncio.Event()
        self._refusal = ""

    # --- what routes call ---

    def check_ready(self) -> Limits:
        """The limits to check a request against. Raises RequestError 503 where none would be served now."""
        if not self.scheduler_id:
            raise _unavailable("the scheduler is not running; it is being started again", "scheduler_restarted")
        if self.draining:
            raise _unavailable("the server is shutting down", "draining")
        if self.asleep:
            raise _unavailable("the model sleeps; POST /wakeup", "sleeping")
        if not self._ready.is_set() or self.limits is None:
            raise _unavailable("the model is being loaded", "not_ready")
        return self.limits

    async def wait_ready(self) -> Limits:
        """``check_ready`` with a little patience for a scheduler that has just been started again, or ranks that are
        ready at last: another frontend may know it, and has said so to whoever asks here next."""
        if not self.scheduler_id:
            await self.informed(GREETING_PATIENCE_S)
        if not (self._ready.is_set() or self.draining or self.asleep):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ready.wait(), _NEWS_PATIENCE_S)
        return self.check_ready()

    def submit(self, template: Submit, mailbox: Mailbox, index: int) -> int:
        """Sends ``template`` under a new number, whose news go to ``mailbox``; returns the number, which is its group
        too where it has none."""
        self._last_request_no += 1
        request_no = self._last_request_no
        group = template.group or request_no
        self._transmit(structs.replace(template, request_no=request_no, group=group))
        self._open[request_no] = OpenSequence(mailbox, index)
        return request_no

    def cancel(self, request_no: int, cause: str) -> None:
        """Ends a sequence. After ``stop_string`` its terminal event is still handed on, after others not."""
        if request_no not in self._open:
            return
        if cause == "stop_string":
            message = Cancel(request_no, "stop_string")
        else:
            del self._open[request_no]
            message = Cancel(request_no, "disconnected")
        if self.scheduler_id:
            self._send(message, self.scheduler_id)

    async def query(self, patience_s: float) -> Stats | None:
        """The scheduler's statistics; None where it does not answer in time."""
        return await self._ask(Query, Stats, patience_s)

    async def abort(self, label: str, tenant: str | None, patience_s: float = _ABORT_PATIENCE_S) -> int | None:
        """Ends HTTP requests of any frontend (see ``Abort``), and says how many; None where the scheduler does not
        answer in time."""
        answer = await self._ask(lambda query_no: Abort(query_no, label, tenant), Aborted, patience_s)
        return answer.requests if answer else None

    async def rest(self, level: int) -> Stats | None:
        """Puts the model to sleep or wakes it, and waits until it is so; None where the scheduler ends meanwhile."""
        return await self._ask(lambda query_no: Rest(query_no, level), Stats, None)

    async def survey(self, tenant: str | None, patience_s: float) -> Surveyed | None:
        """What is open; None where the scheduler does not answer in time."""
        return await self._ask(lambda query_no: Survey(query_no, tenant), Surveyed, patience_s)

    async def informed(self, patience_s: float) -> None:
        """Until a scheduler has said whether it serves, or patience is over."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._informed.wait(), patience_s)

    @property
    def open_sequences(self) -> int:
        """How many submits have no terminal event yet."""
        return len(self._open)

    # --- what the link calls ---

    def accept(self, message: GatewayMessage) -> None:
        """Applies one message of the scheduler."""
        match message:
            case Progress():
                self._apply_progress(message)
            case Rejected(request_no=request_no):
                self._end(request_no, message)
            case Welcome(boot_id=boot_id):
                self._greet(boot_id)
            case Availability(ready=ready, limits=limits, asleep=asleep):
                self.limits, self.asleep = limits or self.limits, asleep
                self._informed.set()
                if ready:
                    self._ready.set()
                else:
                    self._ready.clear()
            case Draining():
                self.draining = True
            case Stats(query_no=query_no) | Aborted(query_no=query_no) | Surveyed(query_no=query_no):
                self._answer(query_no, message)
            case Refused(detail=detail):
                self._note_refusal(detail)

    def lose_scheduler(self) -> None:
        """Ends every open sequence in an error: the process that carried them is gone."""
        if not self.scheduler_id:
            return
        event(LOGGER, "scheduler lost", logging.WARNING, open=len(self._open))
        self._end_all(
            "scheduler_restarted", "the scheduler ended while it worked on this request; send it again"
        )

    def leave(self) -> None:
        """This process is about to end: so do its open sequences."""
        self._end_all(
            "draining", "the server shut down before this answer was complete; send the request again"
        )

    # --- inside ---

    def _end_all(self, code: str, detail: str) -> None:
        self.scheduler_id = self.asleep = 0
        self.draining = False
        self._informed.clear()
        self._ready.clear()
        for query_no in self._queries:
            self._answer(query_no, None)
        for sequence in self._open.values():
            sequence.mailbox.put(sequence.index, Lost(code, detail))
        self._open.clear()

    def _greet(self, boot_id: int) -> None:
        if boot_id != self.scheduler_id:
            self.lose_scheduler()
            self.scheduler_id = boot_id
            event(LOGGER, "scheduler found", boot_id=boot_id)

    def _note_refusal(self, detail: str) -> None:
        """Every hello is refused; once in the log is enough."""
        if detail != self._refusal:
            self._refusal = detail
            event(LOGGER, "scheduler refused this frontend", logging.ERROR, detail=detail)

    def _apply_progress(self, progress: Progress) -> None:
        for scored in progress.scored:
            self._hand_on(scored)
        for pooled in progress.pooled:
            self._hand_on(pooled)
        for run in progress.runs:
            self._apply_run(run)
        for finished in progress.finished:
            self._end(finished.request_no, finished)

    def _hand_on(self, reading: ScoredPrompt | PooledVector) -> None:
        """What was read off a prompt; who waits for it knows what has come already."""
        sequence = self._open.get(reading.request_no)
        if sequence is None:
            self.unmatched += 1
            return
        sequence.mailbox.put(sequence.index, reading)

    def _apply_run(self, run: TokenRun) -> None:
        sequence = self._open.get(run.request_no)
        if sequence is None:
            self.unmatched += 1
            return
        if run.position > sequence.tokens:
            event(LOGGER, "tokens missing", logging.ERROR, request_no=run.request_no, position=run.position)
            self.cancel(run.request_no, "lost")
            sequence.mailbox.put(
                sequence.index, Lost("tokens_lost", "a part of the answer was lost on its way")
            )
            return
        known = sequence.tokens - run.position
        if known >= len(run.ids):
            return
        sequence.tokens = run.position + len(run.ids)
        fresh = _without_first(run, known) if known else run
        sequence.mailbox.put(sequence.index, fresh)

    def _end(self, request_no: int, news: Finished | Rejected) -> None:
        sequence = self._open.pop(request_no, None)
        if sequence is None:
            self.unmatched += 1
            return
        terminal: News = news
        sequence.mailbox.put(sequence.index, terminal)

    async def _ask(
        self, question: Callable[[int], FrontendMessage], kind: type[A], patience_s: float | None
    ) -> A | None:
        if not self.scheduler_id:
            return None
        self._last_query_no += 1
        query_no = self._last_query_no
        waiting: asyncio.Future[Answer | None] = asyncio.get_running_loop().create_future()
        self._queries[query_no] = waiting
        try:
            self._send(question(query_no), self.scheduler_id)
            answer = await asyncio.wait_for(waiting, patience_s)
        except TimeoutError:
            return None
        finally:
            del self._queries[query_no]
        return answer if isinstance(answer, kind) else None

    def _answer(self, query_no: int, answer: Answer | None) -> None:
        waiting = self._queries.get(query_no)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    def _transmit(self, message: FrontendMessage) -> None:
        if not self.scheduler_id:
            raise _unavailable("the scheduler is not running; it is being started again", "scheduler_restarted")
        if not self._send(message, self.scheduler_id):
            raise _unavailable("the scheduler does not answer", "overloaded")


def _without_first(run: TokenRun, known: int) -> TokenRun:
    return structs.replace(
        run, position=run.position + known, ids=run.ids[known:], logprobs=run.logprobs[known:]
    )


def _unavailable(message: str, code: str) -> RequestError:
    return RequestError(503, message, code=code, retry_after_s=RETRY_AFTER_S)
