"""Which open sequence belongs to whom, and what the scheduler last said of itself. No socket in here.

``link.py`` feeds it what arrives and gives it the means to send; routes submit, cancel and ask through it.
"""

import asyncio
import contextlib
import logging
from array import array
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
RESTART_PATIENCE_S: Final = 60.0
"""For a scheduler and ranks that have served before, and are being started again."""
_MOST_LOSSES: Final = 3
"""Schedulers that a sequence may lose without any news of it between: it may be what ends them."""

_ABORT_PATIENCE_S: Final = 5.0

Answer = Stats | Aborted | Surveyed
A = TypeVar("A", Stats, Aborted, Surveyed)


class OpenSequence(Struct):
    """One submit without a terminal event yet."""

    mailbox: Mailbox
    index: int
    """The choice it is in its HTTP exchange."""
    submit: Submit
    """As it was sent last, or will be."""
    ids: "array[int]"
    """Generated tokens received so far: as many as the position that the next run must have."""
    carrier: int = 0
    """Boot id of the scheduler that has it; 0: it waits for one."""
    losses: int = 0
    """Schedulers that ended with it since the last news of it."""
    is_stopped: bool = False
    """A stop string has ended it, and only its terminal event is still awaited."""


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
        self._decided = asyncio.Event()
        """Whether requests would be taken in, or refused for now: no use in waiting for either."""
        self._lost_s: float | None = None
        """Since when open sequences wait for a scheduler, on the loop's clock."""
        self._refusal = ""

    # --- what routes call ---

    async def wait_ready(self) -> Limits:
        """The limits to check a request against; one that is taken in while ranks are started again waits for them in
        the queue. Raises RequestError 503 where none would be taken in; with patience: much where what has served is
        being started again, little for news that another frontend may have, and may have told who asks here next."""
        if not self._decided.is_set():
            patience_s = _NEWS_PATIENCE_S if self.scheduler_id else GREETING_PATIENCE_S
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(
                    self._decided.wait(), patience_s if self.limits is None else RESTART_PATIENCE_S
                )
        if self.draining:
            raise _unavailable("the server is shutting down", "draining")
        if self.asleep:
            raise _unavailable("the model sleeps; POST /wakeup", "sleeping")
        if not self.scheduler_id:
            raise _unavailable("the scheduler is not running; it is being started again", "scheduler_restarted")
        if not self._decided.is_set() or self.limits is None:
            raise _unavailable("the model is being loaded", "not_ready")
        return self.limits

    def submit(self, template: Submit, mailbox: Mailbox, index: int) -> int:
        """Sends ``template`` under a new number, whose news go to ``mailbox``; returns the number, which is its group
        too where it has none. Where the scheduler was lost meanwhile the next one gets it."""
        self._last_request_no += 1
        request_no = self._last_request_no
        submit = structs.replace(template, request_no=request_no, group=template.group or request_no)
        sequence = OpenSequence(mailbox, index, submit, array("i"))
        if self.scheduler_id and self._decided.is_set():
            self._hand_over(sequence)
        else:
            self._note_loss()
        self._open[request_no] = sequence
        return request_no

    def cancel(self, request_no: int, cause: str) -> None:
        """Ends a sequence. After ``stop_string`` its terminal event is still handed on, after others not."""
        if request_no not in self._open:
            return
        if cause == "stop_string":
            self._open[request_no].is_stopped = True
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
            case Availability(limits=limits, asleep=asleep):
                self._note_availability(limits, asleep)
            case Draining():
                self.draining = True
                self._decided.set()
            case Stats(query_no=query_no) | Aborted(query_no=query_no) | Surveyed(query_no=query_no):
                self._answer(query_no, message)
            case Refused(detail=detail):
                self._note_refusal(detail)

    def lose_scheduler(self) -> None:
        """The process that carried the open sequences is gone. The next one goes on with them; where none is to come
        they end in an error."""
        if not self.scheduler_id:
            return
        event(LOGGER, "scheduler lost", logging.WARNING, open=len(self._open))
        if self.draining:
            self.leave()
            return
        lost = self.scheduler_id
        self._forget_scheduler()
        for request_no, sequence in list(self._open.items()):
            sequence.losses += sequence.carrier == lost
            if sequence.is_stopped:
                del self._open[request_no]
            elif sequence.losses >= _MOST_LOSSES:
                self._give_up(
                    sequence, "scheduler_restarted", "schedulers ended whenever they had this request"
                )
        if self._open:
            self._note_loss()

    def look_at_clock(self) -> None:
        """To be called now and then: ends what has waited for another scheduler for too long."""
        if self._lost_s is not None and asyncio.get_running_loop().time() > self._lost_s + RESTART_PATIENCE_S:
            self._end_all(
                "scheduler_restarted", "the scheduler ended while it worked on this request; send it again"
            )

    def leave(self) -> None:
        """This process is about to end: so do its open sequences."""
        self._forget_scheduler()
        self.draining = False
        self._end_all(
            "draining", "the server shut down before this answer was complete; send the request again"
        )

    # --- inside ---

    def _forget_scheduler(self) -> None:
        self.scheduler_id = self.asleep = 0
        self._informed.clear()
        self._decided.clear()
        for query_no in self._queries:
            self._answer(query_no, None)

    def _note_loss(self) -> None:
        if self._lost_s is None:
            self._lost_s = asyncio.get_running_loop().time()

    def _end_all(self, code: str, detail: str) -> None:
        for sequence in list(self._open.values()):
            self._give_up(sequence, code, detail)
        self._lost_s = None

    def _note_availability(self, limits: Limits | None, asleep: int) -> None:
        self.limits, self.asleep = limits or self.limits, asleep
        self._informed.set()
        if limits is None and not asleep:
            self._decided.clear()
            return
        self._decided.set()
        self._resume()

    def _resume(self) -> None:
        """Hands what no scheduler has to the one that is there."""
        self._lost_s = None
        waiting = [sequence for sequence in self._open.values() if sequence.carrier != self.scheduler_id]
        for sequence in waiting:
            if news := _outcome(sequence):
                self._end(sequence.submit.request_no, news)
                continue
            if sequence.carrier:
                attempt, generated = sequence.submit.attempt + 1, sequence.ids.tobytes()
                sequence.submit = structs.replace(sequence.submit, attempt=attempt, generated=generated)
                event(LOGGER, "resumed", id=sequence.submit.label, generated=len(sequence.ids), attempt=attempt)
            try:
                self._hand_over(sequence)
            except RequestError as error:
                self._give_up(sequence, "overloaded", str(error))

    def _give_up(self, sequence: OpenSequence, code: str, detail: str) -> None:
        del self._open[sequence.submit.request_no]
        sequence.mailbox.put(sequence.index, Lost(code, detail))

    def _hand_over(self, sequence: OpenSequence) -> None:
        if not self._send(sequence.submit, self.scheduler_id):
            raise _unavailable("the scheduler does not answer", "overloaded")
        sequence.carrier = self.scheduler_id

    def _greet(self, boot_id: int) -> None:
        if boot_id != self.scheduler_id:
            self.lose_scheduler()
            self.scheduler_id, self.draining = boot_id, False
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
        sequence.losses = 0
        sequence.mailbox.put(sequence.index, reading)

    def _apply_run(self, run: TokenRun) -> None:
        sequence = self._open.get(run.request_no)
        if sequence is None:
            self.unmatched += 1
            return
        if run.position > len(sequence.ids):
            event(LOGGER, "tokens missing", logging.ERROR, request_no=run.request_no, position=run.position)
            self.cancel(run.request_no, "lost")
            sequence.mailbox.put(
                sequence.index, Lost("tokens_lost", "a part of the answer was lost on its way")
            )
            return
        known = len(sequence.ids) - run.position
        if known >= len(run.ids):
            return
        fresh = _without_first(run, known) if known else run
        sequence.ids.extend(fresh.ids)
        sequence.losses = 0
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


def _outcome(sequence: OpenSequence) -> Finished | None:
    """How a sequence has ended whose scheduler was lost before it could say so; None: it goes on."""
    submit, ids = sequence.submit, sequence.ids
    if ids and ids[-1] in submit.stop_ids:
        return Finished(submit.request_no, "stop", stop_id=ids[-1])
    return Finished(submit.request_no, "length") if len(ids) >= submit.max_tokens else None


def _without_first(run: TokenRun, known: int) -> TokenRun:
    return structs.replace(
        run, position=run.position + known, ids=run.ids[known:], logprobs=run.logprobs[known:]
    )


def _unavailable(message: str, code: str) -> RequestError:
    return RequestError(503, message, code=code, retry_after_s=RETRY_AFTER_S)
