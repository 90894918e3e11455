"""The scheduler's socket to the frontends: greetings, what they ask for, what they are told.

Owns who is connected. A frontend that goes (goodbye, its process ends, it cannot be reached, its queue is full)
is dropped here and named as ``Departed``; the loop ends its requests. Called by the loop.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

from shoal import transport
from shoal.logs import event
from shoal.messages import (
    PROTOCOL,
    Abort,
    Availability,
    Cancel,
    Draining,
    Finished,
    FrontendMessage,
    Goodbye,
    Hello,
    Message,
    PooledVector,
    Progress,
    Query,
    Refused,
    Rest,
    ScoredPrompt,
    Submit,
    Survey,
    TokenRun,
    Welcome,
)
from shoal.scheduler.link import Ready, Watch, receive, send
from shoal.scheduler.request import Emitted, Event, Pooled, Scored
from shoal.scheduler.stats import finished
from shoal.wire import Inbox, encode, fingerprint

_LOG = logging.getLogger("shoal.scheduler.gateway")
_MOST_MESSAGES = 1024
"""Messages taken in one turn, so that a flood does not keep results waiting."""


@dataclass(frozen=True, slots=True)
class Departed:
    """A frontend is gone; nothing can be sent to it."""


Arrival = tuple[int, Submit | Cancel | Query | Abort | Rest | Survey | Departed]
"""Frontend number and what came of it."""


@dataclass(slots=True)
class Frontend:
    """One connected process."""

    number: int
    identity: bytes
    boot_id: int
    pid: int
    pidfd: int
    observes: bool
    told: Availability | None = None
    runs: list[TokenRun] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)
    scored: list[ScoredPrompt] = field(default_factory=list)
    pooled: list[PooledVector] = field(default_factory=list)

    def add_token(self, emitted: Emitted) -> None:
        """Tokens that became known in one step travel as one run."""
        number, position = emitted.request.request_no, emitted.position
        logprobs = (emitted.logprob,) if emitted.logprob else ()
        before = self.runs[-1] if self.runs else None
        if before and before.request_no == number and before.position + len(before.ids) == position:
            ids, logprobs = (*before.ids, emitted.token_id), (*before.logprobs, *logprobs)
            self.runs[-1] = TokenRun(number, before.position, ids, logprobs)
        else:
            self.runs.append(TokenRun(number, position, (emitted.token_id,), logprobs))

    def has_news(self) -> bool:
        """Whether something has been posted since ``take_news``."""
        return bool(self.runs or self.finished or self.scored or self.pooled)

    def take_news(self, step_id: int) -> Progress:
        """All that has been posted."""
        news = Progress(step_id, tuple(self.runs), tuple(self.finished), tuple(self.scored), tuple(self.pooled))
        self.runs, self.finished, self.scored, self.pooled = [], [], [], []
        return news


class Gateway:
    """ROUTER to the frontends."""

    def __init__(self, watch: Watch, run_dir: str, boot_id: int) -> None:
        self.socket = transport.bind_router(watch.context, transport.gateway_endpoint(run_dir))
        self.inbox: Inbox[FrontendMessage] = Inbox(FrontendMessage, boot_id)
        self.strangers = 0
        """Messages of peers that have not said Hello."""
        self._boot_id = boot_id
        self._watch = watch
        self._frontends: dict[int, Frontend] = {}
        self._numbers: dict[bytes, int] = {}
        self._last_number = 0
        self._departed: list[int] = []
        watch.add(self.socket)

    def __len__(self) -> int:
        return len(self._frontends)

    def receive(self, ready: Ready) -> list[Arrival]:
        """What the frontends sent and who of them has gone, in order."""
        arrivals: list[Arrival] = []
        for identity, frame in receive(self.socket, _MOST_MESSAGES):
            message = self.inbox.decode(frame)
            if message is not None:
                arrivals += self._take(identity, message)
        for frontend in [each for each in self._frontends.values() if self._watch.ended(each.pidfd, ready)]:
            self._drop(frontend, "its process has ended")
        return arrivals + self._take_departed()

    def has_departed(self) -> bool:
        """Whether somebody was dropped since the last ``receive``."""
        return bool(self._departed)

    def post(self, happened: Event) -> None:
        """Puts an event into the next Progress of the frontend that it concerns."""
        request = happened.request
        frontend = self._frontends.get(request.frontend_no)
        if frontend is None:
            return
        if isinstance(happened, Emitted):
            frontend.add_token(happened)
        elif isinstance(happened, Scored):
            frontend.scored.append(ScoredPrompt(request.request_no, happened.position, happened.logprobs))
        elif isinstance(happened, Pooled):
            frontend.pooled.append(PooledVector(request.request_no, happened.vector))
        else:
            frontend.finished.append(finished(happened))

    def flush(self, step_id: int) -> None:
        """Sends what has been posted: one Progress a frontend."""
        for frontend in list(self._frontends.values()):
            if frontend.has_news():
                self._send(frontend, frontend.take_news(step_id))

    def send(self, frontend_no: int, message: Message) -> None:
        """Answers one frontend, if it is still there."""
        if frontend := self._frontends.get(frontend_no):
            self._send(frontend, message)

    def tell(self, availability: Availability) -> None:
        """Tells every frontend that has last been told something else."""
        for frontend in self._serving_frontends():
            if frontend.told != availability:
                frontend.told = availability
                self._send(frontend, availability)

    def announce_draining(self) -> None:
        """Tells every frontend that nothing new is accepted."""
        for frontend in self._serving_frontends():
            self._send(frontend, Draining())

    def _serving_frontends(self) -> Iterable[Frontend]:
        return [frontend for frontend in self._frontends.values() if not frontend.observes]

    def _take(self, identity: bytes, message: FrontendMessage) -> list[Arrival]:
        if isinstance(message, Hello):
            self._greet(identity, message)
            return self._take_departed()
        frontend = self._frontends.get(self._numbers.get(identity, 0))
        if frontend is None or (frontend.observes and isinstance(message, Submit | Cancel | Abort | Rest)):
            self.strangers += 1
            return []
        if isinstance(message, Goodbye):
            self._drop(frontend, "goodbye")
            return self._take_departed()
        return [(frontend.number, message)]

    def _greet(self, identity: bytes, hello: Hello) -> None:
        if hello.protocol != PROTOCOL or hello.fingerprint != fingerprint():
            self._refuse(identity, hello)
            return
        known = next((each for each in self._frontends.values() if each.boot_id == hello.boot_id), None)
        if known and known.identity == identity:
            self._send(known, Welcome(self._boot_id, known.number))
            return
        if known:
            self._drop(known, "it connected again")
        self._welcome(identity, hello)

    def _welcome(self, identity: bytes, hello: Hello) -> None:
        pidfd = self._watch.add_process(hello.pid)
        if pidfd is None:
            return
        self._last_number += 1
        number, observes = self._last_number, hello.role == "observer"
        frontend = Frontend(number, identity, hello.boot_id, hello.pid, pidfd, observes)
        self._frontends[number] = frontend
        self._numbers[identity] = number
        level = logging.DEBUG if observes else logging.INFO
        event(_LOG, "frontend_connected", level, frontend=number, pid=hello.pid, role=hello.role)
        self._send(frontend, Welcome(self._boot_id, number))

    def _refuse(self, identity: bytes, hello: Hello) -> None:
        detail = (
            f"scheduler: protocol {PROTOCOL}, schema {fingerprint()}; you: protocol {hello.protocol}, schema "
            f"{hello.fingerprint}; restart everything with one version"
        )
        event(_LOG, "frontend_refused", logging.ERROR, pid=hello.pid, detail=detail)
        send(self.socket, identity, encode(Refused(detail), hello.boot_id))

    def _send(self, frontend: Frontend, message: Message) -> None:
        if not send(self.socket, frontend.identity, encode(message, frontend.boot_id)):
            self._drop(frontend, "it cannot be reached or does not read")

    def _drop(self, frontend: Frontend, why: str) -> None:
        if self._frontends.pop(frontend.number, None) is None:
            return
        del self._numbers[frontend.identity]
        self._watch.drop_process(frontend.pidfd)
        self._departed.append(frontend.number)
        level = logging.DEBUG if frontend.observes else logging.INFO
        event(_LOG, "frontend_gone", level, frontend=frontend.number, pid=frontend.pid, why=why)

    def _take_departed(self) -> list[Arrival]:
        departed, self._departed = self._departed, []
        return [(number, Departed()) for number in departed]
