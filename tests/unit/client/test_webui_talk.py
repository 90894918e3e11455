"""What the page asks and what it shows, without gradio."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from client_kit import Answer, ScriptedServer, scripted_server, sse

from shoal.client import APIClient, BadRequestError
from shoal.client.webui.talk import Reply, Wishes, messages, reply

WISHES = Wishes("m", " Be brief. ", 0.5, 0.9, 40, 100, 1.0, "")


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as scripted:
        yield scripted


def test_a_request_and_its_answer(server: ScriptedServer) -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}
    server.answers = [
        Answer(
            pieces=sse(
                {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
                {"choices": [{"delta": {"reasoning_content": "Hm."}, "finish_reason": None}]},
                {"choices": [{"delta": {"content": "Yes"}, "finish_reason": None}]},
                {"choices": [{"delta": {}, "finish_reason": "length"}]},
                {"choices": [], "usage": usage},
            )
        )
    ]
    with APIClient(server.url) as client:
        last = list(reply(client, WISHES, [], "Is it?"))[-1]
    assert (last.text, last.reasoning, last.finish_reason) == ("Yes", "Hm.", "length")
    assert last.summary().startswith("9 tokens in (4 cached), 3 out · first after ")
    assert last.summary().endswith("cut at the longest answer")
    body = server.asked[0].body
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Is it?"},
    ]
    assert (body["model"], body["temperature"], body["top_k"], body["max_tokens"]) == ("m", 0.5, 40, 100)
    assert body["stream_options"] == {"include_usage": True}
    assert "seed" not in body


def test_fields_of_the_page(server: ScriptedServer) -> None:
    server.always = lambda asked: Answer(json={"error": {"message": "no"}}, status=400)
    with APIClient(server.url) as client:
        with pytest.raises(BadRequestError):
            list(reply(client, replace(WISHES, seed=" 7 ", max_tokens=0), [], "Hi"))
        with pytest.raises(ValueError, match="Seed: 'x' is no whole number"):
            list(reply(client, replace(WISHES, seed="x"), [], "Hi"))
    assert server.asked[0].body["seed"] == 7
    assert "max_tokens" not in server.asked[0].body


def test_what_goes_back_to_the_model() -> None:
    history = [
        {"role": "user", "content": [{"type": "text", "text": "Hello"}], "metadata": None},
        {"role": "assistant", "content": "Hm.", "metadata": {"title": "Reasoning"}},
        {"role": "assistant", "content": ["Hi ", {"type": "text", "text": "you"}], "metadata": {}},
    ]
    assert messages("", history, "And?") == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi you"},
        {"role": "user", "content": "And?"},
    ]


def test_an_answer_of_which_nothing_is_known() -> None:
    assert Reply().summary() == ""
