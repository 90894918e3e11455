"""What clients see when the scheduler refuses, fails, restarts or is silent, and when they go away themselves."""

import asyncio
import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from frontend_kit import EOS, Kit, events, limits
from msgspec import structs

from shoal.messages import (
    Availability,
    Draining,
    Finished,
    Limits,
    Progress,
    Rejected,
    Submit,
    TokenRun,
    Welcome,
)
from shoal.wire import pack_ids

_BOOT_IDS = itertools.count(8)


def _failed(reason: Any, detail: str = "") -> Progress:
    return Progress(0, (), (Finished(0, reason, detail=detail),))


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_429_with_retry_after(stream: bool) -> None:
    kit = Kit()
    kit.scheduler.answer = lambda _: Rejected(0, 429, "the queue is full", 2400)
    result = kit.chat(stream=stream)
    assert result.status_code == 429
    assert result.headers["retry-after"] == "3"
    assert result.json["error"]["type"] == "rate_limit_error"
    assert kit.service.switchboard.open_sequences == 0


def test_one_refused_choice_cancels_its_siblings() -> None:
    kit = Kit()
    kit.scheduler.answer = lambda submit: Rejected(0, 429, "full", 0) if submit.request_no == 2 else None
    assert kit.chat(n=3).status_code == 429
    assert sorted(cancel.request_no for cancel in kit.scheduler.cancels) == [1, 3]
    assert kit.service.switchboard.open_sequences == 0


@pytest.mark.parametrize(
    ("reason", "status", "kind"),
    [("failed", 500, "server_error"), ("deadline", 408, "timeout_error"), ("cancelled", 503, "server_error")],
)
def test_failures_have_their_status(reason: str, status: int, kind: str) -> None:
    kit = Kit()
    kit.scheduler.answer = lambda _: _failed(reason, "logits are not finite")
    result = kit.chat()
    assert result.status_code == status
    assert result.json["error"]["type"] == kind


def test_a_failure_in_a_stream_is_one_event_and_the_end() -> None:
    kit = Kit()

    def begin_and_fail(submit: Any) -> None:
        loop = asyncio.get_running_loop()
        number = submit.request_no
        loop.call_soon(
            kit.scheduler.switchboard.accept, Progress(1, (TokenRun(number, 0, tuple(kit.ids("ab"))),))
        )
        loop.call_later(
            0.02,
            kit.scheduler.switchboard.accept,
            Progress(2, (), (Finished(number, "failed", detail="broke"),)),
        )

    kit.scheduler.answer = begin_and_fail
    result = kit.complete(stream=True)
    assert result.status_code == 200
    first, last = events(result)
    assert first["choices"][0]["text"] == "ab"
    assert last["error"] == {
        "message": "broke", "type": "server_error", "param": None, "code": "generation_failed",
    }  # fmt: skip


def _lose(kit: Kit, told: tuple[int, ...], *then: Callable[[], None]) -> Callable[[Submit], None]:
    """The scheduler tells these tokens and dies; then this happens, one after the other."""
    board = kit.scheduler.switchboard

    def answer(submit: Submit) -> None:
        loop = asyncio.get_running_loop()
        acts = [
            lambda: board.accept(Progress(1, (TokenRun(submit.request_no, 0, told),))),
            board.lose_scheduler,
            *then,
        ]
        for number, act in enumerate(acts):
            loop.call_later(0.01 * number, act)

    return answer


def _welcome(kit: Kit, answer: list[int]) -> list[Callable[[], None]]:
    """Another scheduler, whose ranks are ready somewhat later."""
    board = kit.scheduler.switchboard

    def ready() -> None:
        kit.scheduler.answer = lambda _: answer
        board.accept(Availability(True, limits()))

    boot_id = next(_BOOT_IDS)
    return [lambda: board.accept(Welcome(boot_id, 1)), lambda: board.accept(Availability(False, None)), ready]


@pytest.mark.parametrize("stream", [False, True])
def test_the_next_scheduler_goes_on_with_what_was_open(stream: bool) -> None:
    kit = Kit()
    ids = [*kit.ids("said before it died, and after"), EOS]
    kit.scheduler.answer = _lose(kit, tuple(ids[:7]), *_welcome(kit, ids))
    result = kit.complete(stream=stream, seed=5, max_tokens=40)
    assert result.status_code == 200
    choices = [each["choices"][0] for each in events(result)[:-1]] if stream else result.json["choices"]
    assert "".join(choice["text"] for choice in choices) == "said before it died, and after"
    assert choices[-1]["finish_reason"] == "stop"
    first, second = kit.scheduler.submits
    assert second == structs.replace(first, attempt=1, generated=pack_ids(ids[:7]))
    assert kit.service.switchboard.open_sequences == 0


def test_a_scheduler_that_dies_while_a_prompt_is_made_keeps_no_request_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between the look whether there is one, and the submit."""
    kit = Kit()
    board = kit.scheduler.switchboard
    look = board.wait_ready

    async def look_and_lose() -> Limits:
        found = await look()
        board.lose_scheduler()
        for number, act in enumerate(_welcome(kit, kit.ids("late"))):
            asyncio.get_running_loop().call_later(0.01 * (number + 1), act)
        return found

    monkeypatch.setattr(board, "wait_ready", look_and_lose)
    assert kit.complete(max_tokens=4).json["choices"][0]["text"] == "late"
    assert [submit.attempt for submit in kit.scheduler.submits] == [0]


def test_nothing_is_computed_again_of_an_answer_that_was_complete() -> None:
    """Its end was lost with the scheduler."""
    kit = Kit()
    ids = kit.ids("whole")
    kit.scheduler.answer = _lose(kit, tuple(ids), *_welcome(kit, []))
    choice = kit.complete(max_tokens=len(ids)).json["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("whole", "length")
    kit.scheduler.answer = _lose(kit, (*ids, EOS), *_welcome(kit, []))
    choice = kit.complete(max_tokens=40).json["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("whole", "stop")
    kit.scheduler.answer = _lose(kit, tuple(ids), *_welcome(kit, []))
    choice = kit.complete(max_tokens=40, stop="ol").json["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("wh", "stop")
    assert len(kit.scheduler.submits) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_where_no_other_scheduler_comes_patience_ends(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.frontend.switchboard.RESTART_PATIENCE_S", 0.03)
    kit = Kit()
    pauses: list[Callable[[], None]] = [lambda: None] * 4
    kit.scheduler.answer = _lose(kit, (), *pauses, kit.scheduler.switchboard.look_at_clock)
    result = kit.chat(stream=stream)
    assert result.status_code == 503
    assert result.json["error"]["code"] == "scheduler_restarted"
    assert result.headers["retry-after"] == "1"
    again = kit.chat()
    assert (again.status_code, again.json["error"]["code"]) == (503, "scheduler_restarted")
    kit.scheduler.switchboard.accept(Welcome(7, 1))
    assert kit.chat().json["error"]["code"] == "not_ready"
    kit.scheduler.switchboard.accept(Availability(True, limits()))
    kit.says("back")
    assert kit.chat().json["choices"][0]["message"]["content"] == "back"


def test_a_request_that_schedulers_end_of_is_not_handed_on_for_ever() -> None:
    """Three in a row; where a token comes between they are counted anew."""
    kit = Kit()
    board = kit.scheduler.switchboard

    def die_again(submit: Submit) -> None:
        loop = asyncio.get_running_loop()
        if submit.attempt == 2:
            loop.call_soon(board.accept, Progress(1, (TokenRun(submit.request_no, 0, tuple(kit.ids("a"))),)))
        acts = [board.lose_scheduler, lambda: board.accept(Welcome(next(_BOOT_IDS), 1))]
        for number, act in enumerate([*acts, lambda: board.accept(Availability(True, limits()))]):
            loop.call_later(0.002 * (number + 1), act)

    kit.scheduler.answer = die_again
    result = kit.complete(max_tokens=5)
    assert (result.status_code, result.json["error"]["code"]) == (503, "scheduler_restarted")
    assert [submit.attempt for submit in kit.scheduler.submits] == [0, 1, 2, 3, 4]
    assert kit.service.switchboard.open_sequences == 0


def test_what_a_draining_scheduler_leaves_behind_ends() -> None:
    kit = Kit()
    board = kit.scheduler.switchboard
    loses = _lose(kit, ())

    def drain(submit: Submit) -> None:
        loses(submit)
        board.accept(Draining())

    kit.scheduler.answer = drain
    result = kit.chat()
    assert (result.status_code, result.json["error"]["code"]) == (503, "draining")


def test_ranks_that_are_started_again_keep_no_request_out() -> None:
    """It waits for them in the scheduler's queue."""
    kit = Kit()
    kit.scheduler.switchboard.accept(Availability(False, limits()))
    kit.says("later")
    assert kit.chat().json["choices"][0]["message"]["content"] == "later"


def test_a_request_has_patience_with_a_scheduler_that_is_started_again() -> None:
    board = Kit().scheduler.switchboard

    async def come_back() -> Limits:
        board.lose_scheduler()
        for message in (Welcome(8, 1), Availability(True, limits())):
            asyncio.get_running_loop().call_later(0.02, board.accept, message)
        return await board.wait_ready()

    assert asyncio.run(come_back()) == limits()
    assert board.scheduler_id == 8


def test_a_request_waits_for_the_news_that_the_ranks_are_ready() -> None:
    board = Kit().scheduler.switchboard

    async def wake_up() -> Limits:
        board.accept(Availability(False, None))
        asyncio.get_running_loop().call_later(0.02, board.accept, Availability(True, limits()))
        return await board.wait_ready()

    assert asyncio.run(wake_up()) == limits()


def test_leaving_ends_what_is_open() -> None:
    kit = Kit()

    def leave(_submit: Any) -> None:
        asyncio.get_running_loop().call_later(0.01, kit.scheduler.switchboard.leave)

    kit.scheduler.answer = leave
    result = kit.chat()
    assert (result.status_code, result.json["error"]["code"]) == (503, "draining")


def test_draining_refuses_new_requests() -> None:
    kit = Kit()
    kit.scheduler.switchboard.accept(Draining())
    result = kit.chat()
    assert (result.status_code, result.json["error"]["code"]) == (503, "draining")
    assert result.headers["retry-after"] == "1"


def test_tokens_that_do_not_follow_fail_the_request_and_repeats_are_ignored() -> None:
    kit = Kit()
    board = kit.scheduler.switchboard

    def repeat(submit: Any) -> None:
        number, ids = submit.request_no, tuple(kit.ids("abcd"))
        for run in (TokenRun(number, 0, ids[:2]), TokenRun(number, 0, ids[:2]), TokenRun(number, 1, ids[1:4])):
            board.accept(Progress(1, (run,)))
        board.accept(Progress(2, (), (Finished(number, "length"),)))

    kit.scheduler.answer = lambda submit: asyncio.get_running_loop().call_soon(repeat, submit) and None
    assert kit.complete().json["choices"][0]["text"] == "abcd"

    def skip(submit: Any) -> None:
        board.accept(Progress(1, (TokenRun(submit.request_no, 1, (70,)),)))

    kit.scheduler.answer = lambda submit: asyncio.get_running_loop().call_soon(skip, submit) and None
    result = kit.complete()
    assert (result.status_code, result.json["error"]["code"]) == (503, "tokens_lost")
    assert len(kit.scheduler.cancels) == 1


def test_deadlines_travel_and_the_sooner_one_counts() -> None:
    kit = Kit()
    kit.complete()
    assert kit.scheduler.submits[-1].deadline_ns == 0
    before = time.time_ns()
    kit.post("/v1/completions", {"prompt": "a", "timeout": 50}, X_Request_Timeout="7.5")
    left_s = (kit.scheduler.submits[-1].deadline_ns - before) / 1e9
    assert 7.5 <= left_s < 8


def test_a_silent_scheduler_does_not_outlive_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.frontend.generation._DEADLINE_SLACK_S", 0.05)
    kit = Kit()
    kit.scheduler.answer = lambda _: None
    result = kit.complete(timeout=0.05)
    assert (result.status_code, result.json["error"]["code"]) == (408, "timeout")
    assert [cancel.cause for cancel in kit.scheduler.cancels] == ["disconnected"]


def test_comments_go_to_event_stream_clients_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.frontend.stream._COMMENT_EVERY_S", 0.02)
    monkeypatch.setattr("shoal.frontend.stream.REFUSAL_PATIENCE_S", 0.01)
    kit = Kit()

    def late(submit: Any) -> None:
        ended = Progress(1, (TokenRun(submit.request_no, 0, (70,)),), (Finished(submit.request_no, "length"),))
        asyncio.get_running_loop().call_later(0.15, kit.scheduler.switchboard.accept, ended)

    kit.scheduler.answer = late
    body = {"prompt": "a", "stream": True}
    named = kit.post("/v1/completions", body, Accept="text/event-stream, */*")
    assert named.text.count(": still here\n\n") >= 2
    assert events(named)[-1] == "[DONE]"
    assert ": still here" not in kit.post("/v1/completions", body, Accept="*/*").text


async def _call_and_leave(kit: Kit, path: str, body: object, after_s: float) -> list[Any]:
    """Runs the application as gunicorn does for a client that goes away: its task is cancelled."""
    raw, sent = json.dumps(body).encode(), []
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-length", str(len(raw)).encode())],
        "server": ("127.0.0.1", 1),
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": raw, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    task = asyncio.create_task(kit.app(scope, receive, send))
    await asyncio.sleep(after_s)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return sent


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_a_client_that_goes_away_takes_its_sequences_along(
    stream: bool, begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.frontend.stream.REFUSAL_PATIENCE_S", 0.01)
    kit = Kit()

    def begin(submit: Any) -> None:
        if begun:
            run = Progress(1, (TokenRun(submit.request_no, 0, (70,)),))
            asyncio.get_running_loop().call_soon(kit.scheduler.switchboard.accept, run)

    kit.scheduler.answer = begin
    body = {"prompt": ["a", "b"], "n": 2, "stream": stream}
    sent = asyncio.run(_call_and_leave(kit, "/v1/completions", body, 0.06))
    assert bool(sent) == stream
    assert [cancel.request_no for cancel in kit.scheduler.cancels] == [1, 2, 3, 4]
    assert {cancel.cause for cancel in kit.scheduler.cancels} == {"disconnected"}
    assert kit.service.switchboard.open_sequences == 0


def test_a_client_that_leaves_while_its_stream_waits_to_be_read() -> None:
    kit = Kit()
    kit.says("x" * 100, end=False)

    async def scenario() -> None:
        blocked = asyncio.Event()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                await blocked.wait()

        raw = b'{"prompt": "a", "stream": true, "max_tokens": 150}'
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": "/v1/completions", "query_string": b"", "server": ("127.0.0.1", 1),
            "headers": [(b"host", b"localhost"), (b"content-length", str(len(raw)).encode())],
        }  # fmt: skip

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": raw, "more_body": False}

        kit.scheduler.answer = lambda _: None
        task = asyncio.create_task(kit.app(scope, receive, send))
        await asyncio.sleep(0.02)
        kit.scheduler.switchboard.accept(Progress(1, (TokenRun(1, 0, (70,)),)))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
    assert [cancel.request_no for cancel in kit.scheduler.cancels] == [1]


def test_a_fault_of_ours_is_a_500_without_details(monkeypatch: pytest.MonkeyPatch) -> None:
    kit = Kit()
    monkeypatch.setattr("shoal.frontend.checks.sampling_of", lambda *_, **__: 1 / 0)
    result = kit.chat()
    assert result.status_code == 500
    assert result.json["error"]["code"] == "internal_error"
    assert "ZeroDivision" not in result.text
