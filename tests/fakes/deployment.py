"""A real scheduler process, fake workers and a client on the gateway's socket, for tests.

Every process is ended by pid when the deployment closes, and by the kernel when the test process dies.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import msgspec
import zmq
from fakes.fake_rank import reference
from fakes.fake_worker import FAULTS_FILE, Faults

from shoal import config, process, transport
from shoal.messages import (
    PROTOCOL,
    Abort,
    Aborted,
    Availability,
    Cancel,
    Finished,
    GatewayMessage,
    Hello,
    Message,
    Progress,
    Query,
    Rejected,
    Rest,
    Sampling,
    Stats,
    Submit,
    Survey,
    Surveyed,
    Welcome,
)
from shoal.wire import Inbox, encode, fingerprint, new_boot_id, pack_ids

ROOT = Path(__file__).resolve().parents[2]
_WORKER = str(ROOT / "tests" / "fakes" / "fake_worker.py")
_PATIENCE_S = 20.0
A = TypeVar("A", Stats, Aborted, Surveyed)


class Client:
    """A frontend as the scheduler sees one, without HTTP: sends, and keeps what comes."""

    def __init__(self, run_dir: str, role: Any = "frontend", pid: int = 0) -> None:
        self.boot_id = new_boot_id()
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, Finished | Rejected] = {}
        self.heard: list[GatewayMessage] = []
        self.scheduler = 0
        self._last_query_no = 0
        self._prompts: dict[int, tuple[list[int], Submit]] = {}
        self._hello = Hello(PROTOCOL, fingerprint(), self.boot_id, pid or os.getpid(), role)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = transport.connect_dealer(self._context, transport.gateway_endpoint(run_dir))
        self._inbox: Inbox[GatewayMessage] = Inbox(GatewayMessage, self.boot_id)

    def close(self) -> None:
        """Without a goodbye."""
        self._socket.close()
        self._context.term()

    def send(self, message: Message) -> None:
        """To the scheduler that welcomed us."""
        self._socket.send(encode(message, self.scheduler))

    def send_raw(self, frame: bytes) -> None:
        """Anything."""
        self._socket.send(frame)

    def hello(self, hello: Hello | None = None) -> None:
        """Greets; the scheduler may not be there yet."""
        self._socket.send(encode(hello or self._hello, 0))

    def connect(self) -> None:
        """Greets and waits for the welcome."""
        self.hello()
        self.wait(lambda: self.scheduler != 0)

    def submit(self, number: int, prompt: list[int], max_tokens: int, **more: Any) -> None:
        """A greedy-looking request; its seed is its number unless said otherwise."""
        message = Submit(
            request_no=number,
            label=f"test-{number}",
            prompt=pack_ids(prompt),
            sampling=Sampling(seed=more.pop("seed", number)),
            max_tokens=max_tokens,
            arrival_ns=time.time_ns(),
            **more,
        )
        self._prompts[number] = (prompt, message)
        self.send(message)

    def cancel(self, number: int) -> None:
        """Asks for a request's end."""
        self.send(Cancel(number))

    def expected(self, number: int) -> list[int]:
        """The whole answer to a submitted request."""
        prompt, message = self._prompts[number]
        return reference(prompt, message.sampling.seed, message.max_tokens, Faults().vocab, message.stop_ids)

    def wait(self, until: Callable[[], bool], seconds: float = _PATIENCE_S) -> None:
        """Receives until something holds."""
        give_up_s = time.monotonic() + seconds
        while not until():
            left_ms = int((give_up_s - time.monotonic()) * 1000)
            assert left_ms > 0, f"nothing came in {seconds} s; ends: {self.ends}, tokens: {self.tokens}"
            if self._socket.poll(min(left_ms, 50)):
                self._take(self._inbox.decode(self._socket.recv()))

    def wait_ended(self, *numbers: int, seconds: float = _PATIENCE_S) -> None:
        """Receives until these requests have ended."""
        self.wait(lambda: all(number in self.ends for number in numbers), seconds)

    def wait_tokens(self, number: int, at_least: int = 1) -> None:
        """Receives until a request has so many tokens."""
        self.wait(lambda: len(self.tokens.get(number, [])) >= at_least)

    def wait_ready(self, ready: bool = True) -> None:
        """Receives until the last word on availability is this."""
        self.wait(lambda: self.ready is ready)

    @property
    def ready(self) -> bool | None:
        """The last word on availability."""
        return next((each.ready for each in reversed(self.heard) if isinstance(each, Availability)), None)

    def stats(self) -> Stats:
        """The scheduler's counters now."""
        number = self.ask(Query)
        return self.wait_answer(number, Stats)

    def ask_to_rest(self, level: int) -> int:
        """Asks for sleep, or to wake; returns the query's number."""
        return self.ask(lambda number: Rest(number, level))

    def rest(self, level: int) -> Stats:
        """Waits until it is so."""
        return self.wait_answer(self.ask_to_rest(level), Stats)

    def abort(self, label: str = "", tenant: str | None = None) -> int:
        """Ends HTTP requests; how many they were."""
        return self.wait_answer(self.ask(lambda number: Abort(number, label, tenant)), Aborted).requests

    def survey(self, tenant: str | None = None) -> Surveyed:
        """What is open."""
        return self.wait_answer(self.ask(lambda number: Survey(number, tenant)), Surveyed)

    def ask(self, question: Callable[[int], Message]) -> int:
        """Asks under a new number, and returns it."""
        self._last_query_no += 1
        self.send(question(self._last_query_no))
        return self._last_query_no

    def has_answer(self, number: int) -> bool:
        """Whether the answer has come."""
        return any(getattr(each, "query_no", None) == number for each in self.heard)

    def wait_answer(self, number: int, kind: type[A]) -> A:
        """Receives until a question is answered."""
        self.wait(lambda: self.has_answer(number))
        answer = next(each for each in self.heard if getattr(each, "query_no", None) == number)
        assert isinstance(answer, kind)
        return answer

    def finished(self, number: int) -> Finished:
        """How a request ended; it was accepted."""
        end = self.ends[number]
        assert isinstance(end, Finished), end
        return end

    def _take(self, message: GatewayMessage | None) -> None:
        assert message is not None, "a message that is malformed or not for us"
        self.heard.append(message)
        match message:
            case Welcome(boot_id=boot_id):
                self.scheduler = boot_id
            case Rejected(request_no=number):
                self._end(number, message)
            case Progress(runs=runs, finished=finished):
                for run in runs:
                    tokens = self.tokens.setdefault(run.request_no, [])
                    assert run.position == len(tokens)
                    assert run.request_no not in self.ends
                    tokens += run.ids
                for each in finished:
                    self._end(each.request_no, each)
            case _:
                pass

    def _end(self, number: int, end: Finished | Rejected) -> None:
        assert number not in self.ends, f"request {number} ended twice"
        self.ends[number] = end


class Deployment:
    """The processes of one server, without frontends and supervisor."""

    def __init__(self, run_dir: str, **changes: Any) -> None:
        values: dict[str, Any] = {
            "model": "none",
            "model_name": "fake",
            "run_dir": run_dir,
            "instance_num": 8,
            "session_len": 512,
            "cache_block_seq_len": 8,
            "max_prefill_token_num": 64,
            "log_level": "debug",
        }
        self.run_dir = run_dir
        self.settings = config.Settings(**(values | changes))
        self.settings_path = Path(run_dir) / "settings.json"
        self.log_path = Path(run_dir) / "log"
        self.workers: dict[int, subprocess.Popen[bytes]] = {}
        self._clients: list[Client] = []
        config.save(self.settings, self.settings_path)

    def start(self) -> None:
        """The scheduler and all ranks."""
        self.start_scheduler()
        for rank in range(self.settings.tp):
            self.start_worker(rank)

    def start_scheduler(self) -> None:
        """The scheduler, for the first time or again."""
        self.scheduler = self._start("-m", "shoal.scheduler.main", str(self.settings_path))

    def start_worker(self, rank: int = 0) -> None:
        """A rank, for the first time or again."""
        self.workers[rank] = self._start(_WORKER, str(self.settings_path), str(rank))

    def faults(self, **faults: Any) -> None:
        """How the workers misbehave from their next step on."""
        path = Path(self.run_dir) / FAULTS_FILE
        new = path.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(Faults(**faults)))
        new.rename(path)

    def client(self, role: Any = "frontend", pid: int = 0) -> Client:
        """A connected client."""
        client = Client(self.run_dir, role, pid)
        self._clients.append(client)
        client.connect()
        return client

    def log(self) -> str:
        """What all processes have logged."""
        return self.log_path.read_text()

    def close(self) -> None:
        """Ends everything."""
        for client in self._clients:
            client.close()
        for child in [self.scheduler, *self.workers.values()]:
            child.kill()
            child.wait()

    def _start(self, *arguments: str) -> "subprocess.Popen[bytes]":
        environment = os.environ | {process.PARENT_PID_VARIABLE: str(os.getpid())}
        with self.log_path.open("ab") as log:
            return subprocess.Popen([sys.executable, *arguments], env=environment, stderr=log, cwd=ROOT)


@contextmanager
def deployed(**changes: Any) -> Iterator[Deployment]:
    """A running deployment in a fresh run directory with a short path; shows its log when the test fails."""
    with TemporaryDirectory(prefix="shoal-") as run_dir:
        deployment = Deployment(run_dir, **changes)
        deployment.start()
        try:
            yield deployment
            assert "plan_invalid" not in deployment.log()
            assert "blocks_do_not_add_up" not in deployment.log()
        except BaseException:
            sys.stderr.write(deployment.log())
            raise
        finally:
            deployment.close()
