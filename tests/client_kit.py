"""A small HTTP server that answers what a test tells it to, for the client's tests.

``with scripted_server() as server: server.answers.append(Answer(json={...}))``: each request takes the next answer.
"""

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Asked:
    """A request as it came."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any


@dataclass
class Answer:
    """What is sent back. ``pieces`` are chunks of a stream; a callable among them is called, for its effect."""

    json: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    pieces: Sequence[bytes | Callable[[], None]] | None = None
    whole: bool = True
    """A stream whose end is sent; otherwise the connection just goes away."""
    chunked: bool = True
    hang_up: bool = False
    """Goes away without an answer."""


class ScriptedServer(ThreadingHTTPServer):
    """Answers by ``answers``, then by ``always``; keeps what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: list[Answer] = []
        self.always: Callable[[Asked], Answer] | None = None
        self.asked: list[Asked] = []
        self.gone = threading.Event()
        """Set when a client went away while it was being answered."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is part of many tests."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def next_answer(self, asked: Asked) -> Answer:
        self.asked.append(asked)
        if self.answers:
            return self.answers.pop(0)
        assert self.always is not None, f"the script has no answer to {asked}"
        return self.always(asked)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedServer

    def _serve(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(content) if content else None
        answer = self.server.next_answer(Asked(self.command, self.path, dict(self.headers), body))
        if answer.hang_up:
            self.close_connection = True
            self.connection.close()
            return
        try:
            self._write(answer)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
            self.server.gone.set()

    do_GET = do_POST = do_DELETE = _serve  # noqa: N815

    def _write(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.pieces is None:
            content = answer.json if isinstance(answer.json, bytes) else json.dumps(answer.json).encode()
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            return
        self.send_header(*(("Transfer-Encoding", "chunked") if answer.chunked else ("Connection", "close")))
        self.end_headers()
        for piece in answer.pieces:
            self._write_piece(piece, answer.chunked)
        if answer.chunked and answer.whole:
            self.wfile.write(b"0\r\n\r\n")
        if not answer.whole or not answer.chunked:
            self.close_connection = True

    def _write_piece(self, piece: bytes | Callable[[], None], chunked: bool) -> None:
        if not isinstance(piece, bytes):
            piece()
            return
        self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Says nothing."""


@contextlib.contextmanager
def scripted_server() -> Iterator[ScriptedServer]:
    """A server in a thread of this process, on a free port."""
    server = ScriptedServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def sse(*events: Any, end: bool = True) -> list[bytes]:
    """Server-sent events, one piece each."""
    return [f"data: {json.dumps(event)}\n\n".encode() for event in events] + [b"data: [DONE]\n\n"] * end


def ndjson(*events: Any) -> list[bytes]:
    """One object a line, one piece each."""
    return [json.dumps(event, ensure_ascii=False).encode() + b"\n" for event in events]


def said(text: str, tokens: int, finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
    """An object of the interactive route."""
    counts = {"input_tokens": 5, "history_tokens": 0}
    return {"text": text, "tokens": tokens, "finish_reason": finish_reason} | counts | more
