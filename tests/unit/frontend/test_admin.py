"""/abort_request, /sleep, /wakeup, /is_sleeping, /load and /admin: what is asked of the scheduler, by whom."""

import os
import signal
from typing import Any

import pytest
from falcon import testing
from frontend_kit import Kit, stats

from shoal import process
from shoal.access import digest_of
from shoal.config import ApiKey
from shoal.messages import Availability, Finished, OpenRequest, Progress, Rejected, RejectReason, Surveyed

KEYS = tuple(
    ApiKey(name=name, digest=digest_of(name), scopes=scopes)  # type: ignore[arg-type]
    for name, scopes in (("boss", ("inference", "admin")), ("team", ("inference",)), ("prom", ("metrics",)))
)


def abort(kit: Kit, body: dict[str, Any], key: str = "") -> testing.Result:
    return kit.post("/abort_request", body, **({"x_api_key": key} if key else {}))


def asked(kit: Kit) -> list[tuple[str, str | None]]:
    return [(message.label, message.tenant) for message in kit.scheduler.aborts]


@pytest.mark.parametrize(
    ("body", "labels"),
    [
        ({"rid": "abc"}, ["abc"]),
        ({"rid": ["abc", "def"], "abort_all": False}, ["abc", "def"]),
        ({"request_ids": ["abc"]}, ["abc"]),
        ({"abort_all": True}, [""]),
        ({"abort_all": True, "session_id": -1, "finished_reason": None, "abort_message": None}, [""]),
    ],
)
def test_requests_are_ended_by_id_in_the_forms_that_clients_send(
    body: dict[str, Any], labels: list[str]
) -> None:
    kit = Kit()
    result = abort(kit, body)
    assert (result.status_code, result.json) == (200, {"aborted": len(labels)})
    assert asked(kit) == [(label, None) for label in labels]


def test_the_id_of_an_answer_will_do() -> None:
    kit = Kit()
    kit.scheduler.aborted = 0
    assert abort(kit, {"rid": "chatcmpl-abc"}).json == {"aborted": 0}
    assert [label for label, _ in asked(kit)] == ["chatcmpl-abc", "abc"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "rid"),
        ({"session_id": -1}, "rid"),
        ({"rid": [""]}, "rid"),
        ({"rid": ["x"] * 1025}, "rid"),
        ({"rid": "a", "finished_reason": {"type": "abort"}}, "finished_reason"),
        ({"rid": "a", "abort_message": "because"}, "abort_message"),
        ({"rids": "a"}, "rids"),
    ],
)
def test_what_names_nothing_or_cannot_be_honoured_is_refused(body: dict[str, Any], param: str) -> None:
    kit = Kit()
    result = abort(kit, body)
    assert result.status_code == 400
    assert result.json["error"]["param"] == param
    assert asked(kit) == []


def test_a_key_ends_its_own_requests_and_with_the_admin_scope_anybodys() -> None:
    kit = Kit(api_keys=KEYS)
    assert abort(kit, {"abort_all": True}, "team").status_code == 200
    assert abort(kit, {"rid": "x"}, "boss").status_code == 200
    assert asked(kit) == [("", "team"), ("x", None)]
    assert abort(kit, {"rid": "x"}, "prom").status_code == 403
    assert abort(kit, {"rid": "x"}).status_code == 401
    assert len(kit.scheduler.aborts) == 2


def test_a_session_without_a_running_turn_ends_nothing() -> None:
    kit = Kit()
    assert abort(kit, {"session_id": 7}).json == {"aborted": 0}
    assert asked(kit) == []


def test_an_aborted_answer_is_delivered_as_far_as_it_came() -> None:
    kit = Kit()
    kit.scheduler.answer = lambda submit: Progress(1, (), (Finished(0, "aborted"),))
    result = kit.chat("hi")
    assert result.status_code == 200
    assert result.json["choices"][0]["finish_reason"] == "abort"


@pytest.mark.parametrize(
    ("query", "level"), [("", 1), ("?level=1", 1), ("?level=2", 2), ("?level=2&mode=wait", 2)]
)
def test_sleep(query: str, level: int) -> None:
    kit = Kit()
    result = kit.post(f"/sleep{query}", b"")
    assert (result.status_code, result.json) == (200, {"is_sleeping": True, "level": level})
    assert [message.level for message in kit.scheduler.rests] == [level]
    assert asked(kit) == []


def test_sleep_at_once_ends_what_runs_after_nothing_new_can_come() -> None:
    kit = Kit()
    assert kit.post("/sleep?mode=abort", b"").status_code == 200
    assert asked(kit) == [("", None)]
    assert kit.scheduler.rests[0].query_no < kit.scheduler.aborts[0].query_no


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/sleep?level=3", "level"),
        ("/sleep?level=0", "level"),
        ("/sleep?mode=keep", "mode"),
        ("/sleep?tags=weights", "tags"),
        ("/wakeup?tags=weights", "tags"),
        ("/wakeup?tags=kv_cache", "tags"),
        ("/wakeup?level=1", "level"),
    ],
)
def test_what_sleep_cannot_do_is_refused(path: str, param: str) -> None:
    kit = Kit()
    result = kit.post(path, b"")
    assert result.status_code == 400
    assert result.json["error"]["param"] == param
    assert kit.scheduler.rests == []


@pytest.mark.parametrize("path", ["/sleep", "/wakeup"])
def test_a_wish_in_the_body_is_not_overheard(path: str) -> None:
    kit = Kit()
    result = kit.post(path, {"level": 2})
    assert (result.status_code, kit.scheduler.rests) == (400, [])
    assert "query" in result.json["error"]["message"]
    assert kit.post(path, {}).status_code == 200


@pytest.mark.parametrize("query", ["", "?tags=weights,kv_cache", "?tags=weights&tags=kv_cache"])
def test_wake_up(query: str) -> None:
    kit = Kit()
    result = kit.post(f"/wakeup{query}", b"")
    assert (result.status_code, result.json) == (200, {"is_sleeping": False, "level": 0})
    assert [message.level for message in kit.scheduler.rests] == [0]


def test_asleep_requests_are_refused_and_ready_says_so() -> None:
    kit = Kit()
    kit.scheduler.stats = stats(ready=False, asleep=2)
    kit.scheduler.switchboard.accept(Availability(False, None, 2))
    refused = kit.chat("hi")
    assert refused.status_code == 503
    assert refused.json["error"]["code"] == "sleeping"
    assert "POST /wakeup" in refused.json["error"]["message"]
    assert kit.scheduler.submits == []
    assert kit.get("/ready").status_code == 503
    assert "sleeps at level 2" in kit.get("/ready").json["reason"]
    assert kit.get("/health").status_code == 200
    assert kit.get("/is_sleeping").json == {"is_sleeping": True, "level": 2}


@pytest.mark.parametrize(
    ("reason", "status", "code"),
    [
        ("concurrency", 429, "rate_limit_exceeded"),
        ("request_rate", 429, "rate_limit_exceeded"),
        ("token_rate", 429, "rate_limit_exceeded"),
        ("queue_full", 429, "queue_full"),
        ("asleep", 503, "sleeping"),
        ("draining", 503, "draining"),
        ("loading", 503, "not_ready"),
    ],
)
def test_refusals_of_the_scheduler(reason: RejectReason, status: int, code: str) -> None:
    kit = Kit()
    kit.scheduler.answer = lambda submit: Rejected(0, status, "not now", 7200, reason)
    for stream in (False, True):
        result = kit.chat("hi", stream=stream)
        assert result.status_code == status
        assert result.json["error"]["code"] == code
        assert result.headers["retry-after"] == "8"


def test_load() -> None:
    kit = Kit()
    gauges = {"num_http_requests": 3.0, "num_requests_running": 4.0, "kv_cache_usage_perc": 0.123456}
    kit.scheduler.stats = stats(gauges=gauges)
    load = kit.get("/load").json
    assert (load["server_load"], load["running"], load["cache_usage"], load["is_ready"]) == (3, 4, 0.1235, True)


def test_what_is_open() -> None:
    kit = Kit()
    kit.scheduler.surveyed = Surveyed(0, (OpenRequest("abc", "team", 1, 2, 3, 40, 5, 1250),))
    assert kit.get("/admin/requests").json == {
        "object": "list",
        "data": [
            {
                "id": "abc",
                "tenant": "team",
                "priority": 1,
                "running": 2,
                "waiting": 3,
                "prompt_tokens": 40,
                "generated_tokens": 5,
                "age_s": 1.25,
            }
        ],
    }


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/sleep"),
        ("POST", "/wakeup"),
        ("GET", "/is_sleeping"),
        ("GET", "/admin/requests"),
        ("POST", "/admin/drain"),
    ],
)
def test_power_needs_the_admin_scope(method: str, path: str) -> None:
    kit = Kit(api_keys=KEYS)
    assert kit.request(method, path).status_code == 401
    assert kit.request(method, path, x_api_key="team").status_code == 403
    assert kit.scheduler.rests == []


def test_a_scheduler_that_is_gone_is_503_everywhere() -> None:
    kit = Kit()
    kit.scheduler.switchboard.lose_scheduler()
    for method, path in (
        ("POST", "/sleep"),
        ("POST", "/wakeup"),
        ("GET", "/is_sleeping"),
        ("GET", "/load"),
        ("GET", "/admin/requests"),
    ):
        result = kit.request(method, path)
        assert result.status_code == 503
        assert result.json["error"]["code"] == "scheduler_restarted"


def test_drain_tells_the_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: told.append((pid, number)))
    kit = Kit()
    monkeypatch.delenv(process.PARENT_PID_VARIABLE, raising=False)
    assert kit.post("/admin/drain", b"").status_code == 503
    monkeypatch.setenv(process.PARENT_PID_VARIABLE, "4242")
    assert kit.post("/admin/drain", b"").json == {"status": "draining"}
    assert told == [(4242, signal.SIGTERM)]
