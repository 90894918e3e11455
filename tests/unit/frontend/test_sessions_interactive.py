"""/v1/chat/interactive with a scripted scheduler: what a turn asks, answers, keeps and refuses."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from falcon import testing
from frontend_kit import EOS, SESSION_LEN, Kit

from shoal.frontend.service import Defaults
from shoal.messages import Abort, Aborted, Finished, Progress, Submit, TokenRun

PATH = "/v1/chat/interactive"
SPECIAL_TEMPLATE = (
    "{% for message in messages %}<|begin|>{{ message.role }}:{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant:{% endif %}"
)
"""Like ChatML: special tokens around every message, so that a session's ids can be gone on from."""


def turn(
    kit: Kit, prompt: object = "hi", headers: dict[str, str] | None = None, **fields: Any
) -> testing.Result:
    return kit.post(PATH, {"prompt": prompt, **fields}, **(headers or {}))


def interactive(kit: Kit, prompt: object = "hi", **fields: Any) -> Any:
    """A turn of session 1 that must succeed."""
    result = turn(kit, prompt, **{"session_id": 1, "interactive_mode": True, **fields})
    assert result.status_code == 200, result.text
    return result.json


def lines(result: testing.Result) -> list[Any]:
    assert result.headers["content-type"] == "application/x-ndjson"
    assert result.text.endswith("\n")
    return [json.loads(line) for line in result.text.splitlines()]


def messages(kit: Kit, session: int = 1) -> list[tuple[str, str]]:
    result = kit.get(f"/v1/sessions/{session}")
    assert result.status_code in (200, 404)
    return [(each["role"], each["content"]) for each in result.json.get("messages", [])]


# --- turns -----------------------------------------------------------------------------------------------


def test_a_session_remembers_what_was_said() -> None:
    kit = Kit()
    kit.says("hello", "fine")
    assert interactive(kit, "hi")["text"] == "hello"
    assert interactive(kit, "how")["text"] == "fine"
    assert kit.prompt() == "<user>hi<assistant>hello<user>how<assistant>"
    assert messages(kit) == [("user", "hi"), ("assistant", "hello"), ("user", "how"), ("assistant", "fine")]


def test_without_interactive_mode_nothing_is_kept() -> None:
    kit = Kit()
    first = turn(kit, "hi", session_id=4).json
    assert (first["text"], first["session_id"], first["history_tokens"]) == ("ok", 4, 0)
    assert turn(kit, "again", session_id=4).json["history_tokens"] == 0
    assert kit.prompt() == "<user>again<assistant>"
    assert kit.get("/v1/sessions").json["data"] == []


def test_a_last_turn_uses_the_history_and_ends_the_session() -> None:
    kit = Kit()
    kit.says("one", "two", "three")
    interactive(kit, "a")
    last = turn(kit, "b", session_id=1).json
    assert kit.prompt() == "<user>a<assistant>one<user>b<assistant>"
    assert last["text"] == "two"
    assert last["history_tokens"] > 0
    assert kit.get("/v1/sessions/1").status_code == 404
    assert interactive(kit, "c")["history_tokens"] == 0
    assert kit.prompt() == "<user>c<assistant>"


@pytest.mark.parametrize("asked", [{}, {"session_id": -1}, {"session_id": None}, {"session_id": -1.0}])
def test_minus_one_is_a_fresh_session_each_time(asked: dict[str, Any]) -> None:
    kit = Kit()
    ids = [turn(kit, "hi", interactive_mode=True, **asked).json["session_id"] for _ in range(3)]
    assert len(set(ids)) == 3
    assert all(0 < each < 1 << 31 for each in ids)
    interactive(kit, "more", session_id=ids[0])
    assert kit.prompt() == "<user>hi<assistant>ok<user>more<assistant>"


@pytest.mark.parametrize("field", ["prompt", "messages"])
def test_a_list_is_a_history_and_appends_to_one(field: str) -> None:
    kit = Kit()
    body = {field: [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]}
    kit.post(PATH, {**body, "session_id": 1, "interactive_mode": True})
    assert kit.prompt() == "<system>s<user>a<assistant>"
    more = [
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    interactive(kit, more)
    assert kit.prompt() == "<system>s<user>a<assistant>ok<user>b<assistant>c<user>d<assistant>"
    assert len(messages(kit)) == 7


@pytest.mark.parametrize("template", [None, SPECIAL_TEMPLATE])
def test_counts_add_up_turn_by_turn(template: str | None) -> None:
    kit = Kit(**({"template": template} if template else {}))
    kit.says("some words", "and more", "end")
    history = 0
    for number in range(3):
        answer = interactive(kit, f"question {number}")
        prompt = len(kit.scheduler.submits[-1].prompt) // 4
        assert answer["history_tokens"] + answer["input_tokens"] == prompt
        assert answer["history_tokens"] == history - (0 if template or not number else 1)
        assert answer["tokens"] == len(answer["text"]) + 1
        history = prompt + answer["tokens"]


def test_the_prompt_goes_on_from_the_very_tokens_of_the_answer() -> None:
    """The model spelled the answer otherwise than the tokenizer would: the next prompt has its tokens."""
    kit = Kit(template=SPECIAL_TEMPLATE)
    drawn = [*kit.ids("caf"), *kit.ids("é")]
    kit.scheduler.answer = lambda _: [*drawn, EOS]
    interactive(kit, "hi")
    first = kit.scheduler.submits[-1].prompt
    interactive(kit, "more")
    second = kit.scheduler.submits[-1].prompt
    assert second.startswith(first + b"".join(each.to_bytes(4, "little") for each in [*drawn, EOS]))


def test_a_template_that_shows_an_answer_otherwise_is_rendered_whole() -> None:
    kit = Kit(template=SPECIAL_TEMPLATE.replace("message.content", "(message.content | trim)"))
    kit.says("  padded  ", "ok")
    interactive(kit, "hi")
    answer = interactive(kit, "more")
    assert kit.prompt() == (
        "<|begin|>user:hi<|end|><|begin|>assistant:padded<|end|><|begin|>user:more<|end|><|begin|>assistant:"
    )
    assert answer["history_tokens"] == len(kit.ids("<|begin|>user:hi<|end|><|begin|>assistant:"))


def test_a_store_of_another_vocabulary_is_read_as_text(tmp_path: Path) -> None:
    kit = Kit(data_dir=str(tmp_path), template=SPECIAL_TEMPLATE)
    interactive(kit, "hi")
    other = Kit(data_dir=str(tmp_path), template=SPECIAL_TEMPLATE)
    other.service.tokenizer.eos_ids = ()
    other.service.tokenizer.token_bytes = lambda token: b"x%d" % token  # type: ignore[method-assign]
    answer = interactive(other, "more")
    assert answer["input_tokens"] > 0
    assert len(other.scheduler.submits[-1].prompt) // 4 == answer["history_tokens"] + answer["input_tokens"]


def test_the_cache_is_told() -> None:
    kit = Kit()
    kit.scheduler.cached_tokens = 7
    assert interactive(kit)["cached_tokens"] == 7


def test_unset_sampling_comes_from_the_authors_then_from_the_route() -> None:
    kit = Kit(defaults=Defaults(temperature=0.2, declared=frozenset({"temperature"})))
    turn(kit)
    sampling = kit.scheduler.submits[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.2, 0.8, 40)
    turn(kit, temperature=1.5, top_p=0.5, top_k=0, seed=0, min_p=0.1, repetition_penalty=1.2)
    sampling = kit.scheduler.submits[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (1.5, 0.5, 0, 0)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.2)


def test_stop_strings_of_any_length_end_the_answer() -> None:
    kit = Kit()
    kit.says("some words and more")
    for stop in ("words and", ["nothing", "words and"]):
        assert interactive(kit, "x", stop=stop)["text"] == "some "
    assert messages(kit)[-1] == ("assistant", "some ")


def test_what_the_2023_client_sends_is_taken() -> None:
    kit = Kit()
    body = {
        "prompt": "hi", "session_id": 1, "interactive_mode": True, "stream": False, "stop": False,
        "request_output_len": 64, "top_p": 0.8, "top_k": 40, "temperature": 0.8, "repetition_penalty": 1.0,
        "ignore_eos": False, "skip_special_tokens": True, "adapter_name": None, "image_url": None, "kwargs": {},
        "cancel": False, "min_new_tokens": None, "min_p": 0.0, "spaces_between_special_tokens": True, "seed": None,
    }  # fmt: skip
    result = kit.post(PATH, body)
    assert result.status_code == 200, result.text
    assert kit.scheduler.submits[-1].max_tokens == 64


# --- streams ---------------------------------------------------------------------------------------------


def test_a_stream_is_one_object_a_line() -> None:
    kit = Kit()
    kit.says("abc")
    result = turn(kit, session_id=1, interactive_mode=True, stream=True)
    *pieces, last = lines(result)
    assert "".join(piece["text"] for piece in pieces) == "abc"
    assert [piece["tokens"] for piece in pieces] == [1, 2, 3]
    assert {piece["finish_reason"] for piece in pieces} == {None}
    assert (last["text"], last["tokens"], last["finish_reason"], last["cached_tokens"]) == ("", 4, "stop", 0)
    assert {line["session_id"] for line in (*pieces, last)} == {1}
    assert "data:" not in result.text
    assert messages(kit) == [("user", "hi"), ("assistant", "abc")]


def test_a_client_that_asks_for_events_gets_events() -> None:
    kit = Kit()
    result = kit.post(PATH, {"prompt": "hi", "stream": True}, Accept="text/event-stream")
    assert result.headers["content-type"].startswith("text/event-stream")
    assert result.text.startswith("data: {")
    assert result.text.endswith("data: [DONE]\n\n")


def test_a_turn_is_recorded_before_its_last_line() -> None:
    """Who reads the end of the answer can send the next turn at once."""
    kit = Kit()
    seen: list[list[tuple[str, str]]] = []

    async def scenario() -> None:
        async def look(message: Any) -> None:
            if b"cached_tokens" in message.get("body", b""):
                found = await kit.service.storage.sessions.read("", 1)
                assert found is not None
                seen.append([(each.message["role"], each.message["content"]) for each in found[1]])
                assert await kit.service.storage.sessions.find_holder("", 1) is None

        await call(kit, {"prompt": "hi", "session_id": 1, "interactive_mode": True, "stream": True}, look)

    asyncio.run(scenario())
    assert seen == [[("user", "hi"), ("assistant", "ok")]]


# --- ends ------------------------------------------------------------------------------------------------


def test_the_old_way_to_end_a_session() -> None:
    kit = Kit()
    interactive(kit)
    for _ in range(2):
        result = turn(kit, "", session_id=1, request_output_len=0, interactive_mode=False)
        assert result.status_code == 200
        expected = {"text": "", "tokens": 0, "input_tokens": 0, "history_tokens": 0, "finish_reason": "stop"}
        assert result.json == {**expected, "session_id": 1}
    assert kit.get("/v1/sessions/1").status_code == 404
    assert len(kit.scheduler.submits) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("settings", "prompt"),
    [
        ({}, "<user>a<assistant>b<user>c<assistant>"),
        (
            {"template": SPECIAL_TEMPLATE},
            "<|begin|>user:a<|end|><|begin|>assistant:b<|end|><|begin|>user:c<|end|><|begin|>assistant:",
        ),
    ],
)
def test_a_history_is_resumed_without_an_answer(settings: dict[str, str], prompt: str, stream: bool) -> None:
    """LMDeploy's page ends a session when its answer is stopped, and sends what was said as a new one."""
    kit = Kit(**settings)
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    result = turn(kit, said, session_id=1, interactive_mode=True, request_output_len=0, stream=stream)
    assert result.status_code == 200, result.text
    (kept,) = lines(result) if stream else [result.json]
    assert (kept["text"], kept["tokens"], kept["history_tokens"], kept["finish_reason"]) == ("", 0, 0, "stop")
    assert kept["input_tokens"] > 0
    assert not kit.scheduler.submits
    answer = interactive(kit, "c")
    assert (answer["text"], answer["history_tokens"]) == ("ok", kept["input_tokens"])
    assert kit.prompt() == prompt
    assert messages(kit) == [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "ok")]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["x" * 190, "x" * 100_000])
@pytest.mark.parametrize("history", [False, True])
def test_a_full_session_says_so(stream: bool, prompt: str, history: bool) -> None:
    kit = Kit()
    if history:
        interactive(kit, "hi")
    asked = len(kit.scheduler.submits)
    result = turn(kit, prompt, session_id=1, interactive_mode=True, stream=stream)
    assert result.status_code == 200
    assert result.headers["x-session-state"] == "full"
    (answer,) = lines(result) if stream else [result.json]
    assert (answer["text"], answer["tokens"], answer["finish_reason"]) == ("", 0, "length")
    assert str(SESSION_LEN) in answer["detail"]
    assert min(answer["input_tokens"], answer["history_tokens"]) >= 0
    assert bool(answer["history_tokens"]) == history
    assert len(kit.scheduler.submits) == asked
    assert len(messages(kit)) == (2 if history else 0)
    assert interactive(kit, "short")["text"] == "ok"


def test_an_answer_that_does_not_fit_is_full_and_one_cut_short_is_not() -> None:
    kit = Kit()
    kit.says("x" * SESSION_LEN, end=False)
    assert turn(kit, request_output_len=SESSION_LEN).headers["x-session-state"] == "full"
    result = turn(kit, request_output_len=5)
    assert (result.json["text"], result.json["finish_reason"]) == ("xxxxx", "length")
    assert "x-session-state" not in result.headers
    assert turn(kit).json["tokens"] == SESSION_LEN - len("<user>hi<assistant>")


def test_a_full_last_turn_ends_the_session() -> None:
    kit = Kit()
    interactive(kit)
    assert turn(kit, "x" * 190, session_id=1).headers["x-session-state"] == "full"
    assert kit.get("/v1/sessions/1").status_code == 404


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "prompt"),
        ({"prompt": None, "messages": None}, "prompt"),
        ({"prompt": "a", "messages": "b"}, "messages"),
        ({"prompt": []}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": [{"role": "nobody", "content": "x"}]}, "prompt[0].role"),
        ({"prompt": "a", "session_id": -2}, "session_id"),
        ({"prompt": "a", "session_id": 1.5}, "session_id"),
        ({"prompt": "a", "session_id": 1 << 63}, "session_id"),
        ({"prompt": "a", "session_id": "1"}, "session_id"),
        ({"prompt": "a", "request_output_len": 0}, "request_output_len"),
        ({"prompt": "", "request_output_len": 0, "interactive_mode": True}, "request_output_len"),
        (
            {"prompt": "a", "request_output_len": 0, "interactive_mode": True, "image_url": "http://x"},
            "image_url",
        ),
        ({"prompt": "a", "request_output_len": -1}, "request_output_len"),
        ({"prompt": "a", "min_new_tokens": 5, "request_output_len": 2}, "min_new_tokens"),
        ({"prompt": "a", "temperature": 3}, "temperature"),
        ({"prompt": "a", "top_k": -2}, "top_k"),
        ({"prompt": "a", "image_url": "http://x"}, "image_url"),
        ({"prompt": "a", "kwargs": {"x": 1}}, "kwargs"),
        ({"prompt": "a", "surprise": 1}, "surprise"),
        ({"cancel": True}, "session_id"),
        ({"prompt": "a", "stop": True}, "session_id"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(body: dict[str, Any], named: str) -> None:
    kit = Kit()
    result = kit.post(PATH, body)
    assert result.status_code == 400, result.text
    assert result.json["error"]["param"] == named
    assert named.partition("[")[0] in result.json["error"]["message"]
    assert not kit.scheduler.submits
    assert interactive(kit, session_id=1)["text"] == "ok", "the refusal left nothing behind"


def test_a_refused_message_is_counted_as_it_was_sent() -> None:
    kit = Kit()
    interactive(kit)
    said = [{"role": "user", "content": "x"}, {"role": "nobody", "content": "x"}]
    result = turn(kit, said, session_id=1)
    assert result.json["error"]["param"] == "prompt[1].role"
    assert result.json["error"]["message"].startswith("prompt[1].role: ")


def test_another_model_is_a_404() -> None:
    assert turn(Kit(), model="other").status_code == 404


def test_a_turn_that_fails_has_not_happened() -> None:
    kit = Kit()
    interactive(kit, "a")
    kit.scheduler.answer = lambda submit: Progress(
        1, (), (Finished(submit.request_no, "failed", detail="broke"),)
    )
    for stream in (False, True):
        result = turn(kit, "b", session_id=1, interactive_mode=True, stream=stream)
        assert "broke" in result.text
    assert messages(kit) == [("user", "a"), ("assistant", "ok")]
    kit.says("fine")
    assert interactive(kit, "c")["text"] == "fine"
    assert kit.prompt() == "<user>a<assistant>ok<user>c<assistant>"


# --- one turn at a time ----------------------------------------------------------------------------------


async def call(
    kit: Kit, body: object, sent: Callable[[Any], Awaitable[None]], headers: dict[str, str] | None = None
) -> None:
    """Runs the application as gunicorn does."""
    raw = json.dumps(body).encode()
    named = [(b"host", b"localhost"), (b"content-length", str(len(raw)).encode())]
    named += [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": PATH, "query_string": b"", "headers": named, "server": ("127.0.0.1", 1),
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": raw, "more_body": False}

    await kit.app(scope, receive, sent)


class Hanging:
    """A frontend in whose session 1 a turn runs that has said "par" and goes no further."""

    def __init__(self, kit: Kit, headers: dict[str, str] | None = None, **fields: Any) -> None:
        self.kit = kit
        self.body = b""
        self._headers = headers
        self._fields = {"prompt": "long", "session_id": 1, "interactive_mode": True, "stream": True, **fields}
        self._said = asyncio.Event()
        self._submits: list[Submit] = []

    async def __aenter__(self) -> "Hanging":
        before = self.kit.scheduler.answer
        self.kit.scheduler.answer = self._begin
        self.task = asyncio.create_task(call(self.kit, self._fields, self._sent, self._headers))
        while not self._submits:
            await asyncio.sleep(0)
            assert not self.task.done(), self.body
            await asyncio.sleep(0.001)
        if self._fields["stream"]:
            await self._said.wait()
        self.kit.scheduler.answer = before
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def leave(self) -> None:
        """The client goes away."""
        await self.__aexit__()

    def finish(self, reason: Any) -> None:
        """The scheduler ends the turn."""
        number = self._submits[0].request_no
        self.kit.scheduler.switchboard.accept(Progress(2, (), (Finished(number, reason),)))

    async def _sent(self, message: Any) -> None:
        self.body += message.get("body", b"")
        if b"par" in self.body:
            self._said.set()

    def _begin(self, submit: Submit) -> None:
        self._submits.append(submit)
        run = TokenRun(submit.request_no, 0, tuple(self.kit.ids("par")))
        asyncio.get_running_loop().call_soon(self.kit.scheduler.switchboard.accept, Progress(1, (run,)))


def pair(tmp_path: Path, **settings: Any) -> tuple[Kit, Kit]:
    """Two frontends of one server."""
    return Kit(data_dir=str(tmp_path), **settings), Kit(data_dir=str(tmp_path), **settings)


async def post(kit: Kit, body: object, method: str = "POST", path: str = PATH, **headers: str) -> Any:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with testing.ASGIConductor(kit.app) as conductor:
        return await conductor.simulate_request(method, path, json=body, headers=named, host="127.0.0.1")


def second(**fields: Any) -> dict[str, Any]:
    return {"prompt": "second", "session_id": 1, "interactive_mode": True, **fields}


@pytest.mark.parametrize("body", [second(), second(interactive_mode=False), second(stream=True)])
def test_a_second_turn_is_refused_on_every_frontend(tmp_path: Path, body: dict[str, Any]) -> None:
    first, other = pair(tmp_path)

    async def scenario() -> None:
        async with Hanging(first) as hanging:
            for kit in (first, other):
                result = await post(kit, body)
                assert result.status_code == 409
                assert result.json["error"]["code"] == "session_busy"
                assert int(result.headers["retry-after"]) >= 1
                assert "cancel" in result.json["error"]["message"]
            ending = second(prompt="", request_output_len=0, interactive_mode=False)
            assert (await post(other, ending)).status_code == 409
            assert (await post(other, None, "DELETE", "/v1/sessions/1")).status_code == 409
            assert (await post(other, {**body, "session_id": 2})).status_code == 200
            hanging.finish("stop")
            await hanging.task
            assert (await post(other, body)).status_code == 200

    asyncio.run(scenario())
    assert other.prompt() == "<user>long<assistant>par<user>second<assistant>"


def test_two_keys_may_both_use_session_1(tmp_path: Path) -> None:
    kit = Kit(data_dir=str(tmp_path))

    async def scenario() -> None:
        store = kit.service.storage.sessions
        ask = store.ask(tenant="other key", session=1, label="x", retryable=False, digest=b"")
        await store.begin(ask)
        assert (await post(kit, second())).status_code == 200

    asyncio.run(scenario())


# --- cancelling ------------------------------------------------------------------------------------------


def answer_aborts(kits: tuple[Kit, ...], hanging: Hanging, asked: list[Abort]) -> None:
    """What the scheduler does for an abort from any frontend."""

    for kit in kits:
        receive = kit.scheduler.receive

        def take(message: Any, scheduler_id: int, kit: Kit = kit, receive: Any = receive) -> bool:
            if not isinstance(message, Abort):
                return bool(receive(message, scheduler_id))
            asked.append(message)
            loop = asyncio.get_running_loop()
            loop.call_soon(kit.scheduler.switchboard.accept, Aborted(message.query_no, 1))
            loop.call_soon(hanging.finish, "aborted")
            return True

        kit.scheduler.switchboard._send = take


@pytest.mark.parametrize(
    "how", [{"cancel": True}, {"stop": True}, {"cancel": True, "prompt": "x", "stream": True}]
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_cancel_reaches_the_other_frontend_and_keeps_the_partial_answer(
    tmp_path: Path, how: dict[str, Any], stream: bool
) -> None:
    first, other = pair(tmp_path)
    asked: list[Abort] = []

    async def scenario() -> None:
        async with Hanging(first, {"X-Request-Id": "the-first"}, stream=stream) as hanging:
            answer_aborts((first, other), hanging, asked)
            result = await post(other, {"session_id": 1, **how})
            assert result.status_code == 200
            assert (result.json["finish_reason"], result.json["tokens"]) == ("stop", 0)
            await hanging.task
            last = json.loads(hanging.body.splitlines()[-1])
            assert (last["finish_reason"], last["tokens"]) == ("cancelled", 3)
            assert last["text"] == ("" if stream else "par")
            assert (await post(other, second())).status_code == 200

    asyncio.run(scenario())
    assert [(abort.label, abort.tenant) for abort in asked] == [("the-first", "")]
    kept = other.get("/v1/sessions/1").json["messages"]
    assert [each.get("mark") for each in kept] == [None, "cancelled", None, None]
    assert kept[1]["content"] == "par"
    assert other.prompt() == "<user>long<assistant>par<user>second<assistant>"


def test_a_cancel_of_nothing_is_fine() -> None:
    kit = Kit()
    result = turn(kit, session_id=9, cancel=True)
    assert (result.status_code, result.json["finish_reason"]) == (200, "stop")
    assert result.json["detail"] == "no answer was running"


# --- clients that leave, and that come again -------------------------------------------------------------


def test_a_stream_that_was_left_keeps_what_was_seen(tmp_path: Path) -> None:
    first, other = pair(tmp_path)

    async def scenario() -> None:
        async with Hanging(first) as hanging:
            await hanging.leave()
        assert (await post(other, second())).status_code == 200

    asyncio.run(scenario())
    assert other.prompt() == "<user>long<assistant>par<user>second<assistant>"
    assert [each.get("mark") for each in other.get("/v1/sessions/1").json["messages"]][1] == "disconnected"
    assert first.scheduler.cancels


@pytest.mark.parametrize("fields", [{"stream": False}, {"interactive_mode": False}])
def test_who_leaves_without_having_seen_anything_leaves_nothing(tmp_path: Path, fields: dict[str, Any]) -> None:
    first, other = pair(tmp_path)
    interactive(first, "before")

    async def scenario() -> None:
        async with Hanging(first, **fields) as hanging:
            await hanging.leave()
        assert (await post(other, second())).status_code == 200

    asyncio.run(scenario())
    assert other.prompt() == "<user>before<assistant>ok<user>second<assistant>"


@pytest.mark.parametrize("session", [1, -1])
@pytest.mark.parametrize("stream", [False, True])
def test_a_retry_gets_the_same_answer_and_is_no_second_turn(tmp_path: Path, session: int, stream: bool) -> None:
    first, other = pair(tmp_path)
    first.says("hello", "never")
    fields = {"session_id": session, "interactive_mode": True}
    answer = turn(first, "a", {"X-Request-Id": "once"}, **fields).json
    again = turn(other, "a", {"X-Request-Id": "once"}, **fields, stream=stream)
    assert (lines(again) if stream else [again.json]) == [answer]
    assert answer["text"] == "hello"
    assert messages(other, answer["session_id"]) == [("user", "a"), ("assistant", "hello")]
    assert not other.scheduler.submits


def test_the_same_id_on_another_body_is_another_turn() -> None:
    kit = Kit()
    headers = {"X-Request-Id": "trace"}
    for prompt in ("a", "b"):
        turn(kit, prompt, headers, session_id=1, interactive_mode=True)
    assert len(messages(kit)) == 4


def test_a_retry_of_a_last_turn_gets_its_answer_though_the_session_is_gone() -> None:
    kit = Kit()
    kit.says("one", "two", "never")
    interactive(kit, "a")
    answers = [turn(kit, "b", {"X-Request-Id": "end"}, session_id=1).json for _ in range(2)]
    assert answers[0] == answers[1]
    assert answers[0]["text"] == "two"


@pytest.mark.parametrize("session", [1, -1])
def test_a_retry_while_the_first_runs_is_refused(tmp_path: Path, session: int) -> None:
    first, other = pair(tmp_path)

    async def scenario() -> None:
        headers = {"X-Request-Id": "once"}
        async with Hanging(first, headers, session_id=session) as hanging:
            body = {"prompt": "long", "session_id": session, "interactive_mode": True}
            result = await post(other, body, X_Request_Id="once")
            assert (result.status_code, result.json["error"]["code"]) == (409, "session_busy")
            hanging.finish("stop")
            await hanging.task
            assert (await post(other, body, X_Request_Id="once")).json["text"] == "par"

    asyncio.run(scenario())
    assert not other.scheduler.submits


def test_a_retry_of_a_stream_that_broke_off_takes_the_partial_answer_back(tmp_path: Path) -> None:
    first, other = pair(tmp_path, template=SPECIAL_TEMPLATE)
    first.says("ok")
    interactive(first, "before")
    other.says("whole", "next")

    async def scenario() -> None:
        async with Hanging(first, {"X-Request-Id": "once"}) as hanging:
            await hanging.leave()
        body = {"prompt": "long", "session_id": 1, "interactive_mode": True}
        result = await post(other, body, X_Request_Id="once")
        assert result.json["text"] == "whole"
        assert result.json["history_tokens"] == len(
            other.ids("<|begin|>user:before<|end|><|begin|>assistant:ok<|end|>")
        )

    asyncio.run(scenario())
    said = [("user", "before"), ("assistant", "ok"), ("user", "long"), ("assistant", "whole")]
    assert messages(other) == said
    assert other.get("/v1/sessions/1").json["turns"] == 2
    assert other.get("/v1/sessions/1").json["generated_tokens"] == 3 + 6


# --- the store fails -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_store_that_cannot_write_is_a_503_and_keeps_no_half_turn(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = Kit()
    interactive(kit, "a")

    def full(connection: Any, _ending: Any) -> None:
        connection.execute(
            "INSERT INTO messages (tenant, session, ordinal, turn, entry) VALUES ('', 1, 9, 9, '')"
        )
        connection.execute("PRAGMA max_page_count = 1")
        connection.execute("CREATE TABLE big AS SELECT randomblob(1000000)")

    with monkeypatch.context() as patch:
        patch.setattr("shoal.storage.sessions.end", full)
        result = turn(kit, "b", session_id=1, interactive_mode=True, stream=stream)
    assert "store" in result.text
    assert result.status_code == (200 if stream else 503)
    last = json.loads(result.text.splitlines()[-1])
    assert last["error"]["code"] == "store_failed"
    assert messages(kit) == [("user", "a"), ("assistant", "ok")]
    assert interactive(kit, "c")["text"] == "ok", "the lease was given back"


def test_a_turn_whose_lease_was_taken_over_is_not_recorded(tmp_path: Path) -> None:
    """Its frontend hung for longer than a lease lives."""
    first, other = pair(tmp_path)

    async def scenario() -> None:
        async with Hanging(first) as hanging:
            await first.service.storage.sessions._database.run(
                lambda connection: connection.execute("UPDATE leases SET expires = 0")
            )
            assert (await post(other, second())).status_code == 200
            hanging.finish("stop")
            await hanging.task
            assert json.loads(hanging.body.splitlines()[-1])["error"]["code"] == "session_lost"

    asyncio.run(scenario())
    assert messages(other) == [("user", "second"), ("assistant", "ok")]


def test_structs_of_the_answer_are_stable() -> None:
    """The wire format of 2023, and what came later."""
    answer = interactive(Kit())
    assert list(answer)[:5] == ["text", "tokens", "input_tokens", "history_tokens", "finish_reason"]
    assert set(answer) == {
        "text", "tokens", "input_tokens", "history_tokens", "finish_reason", "session_id", "cached_tokens",
    }  # fmt: skip


def test_thinking_is_told_apart_and_kept() -> None:
    kit = Kit(template="{# <think></think> #}" + SPECIAL_TEMPLATE)
    kit.says("<think>hm</think>yes", "<think>so</think>no")
    answer = interactive(kit, "a")
    assert (answer["text"], answer["reasoning_content"]) == ("yes", "hm")
    kept = kit.get("/v1/sessions/1").json["messages"][1]
    assert (kept["content"], kept["reasoning_content"]) == ("yes", "hm")
    result = turn(kit, "b", session_id=1, interactive_mode=True, stream=True)
    pieces = lines(result)
    assert "".join(piece["text"] for piece in pieces) == "no"
    assert "".join(piece.get("reasoning_content", "") for piece in pieces) == "so"
    assert kit.prompt().startswith("<|begin|>user:a<|end|><|begin|>assistant:yes<|end|>")
    assert pieces[0]["history_tokens"] == len(kit.ids("<|begin|>user:a<|end|><|begin|>assistant:"))
