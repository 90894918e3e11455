"""/v1/embeddings, /pooling and /get_ppl: what is submitted, what is answered, what is refused."""

import base64
import math
from typing import Any

import numpy as np
import pytest
from falcon import testing
from frontend_kit import SESSION_LEN, Kit, pooled_values

from shoal.frontend import checks
from shoal.messages import Finished, Progress
from shoal.wire import unpack_ids


def kit(**settings: Any) -> Kit:
    return Kit(task="embed", **settings)


def unit(values: list[float]) -> list[float]:
    length = math.hypot(*values)
    return [value / length for value in values]


def refusal(result: testing.Result) -> tuple[int, Any, Any]:
    error = result.json["error"]
    return result.status_code, error["param"], error["code"]


def test_a_text_becomes_one_normalised_vector() -> None:
    client = kit()
    result = client.post("/v1/embeddings", {"input": "hé", "model": "served/model", "user": "u"})
    assert result.status_code == 200
    (entry,) = result.json["data"]
    ids = client.ids("hé")
    assert entry["embedding"] == pytest.approx(unit(pooled_values(ids, "mean")))
    assert (entry["index"], entry["object"]) == (0, "embedding")
    assert result.json["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    assert (result.json["object"], result.json["model"]) == ("list", "served/model")
    (submit,) = client.scheduler.submits
    assert (submit.pooling, submit.prompt_logprobs, submit.max_tokens) == ("mean", -1, 1)


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        (["hi", "you"], None),
        ([[71, 72], [5]], [[71, 72], [5]]),
        ([71.0, 72], [[71, 72]]),
        (["hi"], None),
    ],
)
def test_every_form_of_input_gives_its_vectors_in_order(given: Any, prompts: list[list[int]] | None) -> None:
    client = kit()
    result = client.post("/v1/embeddings", {"input": given})
    expected = prompts or [client.ids(text) for text in given]
    assert [unpack_ids(submit.prompt) for submit in client.scheduler.submits] == expected
    assert [entry["index"] for entry in result.json["data"]] == list(range(len(expected)))
    for entry, ids in zip(result.json["data"], expected, strict=True):
        assert entry["embedding"] == pytest.approx(unit(pooled_values(ids, "mean")))
    assert result.json["usage"]["total_tokens"] == sum(map(len, expected))


def test_special_tokens_surround_a_text_unless_told_otherwise() -> None:
    client = Kit(bos=True, task="embed")
    client.post("/v1/embeddings", {"input": "a"})
    client.post("/v1/embeddings", {"input": "a", "add_special_tokens": False})
    assert [len(unpack_ids(submit.prompt)) for submit in client.scheduler.submits] == [2, 1]


def test_base64_holds_little_endian_floats() -> None:
    client = kit()
    result = client.post("/v1/embeddings", {"input": "hi", "encoding_format": "base64"})
    raw = base64.b64decode(result.json["data"][0]["embedding"])
    assert np.frombuffer(raw, "<f4").tolist() == pytest.approx(unit(pooled_values(client.ids("hi"), "mean")))


def test_dimensions_keep_the_leading_numbers_and_normalise_them_anew() -> None:
    client = kit()
    result = client.post("/v1/embeddings", {"input": "hi", "dimensions": 2})
    assert result.json["data"][0]["embedding"] == pytest.approx(
        unit(pooled_values(client.ids("hi"), "mean")[:2])
    )
    assert refusal(client.post("/v1/embeddings", {"input": "hi", "dimensions": 4}))[:2] == (400, "dimensions")
    assert refusal(client.post("/v1/embeddings", {"input": "hi", "dimensions": 0}))[:2] == (400, "dimensions")


def test_pooling_is_the_models_own_unless_the_request_names_one() -> None:
    client = kit(pooling="last")
    client.post("/v1/embeddings", {"input": "hi"})
    raw = client.post("/v1/embeddings", {"input": "hi", "pooling": "mean", "normalize": False})
    assert [submit.pooling for submit in client.scheduler.submits] == ["last", "mean"]
    assert raw.json["data"][0]["embedding"] == pooled_values(client.ids("hi"), "mean")


def test_pooling_route_has_its_own_form() -> None:
    client = kit()
    result = client.post("/pooling", {"input": ["hi", "a"], "task": "embed", "use_activation": False})
    assert result.json["id"].startswith("pool-")
    assert [(entry["object"], entry["index"]) for entry in result.json["data"]] == [
        ("pooling", 0),
        ("pooling", 1),
    ]
    assert result.json["data"][0]["data"] == pooled_values(client.ids("hi"), "mean")
    clash = client.post("/pooling", {"input": "a", "use_activation": True, "normalize": False})
    assert refusal(clash)[:2] == (400, "use_activation")


def test_more_inputs_than_one_request_may_have_open_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "MOST_SEQUENCES", 3)
    client = kit()
    result = client.post("/v1/embeddings", {"input": [[n] for n in range(1, 9)]})
    assert [entry["index"] for entry in result.json["data"]] == list(range(8))
    for number, entry in enumerate(result.json["data"], 1):
        assert entry["embedding"] == pytest.approx(unit(pooled_values([number], "mean")))


def test_priority_and_timeout_reach_the_scheduler() -> None:
    client = kit()
    client.post("/v1/embeddings", {"input": "hi", "priority": 4, "timeout": 60})
    (submit,) = client.scheduler.submits
    assert submit.priority == 4
    assert submit.deadline_ns > 0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": [[]]}, "input[0]"),
        ({"input": ["a", 3]}, "input"),
        ({"input": [3, [4]]}, "input"),
        ({"input": [99999]}, "input"),
        ({"input": [1.5]}, "input"),
        ({"input": "a" * (SESSION_LEN + 1)}, "input"),
        ({"input": [[1]] * 2049}, "input"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "pooling": "cls"}, "pooling"),
        ({"input": "a", "timeout": 0}, "timeout"),
        ({"input": "a", "surprise": 1}, "surprise"),
        ({}, "input"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    client = kit()
    result = client.post("/v1/embeddings", body)
    assert refusal(result)[:2] == (400, param)
    assert not client.scheduler.submits


def test_a_text_as_long_as_the_context_is_taken() -> None:
    assert kit().post("/v1/embeddings", {"input": "a" * SESSION_LEN}).status_code == 200


def test_a_server_that_generates_says_which_flag_gives_vectors() -> None:
    for path in ("/v1/embeddings", "/pooling"):
        result = Kit().post(path, {"input": "a"})
        assert refusal(result) == (400, "model", "wrong_task")
        assert "--task embed" in result.json["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/completions", {"prompt": "a"}),
        ("/generate", {"prompt": "a"}),
        ("/get_ppl", {"input": "ab"}),
    ],
)
def test_a_server_of_vectors_generates_nothing_and_says_so(path: str, body: dict[str, Any]) -> None:
    client = kit()
    result = client.post(path, body)
    assert refusal(result) == (400, "model", "wrong_task")
    assert "--task embed" in result.json["error"]["message"]
    assert not client.scheduler.submits


def test_a_result_without_its_vector_is_an_error_and_not_an_empty_answer() -> None:
    client = kit()
    client.scheduler.answer = lambda _: Progress(0, finished=(Finished(0, "stop"),))
    assert client.post("/v1/embeddings", {"input": "a"}).status_code == 500


def test_perplexity_is_that_of_the_tokens_behind_the_first() -> None:
    client = Kit()
    result = client.post("/get_ppl", {"input": "hello"})
    assert result.json == {"ppl": 0.25, "perplexity": pytest.approx(math.exp(0.25)), "tokens": 4}
    (submit,) = client.scheduler.submits
    assert (submit.prompt_logprobs, submit.pooling) == (0, "last")


def test_perplexities_of_several_inputs_are_lists() -> None:
    result = Kit().post("/get_ppl", {"input": [[1, 2, 3], [4, 5]]})
    assert result.json["ppl"] == [0.25, 0.25]
    assert result.json["tokens"] == [2, 1]
    assert Kit().post("/get_ppl", {"input": ["abc"]}).json["tokens"] == [2]


@pytest.mark.parametrize(("given", "param"), [("a", "input"), ([7], "input"), (["ab", "c"], "input[1]")])
def test_one_token_has_no_perplexity(given: Any, param: str) -> None:
    assert refusal(Kit().post("/get_ppl", {"input": given}))[:2] == (400, param)
