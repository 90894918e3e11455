"""What the client sends and what it yields, with a scripted server."""

import io
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from client_kit import Answer, Asked, ScriptedServer, ndjson, said, scripted_server, sse

from shoal.client import (
    APIClient,
    NotFoundError,
    SessionFullWarning,
    get_model_list,
    get_streaming_response,
    input_prompt,
)

CHUNKS = [
    {"id": "cmpl-1", "choices": [{"index": 0, "text": "Hel", "finish_reason": None}]},
    {"id": "cmpl-1", "choices": [{"index": 0, "text": "lo", "finish_reason": "stop"}]},
]


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as scripted:
        yield scripted


@pytest.fixture
def api(server: ScriptedServer) -> Iterator[APIClient]:
    with APIClient(server.url, max_retries=0, timeout=20) as client:
        yield client


def test_models_are_asked_for_once(server: ScriptedServer, api: APIClient) -> None:
    server.answers = [Answer(json={"object": "list", "data": [{"id": "a/b"}, {"id": "c"}]})]
    assert api.available_models == ["a/b", "c"]
    assert api.available_models[0] == "a/b"
    assert [asked.path for asked in server.asked] == ["/v1/models"]


def test_a_completion_is_one_object(server: ScriptedServer, api: APIClient) -> None:
    whole = {"choices": [{"index": 0, "text": "Hello", "finish_reason": "stop"}]}
    server.answers = [Answer(json=whole)]
    assert list(api.completions_v1(model="m", prompt="hi")) == [whole]
    asked = server.asked[0]
    assert (asked.method, asked.path) == ("POST", "/v1/completions")
    assert asked.body == {
        "model": "m",
        "prompt": "hi",
        "temperature": 0.7,
        "n": 1,
        "max_tokens": 16,
        "stream": False,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "ignore_eos": False,
    }


@pytest.mark.parametrize("chunked", [True, False])
def test_a_streamed_completion_ends_cleanly(server: ScriptedServer, api: APIClient, chunked: bool) -> None:
    server.answers = [Answer(pieces=[b": still here\n\n", *sse(*CHUNKS)], chunked=chunked)]
    assert list(api.completions_v1("m", "hi", stream=True)) == CHUNKS


def test_events_cut_anywhere_are_put_together(server: ScriptedServer, api: APIClient) -> None:
    event = {"choices": [{"delta": {"content": "naïve \u2028 \x85 text"}, "finish_reason": "stop"}]}
    body = b"".join([f"event: x\r\nid: 1\r\ndata:{ndjson(event)[0].decode()}\r\n".encode(), *sse()])
    for cut in range(1, len(body), 7):
        server.answers = [Answer(pieces=[body[:cut], body[cut:]])]
        assert list(api.chat_completions_v1("m", "raw", stream=True)) == [event]


def test_chunks_are_yielded_as_they_come(server: ScriptedServer, api: APIClient) -> None:
    first_is_here = threading.Event()
    in_time: list[bool] = []
    first, *rest = sse(*CHUNKS)
    server.answers = [Answer(pieces=[first, lambda: in_time.append(first_is_here.wait(10)), *rest])]
    answer = api.chat_completions_v1("m", [], stream=True)
    seen = [next(answer)]
    first_is_here.set()
    seen += answer
    assert in_time == [True]
    assert seen == CHUNKS


def test_leaving_the_loop_ends_the_connection(server: ScriptedServer, api: APIClient) -> None:
    many = sse(*CHUNKS[:1] * 100_000)
    server.answers = [Answer(pieces=many)]
    answer = api.chat_completions_v1("m", [], stream=True)
    next(answer)
    answer.close()
    assert server.gone.wait(10)


def test_further_keywords_are_fields(server: ScriptedServer, api: APIClient) -> None:
    server.always = lambda asked: Answer(json={"text": "", "choices": []})
    list(
        api.chat_completions_v1("m", [{"role": "user", "content": "hi"}], seed=3, top_k=1, guided_choice=["a"])
    )
    list(api.chat_interactive_v1("hi", min_p=0.1))
    list(api.completions_v1("m", "p", stop=["\n"], session_id=4))
    chat, interactive, completion = (asked.body for asked in server.asked)
    assert chat["seed"] == 3
    assert chat["top_k"] == 1
    assert chat["guided_choice"] == ["a"]
    assert interactive["min_p"] == 0.1
    assert completion["stop"] == ["\n"]
    assert completion["session_id"] == 4
    assert not any("kwargs" in body or "self" in body for body in (chat, interactive, completion))


def test_what_asks_for_nothing_is_not_sent(server: ScriptedServer, api: APIClient) -> None:
    server.always = lambda asked: Answer(json={})
    list(api.chat_completions_v1("m", "raw"))
    list(api.chat_interactive_v1("hi", stop=True, session_id=7))
    assert not {"stop", "user", "session_id"} & server.asked[0].body.keys()
    assert server.asked[1].body["stop"] is True
    assert server.asked[1].body["session_id"] == 7


def test_chat_yields_triples(server: ScriptedServer, api: APIClient) -> None:
    server.answers = [Answer(pieces=ndjson(said("Hé", 1), said("y", 2), said("", 2, "stop")))]
    assert list(api.chat("hi", session_id=3, stream=True)) == [("Hé", 1, None), ("y", 2, None), ("", 2, "stop")]
    body = server.asked[0].body
    assert body["interactive_mode"] is True
    assert body["session_id"] == 3
    assert body["request_output_len"] == 512
    server.answers = [Answer(json=said("Hey", 2, "stop"))]
    assert list(api.chat("hi", 3)) == [("Hey", 2, "stop")]


def test_chat_needs_a_session(api: APIClient) -> None:
    with pytest.raises(ValueError, match="session_id"):
        list(api.chat("hi", session_id=-1))


def test_a_full_session_warns_and_a_reached_limit_does_not(server: ScriptedServer, api: APIClient) -> None:
    server.answers = [Answer(json=said("", 0, "length")), Answer(json=said("long", 9, "length"))]
    with pytest.warns(SessionFullWarning, match="session 3"):
        assert list(api.chat("hi", 3)) == [("", 0, "length")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(api.chat("hi", 3)) == [("long", 9, "length")]


def test_ending_and_cancelling_a_session(server: ScriptedServer, api: APIClient) -> None:
    server.always = lambda asked: Answer(json=said("", 0, "stop"))
    api.end_session(5)
    api.cancel(5)
    end, cancel = (asked.body for asked in server.asked)
    assert (end["prompt"], end["session_id"], end["request_output_len"], end["interactive_mode"]) == (
        "",
        5,
        0,
        False,
    )
    assert (cancel["session_id"], cancel["cancel"], cancel["interactive_mode"]) == (5, True, True)


def test_encode(server: ScriptedServer, api: APIClient) -> None:
    server.answers = [Answer(json={"input_ids": [[1, 2], [3]], "length": [2, 1]})]
    assert api.encode(["a", "b"], add_bos=False) == ([[1, 2], [3]], [2, 1])
    assert server.asked[0].body == {"input": ["a", "b"], "do_preprocess": False, "add_bos": False}


def test_health(server: ScriptedServer, api: APIClient) -> None:
    server.answers = [
        Answer(json={}),
        Answer(json={}, status=503),
        Answer(hang_up=True),
        Answer(json={}, status=503),
    ]
    assert [api.health_check(), api.health_check(), api.health_check(), api.is_ready()] == [
        True,
        False,
        False,
        False,
    ]


def test_sessions(server: ScriptedServer, api: APIClient) -> None:
    gone = {
        "error": {"message": "there is no session 9", "type": "not_found_error", "param": None, "code": None}
    }
    server.answers = [
        Answer(json={"object": "list", "data": [{"id": 3}]}),
        Answer(json={"id": 3, "messages": []}),
        Answer(json=gone, status=404),
    ]
    assert api.sessions() == [{"id": 3}]
    assert api.session(3)["messages"] == []
    with pytest.raises(NotFoundError, match="no session 9"):
        api.session(9)


def test_the_key_goes_with_every_call(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    server.always = lambda asked: Answer(json={"data": []})
    with APIClient(server.url, api_key="secret") as with_key, APIClient(server.url) as without:
        with_key.sessions()
        without.sessions()
    assert [asked.headers.get("Authorization") for asked in server.asked] == ["Bearer secret", None]


def test_an_argument_that_does_nothing_says_so() -> None:
    with pytest.warns(UserWarning, match="no argument 'tp'"):
        APIClient("http://127.0.0.1:1", tp=1).close()


@pytest.mark.parametrize(
    "url", ["127.0.0.1:5", "http://0.0.0.0:5/", "http://127.0.0.1:5/v1", " http://127.0.0.1:5"]
)
def test_addresses_as_people_write_them(url: str) -> None:
    with APIClient(url) as api:
        assert api.models_v1_url == "http://127.0.0.1:5/v1/models"


@pytest.mark.parametrize("url", ["", "ftp://host", "http://"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(ValueError, match="no address of a server"):
        APIClient(url)


def test_the_functions_beside_the_class(server: ScriptedServer) -> None:
    server.answers = [
        Answer(json={"data": [{"id": "m"}]}),
        Answer(pieces=ndjson(said("a", 1), said("", 1, "stop"))),
        Answer(json=said("a", 1, "stop")),
    ]
    assert get_model_list(f"{server.url}/v1/models", headers={"Authorization": "Bearer k"}) == ["m"]
    url = f"{server.url}/v1/chat/interactive"
    assert list(get_streaming_response("hi", url, 3)) == [("a", 1, None), ("", 1, "stop")]
    assert list(get_streaming_response("hi", url, 3, stream=False, api_key="k")) == [("a", 1, "stop")]
    assert server.asked[0].headers["Authorization"] == "Bearer k"
    assert server.asked[1].body == {
        "prompt": "hi",
        "stream": True,
        "session_id": 3,
        "request_output_len": 512,
        "interactive_mode": False,
        "ignore_eos": False,
        "stop": False,
    }
    with pytest.raises(ValueError, match="/v1/models"):
        get_model_list(server.url)


def test_input_prompt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n\nrest\n"))
    assert input_prompt() == "one\ntwo"
    assert capsys.readouterr().out == "\ndouble enter to end input >>> "


def test_a_server_below_a_prefix(server: ScriptedServer) -> None:
    def answer(asked: Asked) -> Answer:
        assert asked.path == "/llm/v1/models"
        return Answer(json={"data": [{"id": "m"}]})

    server.always = answer
    with APIClient(f"{server.url}/llm/v1/") as api:
        assert api.available_models == ["m"]
    assert get_model_list(f"{server.url}/llm/v1/models") == ["m"]
