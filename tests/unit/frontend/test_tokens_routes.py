"""/v1/encode, /tokenize, /detokenize and /apply_template: the same ids and texts as the routes that generate use."""

from typing import Any

import pytest
from frontend_kit import EOS, SESSION_LEN, Kit, limits

from shoal.messages import Availability
from shoal.wire import unpack_ids


def rendered(text: str) -> str:
    return f"<user>{text}<assistant>"


def test_encode_gives_ids_and_their_number() -> None:
    client = Kit(bos=True)
    assert client.post("/v1/encode", {"input": "hé"}).json == {
        "input_ids": [257, *client.ids("hé")],
        "length": 4,
    }
    assert client.post("/v1/encode", {"input": "hé", "add_bos": False}).json["input_ids"] == client.ids("hé")


def test_encode_gives_lists_for_a_list() -> None:
    client = Kit()
    result = client.post("/v1/encode", {"input": ["hi", ""], "do_preprocess": None, "add_bos": None})
    assert result.json == {"input_ids": [client.ids("hi"), []], "length": [2, 0]}
    assert client.post("/v1/encode", {"input": []}).json == {"input_ids": [], "length": []}


def test_encode_through_the_template_gives_what_a_chat_would_submit() -> None:
    client = Kit(bos=True)
    client.chat("hi")
    submitted = unpack_ids(client.scheduler.submits[0].prompt)
    result = client.post("/v1/encode", {"input": ["hi"], "do_preprocess": True})
    assert result.json == {"input_ids": [submitted], "length": [len(submitted)]}


def test_tokenize_a_prompt() -> None:
    client = Kit(bos=True)
    result = client.post("/tokenize", {"prompt": "hi", "return_token_strs": True, "model": "served/model"})
    ids = client.ids("hi")
    assert result.json == {
        "tokens": [257, *ids],
        "count": 3,
        "max_model_len": SESSION_LEN,
        "token_strs": ["<|begin|>", "h", "i"],
    }
    bare = client.post("/tokenize", {"prompt": "hi", "add_special_tokens": False}).json
    assert (bare["tokens"], bare["token_strs"]) == (ids, None)


def test_tokenize_several_prompts() -> None:
    client = Kit()
    result = client.post("/tokenize", {"prompt": ["hi", "a"], "return_token_strs": True})
    assert result.json["tokens"] == [client.ids("hi"), client.ids("a")]
    assert result.json["count"] == [2, 1]
    assert result.json["token_strs"] == [["h", "i"], ["a"]]


def test_tokenize_a_conversation_gives_what_a_chat_would_submit() -> None:
    client = Kit(bos=True)
    client.chat("hi")
    submitted = unpack_ids(client.scheduler.submits[0].prompt)
    messages = [{"role": "user", "content": "hi"}]
    assert client.post("/tokenize", {"messages": messages}).json["tokens"] == submitted
    special = client.post("/tokenize", {"messages": messages, "add_special_tokens": True})
    assert special.json["tokens"] == [257, *submitted]
    open_end = client.post("/tokenize", {"messages": messages, "add_generation_prompt": False})
    assert client.tokenizer.decode(open_end.json["tokens"]) == "<user>hi"


def test_tokenize_needs_no_model_that_is_ready() -> None:
    client = Kit()
    client.scheduler.switchboard.accept(Availability(False, None))
    assert client.post("/tokenize", {"prompt": "hi"}).json["count"] == 2


def test_detokenize_gives_the_text_under_both_names() -> None:
    client = Kit()
    ids = [*client.ids("hé"), EOS]
    assert client.post("/detokenize", {"tokens": ids}).json == {"prompt": "hé<|end|>", "text": "hé<|end|>"}
    assert client.post("/detokenize", {"tokens": ids, "skip_special_tokens": True}).json["prompt"] == "hé"
    assert client.post("/detokenize", {"tokens": [[72.0], []]}).json["prompt"] == [
        client.tokenizer.decode([72]),
        "",
    ]
    assert client.post("/detokenize", {"tokens": []}).json["prompt"] == ""


def test_apply_template_gives_the_text_that_the_model_reads() -> None:
    client = Kit()
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert client.post("/apply_template", {"messages": messages}).json == {"prompt": rendered("hi")}
    other = client.post(
        "/apply_template", {"messages": messages, "chat_template": "{{ messages[0].content }}!"}
    )
    assert other.json == {"prompt": "hi!"}
    body = {
        "messages": [*messages, {"role": "assistant", "content": "we"}],
        "continue_final_message": True,
    }
    assert client.post("/apply_template", body).json == {"prompt": "<user>hi<assistant>we"}
    body = {
        "messages": messages,
        "chat_template": "{{ mood }}{{ messages[0].content }}",
        "chat_template_kwargs": {"mood": "so "},
    }
    assert client.post("/apply_template", body).json == {"prompt": "so hi"}


@pytest.mark.parametrize(("path", "field"), [("/apply_template", "prompt"), ("/tokenize", "count")])
def test_the_prompt_with_tools_is_that_of_the_chat_route(path: str, field: str) -> None:
    client = Kit()
    client.scheduler.switchboard.accept(Availability(True, limits(4000)))
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": [tool]}
    answer = client.post(path, body).json[field]
    client.post("/v1/chat/completions", body)
    prompt = client.prompt()
    assert "get_weather" in prompt
    assert answer == (prompt if field == "prompt" else len(client.scheduler.submits[-1].prompt) // 4)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/encode", {"input": 3}, "input"),
        ("/v1/encode", {"input": "a", "surprise": 1}, "surprise"),
        ("/v1/encode", {}, "input"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "nobody", "content": "a"}]}, "messages[0].role"),
        ("/tokenize", {"prompt": "a", "mm_processor_kwargs": {"a": 1}}, "mm_processor_kwargs"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1, 258]}, "tokens[1]"),
        ("/detokenize", {"tokens": [[1], [1.5]]}, "tokens[1][0]"),
        ("/detokenize", {"tokens": [[1], 2]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/apply_template", {}, "messages"),
        (
            "/apply_template",
            {"messages": [{"role": "user", "content": "a"}], "chat_template": "{{"},
            "chat_template",
        ),
        (
            "/apply_template",
            {"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f"}]},
            "tools[0].name",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(path: str, body: dict[str, Any], param: str) -> None:
    result = Kit().post(path, body)
    assert (result.status_code, result.json["error"]["param"]) == (400, param)


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/apply_template"])
def test_a_model_that_is_not_served_is_not_found(path: str) -> None:
    body = {"model": "other", **({"tokens": [1]} if path == "/detokenize" else {})}
    assert Kit().post(path, body).status_code == 404
