"""What goes wrong, and what the client makes of it."""

import socket
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from typing import Any

import pytest
from client_kit import Answer, ScriptedServer, ndjson, said, scripted_server, sse

from shoal import client
from shoal.client import (
    APIClient,
    APIConnectionError,
    APIError,
    APITimeoutError,
    ContextLengthError,
    RateLimitError,
)

CHUNK = {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}]}


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as scripted:
        yield scripted


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds between tries, which pass at once."""
    passed: list[float] = []
    monkeypatch.setattr("shoal.client.connection.time.sleep", passed.append)
    return passed


def openai_error(message: str, kind: str, code: Any = None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "code": code, "param": param}}


@pytest.mark.parametrize(
    ("status", "name"),
    [
        (400, "BadRequestError"),
        (413, "BadRequestError"),
        (401, "AuthenticationError"),
        (403, "PermissionDeniedError"),
        (404, "NotFoundError"),
        (408, "APITimeoutError"),
        (409, "ConflictError"),
        (429, "RateLimitError"),
        (500, "InternalServerError"),
        (503, "ServiceUnavailableError"),
        (418, "APIError"),
    ],
)
def test_each_status_has_its_exception(server: ScriptedServer, status: int, name: str) -> None:
    server.answers = [
        Answer(
            json=openai_error("it cannot be", "some_error", "some_code", "top_p"),
            status=status,
            headers={"X-Request-Id": "r-1", "Retry-After": "7"},
        )
    ]
    with APIClient(server.url, max_retries=0) as api, pytest.raises(APIError) as caught:
        list(api.chat_completions_v1("m", []))
    error = caught.value
    assert type(error) is getattr(client, name)
    assert str(error) == f"{status}: it cannot be"
    assert (error.status, error.code, error.kind, error.param) == (status, "some_code", "some_error", "top_p")
    assert (error.retry_after, error.request_id) == (7.0, "r-1")


def test_an_overflow_is_told_from_other_mistakes(server: ScriptedServer) -> None:
    body = openai_error("9 tokens, 8 fit", "invalid_request_error", "context_length_exceeded")
    server.answers = [Answer(json=body, status=400)]
    with APIClient(server.url, max_retries=0) as api, pytest.raises(ContextLengthError, match="8 fit"):
        list(api.completions_v1("m", "p", stream=True))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"object": "error", "message": "flat", "code": 400}, "flat"),
        ({"detail": [{"loc": ["body", "n"], "msg": "wrong"}]}, '"loc": \\["body", "n"\\]'),
        ({"error": "a text"}, "a text"),
        (b"<html>bad gateway</html>", "bad gateway"),
        (b"", "no reason"),
        ([1], "1"),
    ],
)
def test_errors_of_other_servers(server: ScriptedServer, body: Any, message: str) -> None:
    server.answers = [Answer(json=body, status=502)]
    with APIClient(server.url, max_retries=0) as api, pytest.raises(APIError, match=message):
        api.sessions()


def test_a_redirect_is_not_followed_with_the_key(server: ScriptedServer) -> None:
    server.answers = [Answer(json={}, status=307, headers={"Location": "http://elsewhere/"})]
    with APIClient(server.url, "k") as api, pytest.raises(APIError, match="points to http://elsewhere/"):
        api.sessions()


def test_an_error_within_a_stream(server: ScriptedServer) -> None:
    late = openai_error("the rank ended", "server_error", "engine_restarted")
    for pieces in (sse(CHUNK, late, end=False), ndjson(said("a", 1), late)):
        server.answers = [Answer(pieces=pieces)]
        seen: list[Any] = []
        with (
            APIClient(server.url, max_retries=0) as api,
            pytest.raises(client.InternalServerError, match="the rank ended") as caught,
        ):
            seen.extend(api.chat_completions_v1("m", [], stream=True))
        assert len(seen) == 1, "what came before is kept"
        assert (caught.value.status, caught.value.code) == (500, "engine_restarted")


@pytest.mark.parametrize("whole", [True, False])
def test_a_stream_that_breaks_off(server: ScriptedServer, whole: bool) -> None:
    server.answers = [Answer(pieces=sse(CHUNK, end=False), whole=whole)]
    with APIClient(server.url) as api, pytest.raises(APIConnectionError, match="broke off"):
        list(api.chat_completions_v1("m", [], stream=True))
    assert len(server.asked) == 1, "half an answer is never asked for again"


@pytest.mark.parametrize("piece", [b"<html>\n", b"data: {broken\n", b"data: [1]\n", b"data: \xff\n"])
def test_a_stream_that_cannot_be_read(server: ScriptedServer, piece: bytes) -> None:
    server.answers = [Answer(pieces=[piece])]
    with APIClient(server.url) as api, pytest.raises(APIConnectionError, match="cannot be read"):
        list(api.chat_completions_v1("m", [], stream=True))


def test_an_answer_that_is_no_json(server: ScriptedServer) -> None:
    server.answers = [Answer(json=b"<html>")]
    with APIClient(server.url) as api, pytest.raises(APIConnectionError, match="no JSON"):
        api.sessions()


def test_a_lost_connection_is_tried_again_under_one_id(server: ScriptedServer, pauses: list[float]) -> None:
    server.answers = [Answer(hang_up=True), Answer(hang_up=True), Answer(json=said("a", 1, "stop"))]
    with APIClient(server.url) as api:
        assert list(api.chat("hi", 3)) == [("a", 1, "stop")]
        server.answers = [Answer(json=said("b", 1, "stop"))]
        assert list(api.chat("hi", 3)) == [("b", 1, "stop")]
    first, second, third, other = (asked.headers["X-Request-Id"] for asked in server.asked)
    assert first == second == third != other
    assert len(pauses) == 2
    assert pauses[0] < pauses[1]


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_when_it_says(
    server: ScriptedServer, pauses: list[float], status: int
) -> None:
    busy = Answer(json=openai_error("busy", "rate_limit_error"), status=status, headers={"Retry-After": "2"})
    server.answers = [busy, Answer(pieces=ndjson(said("a", 1, "stop")))]
    with APIClient(server.url) as api:
        assert list(api.chat("hi", 3, stream=True)) == [("a", 1, "stop")]
    assert 2.0 <= pauses[0] < 2.5


def test_retry_after_may_be_a_date(server: ScriptedServer, pauses: list[float]) -> None:
    later = formatdate(time.time() + 5, usegmt=True)
    server.answers = [Answer(json={}, status=503, headers={"Retry-After": later}), Answer(json={"data": []})]
    with APIClient(server.url) as api:
        assert api.sessions() == []
    assert 3.0 <= pauses[0] <= 5.2


def test_a_long_wait_is_the_callers_to_decide(server: ScriptedServer, pauses: list[float]) -> None:
    server.answers = [Answer(json={"message": "quota"}, status=429, headers={"Retry-After": "3600"})]
    with APIClient(server.url) as api, pytest.raises(RateLimitError) as caught:
        api.sessions()
    assert caught.value.retry_after == 3600
    assert pauses == []


@pytest.mark.parametrize("status", [400, 409, 500, 502])
def test_what_another_try_does_not_mend_is_not_tried(
    server: ScriptedServer, pauses: list[float], status: int
) -> None:
    server.answers = [Answer(json={"message": "no"}, status=status)]
    with APIClient(server.url) as api, pytest.raises(APIError):
        api.sessions()
    assert pauses == []


def test_tries_come_to_an_end(server: ScriptedServer, pauses: list[float]) -> None:
    server.always = lambda asked: Answer(json={"message": "busy"}, status=503, headers={"Retry-After": "1"})
    with (
        APIClient(server.url, max_retries=3) as api,
        pytest.raises(client.ServiceUnavailableError, match="busy"),
    ):
        api.sessions()
    assert len(server.asked) == 4


def test_nobody_listens(pauses: list[float]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with APIClient(url) as api:
            with pytest.raises(APIConnectionError, match=f"cannot reach {url}: Connection refused"):
                api.sessions()
            assert not api.health_check()
    assert len(pauses) == 2


def test_a_server_that_says_nothing(server: ScriptedServer) -> None:
    released = threading.Event()
    stuck = [*sse(CHUNK, end=False), lambda: released.wait(20) and None]
    server.answers = [Answer(pieces=[lambda: released.wait(20) and None]), Answer(pieces=stuck)]
    with APIClient(server.url, timeout=0.2) as api:
        with pytest.raises(APITimeoutError):
            list(api.chat_completions_v1("m", []))
        with pytest.raises(APITimeoutError, match="standstill"):
            list(api.chat_completions_v1("m", [], stream=True))
    released.set()
    assert len(server.asked) == 2, "a time-out is the caller's budget: nothing is sent again"


def test_numbers_that_json_lacks_are_refused_here(server: ScriptedServer) -> None:
    with APIClient(server.url) as api, pytest.raises(ValueError, match="no JSON"):
        list(api.chat_completions_v1("m", [], temperature=float("nan")))
