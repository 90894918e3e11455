"""/generate in LMDeploy's form, in SGLang's, and in that of 2023, which is a turn of /v1/chat/interactive."""

import json
from itertools import pairwise
from typing import Any

import pytest
from frontend_kit import EOS, Kit, events

from shoal.frontend.native import is_of_2023
from shoal.wire import unpack_ids


def test_lmdeploys_form() -> None:
    client = Kit()
    client.says("hé")
    result = client.post(
        "/generate",
        {
            "prompt": "ab",
            "max_tokens": 9,
            "temperature": 0,
            "return_logprob": True,
            "session_id": -1,
            "stop": None,
        },
    )
    ids = [*client.ids("hé"), EOS]
    assert (result.json["text"], result.json["output_ids"]) == ("hé", ids)
    meta = result.json["meta_info"]
    assert meta["finish_reason"] == {"type": "stop"}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (2, 4, 0)
    assert meta["output_token_logprobs"] == [[-0.25, token] for token in ids]
    (submit,) = client.scheduler.submits
    assert (submit.max_tokens, submit.sampling.temperature) == (9, 0)


def test_sglangs_form() -> None:
    client = Kit()
    client.says("abcdef")
    result = client.post(
        "/generate",
        {
            "text": "xyz",
            "sampling_params": {"max_new_tokens": 8, "stop": "d", "sampling_seed": 5, "min_new_tokens": 0},
            "return_logprob": True,
            "return_text_in_logprobs": True,
            "rid": "mine",
        },
    )
    assert result.json["text"] == "abc"
    meta = result.json["meta_info"]
    assert meta["id"] == "mine" == client.scheduler.submits[0].label
    assert meta["finish_reason"] == {"type": "stop", "matched": "d"}
    first = client.ids("a")[0]
    assert meta["output_token_logprobs"][0] == [-0.25, first, "a"]
    assert client.scheduler.submits[0].sampling.seed == 5


def test_defaults_are_128_tokens_and_no_template() -> None:
    client = Kit()
    client.post("/generate", {"text": "hi"})
    (submit,) = client.scheduler.submits
    assert submit.max_tokens == 128
    assert client.prompt() == "hi"


def test_token_ids_are_taken_as_they_are() -> None:
    client = Kit(bos=True)
    client.post("/generate", {"input_ids": [71, 72.0]})
    assert unpack_ids(client.scheduler.submits[0].prompt) == [71, 72]


@pytest.mark.parametrize(
    "body",
    [
        {"text": ["a", "b"], "sampling_params": {"n": 2}},
        {"input_ids": [[70], [71]], "sampling_params": {"n": 2}},
    ],
)
def test_several_prompts_and_answers_are_a_list(body: dict[str, Any]) -> None:
    client = Kit()
    client.says("1", "2", "3", "4")
    result = client.post("/generate", body)
    assert [answer["text"] for answer in result.json] == ["1", "2", "3", "4"]
    assert [answer["index"] for answer in result.json] == [0, 1, 2, 3]


def test_a_list_of_one_prompt_is_answered_by_a_list() -> None:
    assert isinstance(Kit().post("/generate", {"text": ["a"]}).json, list)


def test_the_prompts_log_probabilities_begin_where_they_are_wanted() -> None:
    client = Kit()
    body = {"text": "abcd", "return_logprob": True, "top_logprobs_num": 2}
    ids = client.ids("abcd")
    whole = client.post("/generate", {**body, "logprob_start_len": 0}).json["meta_info"]
    assert whole["input_token_logprobs"] == [[None, ids[0], None], *([-0.25, token, None] for token in ids[1:])]
    assert whole["input_top_logprobs"][:2] == [[], [[-0.25, ids[1], None], [-1.25, ids[1] + 1, None]]]
    part = client.post("/generate", {**body, "logprob_start_len": 2}).json["meta_info"]
    assert [token for _, token, _ in part["input_token_logprobs"]] == ids[2:]
    none = client.post("/generate", body).json["meta_info"]
    assert "input_token_logprobs" not in none
    assert client.scheduler.submits[-1].prompt_logprobs == -1


def test_lmdeploys_stream_holds_what_is_new() -> None:
    client = Kit()
    client.says("hé!")
    chunks = events(client.post("/generate", {"prompt": "a", "stream": True, "return_logprob": True}))
    assert chunks.pop() == "[DONE]"
    assert "".join(chunk["text"] for chunk in chunks) == "hé!"
    ids = [token for chunk in chunks for token in chunk["output_ids"]]
    assert ids == [*client.ids("hé!"), EOS]
    assert [score[1] for chunk in chunks for score in chunk["meta_info"]["output_token_logprobs"]] == ids
    assert [chunk["meta_info"]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["meta_info"]["finish_reason"] == {"type": "stop"}
    assert chunks[-1]["meta_info"]["completion_tokens"] == 5


def test_sglangs_stream_holds_all_there_is() -> None:
    client = Kit()
    client.says("hey", end=False)
    chunks = events(client.post("/generate", {"text": "a", "stream": True}))[:-1]
    texts = [chunk["text"] for chunk in chunks]
    assert texts[-1] == "hey"
    assert all(after.startswith(before) for before, after in pairwise(texts))
    assert chunks[-1]["output_ids"] == client.ids("hey")
    assert chunks[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 3}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "text": "b"}, "prompt"),
        ({"text": "a", "input_ids": [1]}, "text"),
        ({"prompt": ""}, "prompt"),
        ({"text": ["a", ""]}, "text[1]"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [[1], 2]}, "input_ids"),
        ({"input_ids": [999]}, "input_ids"),
        ({"text": "a", "sampling_params": {}, "temperature": 1}, "temperature"),
        ({"text": "a", "sampling_params": {"regex": "a+"}}, "sampling_params.regex"),
        ({"text": "a", "sampling_params": {"surprise": 1}}, "sampling_params.surprise"),
        ({"prompt": "a", "image_data": "x"}, "image_data"),
        ({"prompt": "a", "temperature": 3}, "temperature"),
        ({"prompt": "a", "top_logprobs_num": 21, "return_logprob": True}, "top_logprobs_num"),
        ({"prompt": "a", "stream": True, "return_logprob": True, "logprob_start_len": 0}, "logprob_start_len"),
        ({"prompt": "a", "rid": "a b"}, "rid"),
        ({"prompt": "a", "surprise": 1}, "surprise"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    client = Kit()
    result = client.post("/generate", body)
    assert (result.status_code, result.json["error"]["param"]) == (400, param)
    assert not client.scheduler.submits


def test_a_model_that_is_not_served_is_not_found() -> None:
    assert Kit().post("/generate", {"prompt": "a", "model": "other"}).status_code == 404


def test_a_body_of_2023_is_a_turn_of_the_interactive_route() -> None:
    client = Kit()
    client.says("yes")
    body = {
        "prompt": "hi", "session_id": -1, "interactive_mode": False, "stream": False, "stop": False,
        "request_output_len": 512, "top_p": 0.8, "top_k": 40, "temperature": 0.8, "repetition_penalty": 1.0,
        "ignore_eos": False,
    }  # fmt: skip
    result = client.post("/generate", {**body, "request_output_len": 64})
    assert result.json["text"] == "yes"
    assert result.json["tokens"] == 4
    assert client.prompt() == "<user>hi<assistant>"


@pytest.mark.parametrize(
    ("body", "old"),
    [
        ({"prompt": "a"}, False),
        ({"prompt": "a", "stop": "x", "session_id": 3}, False),
        ({"prompt": "a", "stop": False}, True),
        ({"prompt": "a", "request_output_len": 4}, True),
        ({"prompt": "a", "interactive_mode": None}, True),
        ({"session_id": 1, "cancel": True}, True),
        ({"prompt": [{"role": "user", "content": "a"}]}, True),
        ({"text": "a"}, False),
    ],
)
def test_what_tells_a_body_of_2023(body: dict[str, Any], old: bool) -> None:
    assert is_of_2023(json.dumps(body).encode()) is old


def test_broken_bodies_are_malformed_json() -> None:
    for raw in (b"", b"{", b"\xff", b"[" * 100_000, b"3"):
        assert Kit().request("POST", "/generate", raw).status_code in (400, 408)
