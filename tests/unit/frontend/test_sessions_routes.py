"""/v1/sessions: listed, read, exported, deleted, expired; each key's own."""

import json
from pathlib import Path
from typing import Any

import pytest
from falcon import testing
from frontend_kit import SESSION_LEN, Kit

PATH = "/v1/chat/interactive"


def turn(kit: Kit, session: int, prompt: str = "hi", **fields: Any) -> Any:
    result = kit.post(PATH, {"prompt": prompt, "session_id": session, "interactive_mode": True, **fields})
    assert result.status_code == 200, result.text
    return result.json


def ids(result: testing.Result) -> list[int]:
    assert result.status_code == 200, result.text
    return [each["id"] for each in result.json["data"]]


def test_a_session_is_read_with_its_messages_and_counts() -> None:
    kit = Kit()
    kit.says("hello", "fine")
    turn(kit, 1)
    last = turn(kit, 1, "how")
    session = kit.get("/v1/sessions/1").json
    assert (session["id"], session["object"], session["state"]) == (1, "session", "idle")
    assert (session["turns"], session["message_count"], session["generated_tokens"]) == (2, 4, 6 + 5)
    assert session["tokens"] == last["history_tokens"] + last["input_tokens"] + last["tokens"] - 1
    assert session["max_tokens"] == SESSION_LEN
    assert session["expires_at"] is None
    assert session["created_at"] <= session["updated_at"]
    first, answer, *_ = session["messages"]
    assert (first["role"], first["content"], "tokens" in first) == ("user", "hi", False)
    assert (answer["content"], answer["tokens"], answer["finish_reason"]) == ("hello", 6, "stop")


def test_an_export_can_be_sent_again() -> None:
    kit = Kit()
    kit.says("hello")
    turn(kit, 3)
    result = kit.get("/v1/sessions/3/export")
    assert result.headers["content-disposition"] == 'attachment; filename="session-3.json"'
    assert result.headers["content-type"] == "application/json"
    export = json.loads(result.text)
    assert (export["object"], export["version"], export["session_id"]) == ("session.export", 1, 3)
    assert export["messages"] == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    again = [*export["messages"], {"role": "user", "content": "more"}]
    assert kit.post("/v1/chat/completions", {"messages": again}).status_code == 200
    turn(kit, 4, again)  # type: ignore[arg-type]
    assert kit.prompt(-1) == kit.prompt(-2)


def test_parts_of_messages_come_back_as_they_were_sent() -> None:
    kit = Kit()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    said = [{"role": "user", "content": parts, "name": "Ann"}]
    turn(kit, 1, said)  # type: ignore[arg-type]
    assert kit.get("/v1/sessions/1/export").json["messages"][0] == said[0]
    assert kit.get("/v1/sessions/1").json["messages"][0]["name"] == "Ann"


def test_pages_of_sessions() -> None:
    kit = Kit()
    numbers = [5, 3, 9, 1]
    for number in numbers:
        turn(kit, number)
    assert ids(kit.get("/v1/sessions")) == numbers[::-1]
    assert ids(kit.get("/v1/sessions?order=asc")) == numbers
    page = kit.get("/v1/sessions?limit=3")
    assert ids(page) == [1, 9, 3]
    assert (page.json["first_id"], page.json["last_id"], page.json["has_more"]) == (1, 3, True)
    rest = kit.get("/v1/sessions?limit=3&after=3")
    assert (ids(rest), rest.json["has_more"]) == ([5], False)
    assert ids(kit.get("/v1/sessions?order=asc&after=9")) == [1]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=x", "limit"),
        ("order=up", "order"),
        ("after=7", "after"),
        ("after=x", "after"),
    ],
)
def test_bad_queries_are_refused_by_name(query: str, param: str) -> None:
    result = Kit().get(f"/v1/sessions?{query}")
    assert (result.status_code, result.json["error"]["param"]) == (400, param)


@pytest.mark.parametrize("number", ["7", "x", "-1", "1.0", str(1 << 64), "9" * 5000, "%F0%9F%98%80"])
@pytest.mark.parametrize(("method", "tail"), [("GET", ""), ("DELETE", ""), ("GET", "/export")])
def test_what_is_not_there_is_a_404(number: str, method: str, tail: str) -> None:
    result = Kit().request(method, f"/v1/sessions/{number}{tail}")
    assert (result.status_code, result.json["error"]["code"]) == (404, "session_not_found")


def test_a_deleted_session_is_gone_with_what_retries_would_get() -> None:
    kit = Kit()
    body = {"prompt": "hi", "session_id": 1, "interactive_mode": True}
    kit.says("secret", "other")
    kit.post(PATH, body, X_Request_Id="once")
    result = kit.request("DELETE", "/v1/sessions/1")
    assert result.json == {"id": 1, "object": "session", "deleted": True}
    assert kit.request("DELETE", "/v1/sessions/1").status_code == 404
    again = kit.post(PATH, body, X_Request_Id="once").json
    assert (again["text"], again["history_tokens"]) == ("other", 0)


def test_all_sessions_are_deleted_at_once() -> None:
    kit = Kit()
    for number in (1, 2, 3):
        turn(kit, number)
    assert kit.request("DELETE", "/v1/sessions").json == {"object": "list", "deleted": 3, "running": 0}
    assert ids(kit.get("/v1/sessions")) == []


def test_sessions_outlive_the_process(tmp_path: Path) -> None:
    before = Kit(data_dir=str(tmp_path))
    before.says("hello")
    turn(before, 1)
    after = Kit(data_dir=str(tmp_path))
    turn(after, 1, "more")
    assert after.prompt() == "<user>hi<assistant>hello<user>more<assistant>"


def test_an_idle_session_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    kit = Kit(session_ttl_s=60.0)
    turn(kit, 1)
    turn(kit, 2)
    session = kit.get("/v1/sessions/1").json
    assert session["expires_at"] == pytest.approx(session["updated_at"] + 60, abs=1)
    store = kit.service.storage.sessions
    store._database.run_here(lambda db: db.execute("UPDATE sessions SET updated = updated - 61 WHERE id = 1"))
    assert ids(kit.get("/v1/sessions")) == [2]
    assert kit.get("/v1/sessions/1").status_code == 404
    assert turn(kit, 1, "again")["history_tokens"] == 0
    assert kit.prompt() == "<user>again<assistant>"
    store._database.run_here(lambda db: db.execute("UPDATE sessions SET updated = updated - 61"))
    store._database.run_here(store._sweep)
    for table in ("sessions", "messages"):
        count = f"SELECT count(*) FROM {table}"
        assert store._database.run_here(lambda db, count=count: db.execute(count).fetchone()[0]) == 0


def test_without_a_time_limit_nothing_expires() -> None:
    kit = Kit(session_ttl_s=0.0)
    turn(kit, 1)
    store = kit.service.storage.sessions
    store._database.run_here(lambda db: db.execute("UPDATE sessions SET updated = 1"))
    store._database.run_here(store._sweep)
    assert ids(kit.get("/v1/sessions")) == [1]
