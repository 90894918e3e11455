"""POST /v1/completions over a scripted scheduler."""

import pytest
from frontend_kit import Kit, events

from shoal.wire import unpack_ids


def test_a_plain_answer() -> None:
    kit = Kit()
    kit.says(" a time")
    body = kit.complete("once upon").json
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    choice = {"index": 0, "text": " a time", "finish_reason": "stop", "stop_reason": None, "logprobs": None}
    assert body["choices"] == [choice]
    assert body["usage"]["prompt_tokens"] == len("once upon")
    assert body["usage"]["completion_tokens"] == len(" a time") + 1


def test_sixteen_tokens_are_the_default() -> None:
    kit = Kit()
    kit.complete("a" * 100)
    assert kit.scheduler.submits[-1].max_tokens == 16
    kit.complete("a" * 190)
    assert kit.scheduler.submits[-1].max_tokens == 10


@pytest.mark.parametrize(
    "form",
    [
        lambda kit: "ab",
        lambda kit: ["ab"],
        lambda kit: kit.ids("ab"),
        lambda kit: [kit.ids("ab")],
    ],
    ids=["string", "strings", "ids", "lists"],
)
def test_every_prompt_form_gives_the_same_ids(form) -> None:  # type: ignore[no-untyped-def]
    kit = Kit()
    assert kit.complete(form(kit)).status_code == 200
    assert [unpack_ids(submit.prompt) for submit in kit.scheduler.submits] == [kit.ids("ab")]


def test_texts_get_the_first_token_and_ids_do_not() -> None:
    kit = Kit(bos=True)
    kit.complete(["a", ""])
    kit.complete([5, 6])
    prompts = [unpack_ids(submit.prompt) for submit in kit.scheduler.submits]
    assert prompts == [[257, *kit.ids("a")], [257], [5, 6]]


@pytest.mark.parametrize("stream", [False, True])
def test_choices_are_numbered_prompt_by_prompt(stream: bool) -> None:
    kit = Kit()
    texts = ["a0", "a1", "b0", "b1", "c0", "c1"]
    kit.says(*texts)
    result = kit.complete(["A", "BB", "CCC"], n=2, stream=stream)
    assert [kit.prompt(n) for n in range(6)] == ["A", "A", "BB", "BB", "CCC", "CCC"]
    found = [""] * 6
    choices = (
        [chunk["choices"][0] for chunk in events(result) if chunk != "[DONE]"]
        if stream
        else result.json["choices"]
    )
    for choice in choices:
        found[choice["index"]] += choice["text"]
    assert found == texts
    if not stream:
        assert result.json["usage"]["prompt_tokens"] == 6
        assert result.json["usage"]["completion_tokens"] == 6 * 3


def test_a_batched_prompt_draws_like_a_lone_one() -> None:
    kit = Kit()
    kit.complete(["A", "B"], n=2, seed=9)
    kit.complete("B", n=2, seed=9)
    seeds = [submit.sampling.seed for submit in kit.scheduler.submits]
    assert seeds[2:4] == seeds[4:6] == seeds[0:2]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_parallel_lists(stream: bool) -> None:
    kit = Kit()
    kit.says("aé b", end=False)
    result = kit.complete(logprobs=2, max_tokens=5, stream=stream)
    keys = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    if stream:
        parts = [chunk["choices"][0]["logprobs"] for chunk in events(result)[:-1]]
        lists = {key: [item for part in parts if part for item in part[key]] for key in keys}
    else:
        lists = result.json["choices"][0]["logprobs"]
    assert lists["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9", " ", "b"]
    assert lists["token_logprobs"] == [-0.25] * 5
    assert lists["text_offset"] == [0, 1, 1, 2, 3]
    assert lists["top_logprobs"][0]["a"] == -0.25
    assert all(len(top) >= 2 for top in lists["top_logprobs"])


def test_logprobs_zero_shows_the_sampled_token() -> None:
    kit = Kit()
    kit.says("x", end=False)
    logprobs = kit.complete(logprobs=0, max_tokens=1).json["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{"x": -0.25}]


def test_neutral_values_are_accepted() -> None:
    kit = Kit()
    neutral = {"suffix": None, "echo": False, "best_of": 1, "logprobs": False, "top_logprobs": 0, "kwargs": {}}
    assert kit.complete(**neutral, stop=[], stop_token_ids=[], logit_bias={}).status_code == 200
    assert kit.complete(n=2, best_of=2.0).status_code == 200


def test_a_stream_of_completions() -> None:
    kit = Kit()
    kit.says("hello")
    chunks = events(kit.complete(stream=True, stream_options={"include_usage": True}))
    assert chunks[-1] == "[DONE]"
    assert chunks[-2]["usage"]["total_tokens"] == len("hi") + len("hello") + 1
    texts = [chunk["choices"][0]["text"] for chunk in chunks[:-2]]
    assert "".join(texts) == "hello"
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-2]]
    assert [reason for reason in reasons if reason] == ["stop"]
