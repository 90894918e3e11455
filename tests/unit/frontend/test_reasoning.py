"""Thinking over a scripted scheduler: split from the answer, limited, and left out."""

from typing import Any

import pytest
from frontend_kit import EOS, Kit, events

from shoal.messages import ThinkingBudget

HYBRID = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content.split('</think>')[-1] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""A model that begins to think by itself, unless it is told not to."""
OPENED = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content.split('</think>')[-1] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)
"""A model whose template begins the thinking."""
MARKERS = ("<think>", "</think>")
ANSWER = "<think>\nI see.\n\nYes.\n</think>\n\nHello!"


def message(result: Any) -> dict[str, Any]:
    assert result.status_code == 200, result.text
    found: dict[str, Any] = result.json["choices"][0]["message"]
    return found


def reasoning_tokens(result: Any) -> int:
    tokens: int = result.json["usage"]["completion_tokens_details"]["reasoning_tokens"]
    return tokens


@pytest.mark.parametrize("specials", [(), MARKERS])
@pytest.mark.parametrize(("template", "answer"), [(HYBRID, ANSWER), (OPENED, ANSWER.removeprefix("<think>\n"))])
def test_thinking_is_told_apart(template: str, answer: str, specials: tuple[str, ...]) -> None:
    kit = Kit(template=template, specials=specials)
    kit.says(answer)
    result = kit.chat("hi")
    assert message(result)["content"] == "Hello!"
    assert message(result)["reasoning_content"] == "I see.\n\nYes."
    thought = answer[: answer.index("</think>") + len("</think>")]
    assert reasoning_tokens(result) == len(kit.ids(thought))


@pytest.mark.parametrize("run_length", [1, 4, 100])
@pytest.mark.parametrize("specials", [(), MARKERS])
def test_streams_tell_it_apart_alike(specials: tuple[str, ...], run_length: int) -> None:
    kit = Kit(template=HYBRID, specials=specials)
    kit.says(ANSWER)
    kit.scheduler.run_length = run_length
    chunks = events(kit.chat("hi", stream=True, stream_options={"include_usage": True}))[:-1]
    usage = chunks.pop()["usage"]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "I see.\n\nYes."
    assert "".join(delta.get("content", "") for delta in deltas) == "Hello!"
    thoughts = [n for n, delta in enumerate(deltas) if "reasoning_content" in delta]
    texts = [n for n, delta in enumerate(deltas) if delta.get("content")]
    assert max(thoughts) < min(texts)
    tokens = usage["completion_tokens_details"]["reasoning_tokens"]
    assert len(kit.ids("<think>\nI see.\n\nYes.\n")) < tokens < len(kit.ids(ANSWER))


def test_an_answer_without_thinking_has_none() -> None:
    kit = Kit(template=HYBRID)
    kit.says("Just this </think> <think> text")
    result = kit.chat("hi")
    assert message(result) == {
        "role": "assistant",
        "content": "Just this </think> <think> text",
        "refusal": None,
    }
    assert reasoning_tokens(result) == 0


def test_thinking_that_is_cut_off_is_all_there_is() -> None:
    kit = Kit(template=OPENED)
    kit.says("I see no end")
    result = kit.chat("hi", max_tokens=9)
    assert message(result)["content"] == ""
    assert message(result)["reasoning_content"] == "I see no"
    assert reasoning_tokens(result) == 9
    assert result.json["choices"][0]["finish_reason"] == "length"


def test_special_markers_are_read_and_others_skipped() -> None:
    kit = Kit(template=HYBRID, specials=(*MARKERS, "<|other|>"))
    kit.says("<think>a<|other|>b</think>c<|other|>d")
    assert message(kit.chat("hi"))["content"] == "cd"
    assert message(kit.chat("hi"))["reasoning_content"] == "ab"


def test_every_choice_is_read_by_itself() -> None:
    kit = Kit(template=HYBRID)
    kit.says("<think>one</think>1", "two", "<think>three</think>3")
    result = kit.chat("hi", n=3)
    found = [choice["message"] for choice in result.json["choices"]]
    assert [each["content"] for each in found] == ["1", "two", "3"]
    assert [each.get("reasoning_content") for each in found] == ["one", None, "three"]
    thought = len("<think>one</think>") + len("<think>three</think>")
    assert reasoning_tokens(result) == thought


def test_nothing_is_split_where_nobody_wants_it() -> None:
    kit = Kit(template=HYBRID, reasoning_parser="none")
    kit.says(ANSWER)
    assert message(kit.chat("hi"))["content"] == ANSWER
    plain = Kit()
    plain.says(ANSWER)
    assert message(plain.chat("hi"))["content"] == ANSWER
    told = Kit(reasoning_parser="think")
    told.says(ANSWER)
    assert message(told.chat("hi"))["content"] == "Hello!"


def test_a_raw_prompt_has_a_raw_answer() -> None:
    kit = Kit(template=HYBRID)
    kit.says(ANSWER)
    body = kit.post("/v1/chat/completions", {"messages": "once upon"})
    assert message(body)["content"] == ANSWER


@pytest.mark.parametrize("template", [HYBRID, OPENED])
def test_a_budget_begins_the_thinking_and_ends_it(template: str) -> None:
    kit = Kit(template=template, specials=MARKERS)
    kit.says("I see.</think>Hi")
    result = kit.chat("hi", thinking_token_budget=30)
    assert message(result)["content"] == "Hi"
    assert message(result)["reasoning_content"] == "I see."
    assert kit.prompt() == "<user>hi<assistant><think>\n"
    assert kit.scheduler.submits[-1].sampling.thinking == ThinkingBudget(30, tuple(kit.ids("</think>")))


@pytest.mark.parametrize(
    ("fields", "most"),
    [
        ({"reasoning_effort": "minimal"}, 512),
        ({"reasoning_effort": "low"}, 1024),
        ({"reasoning_effort": "medium"}, 4096),
        ({"reasoning_effort": "medium", "thinking_token_budget": 7}, 7),
        ({"reasoning_effort": "low", "thinking_token_budget": 5000}, 1024),
    ],
)
def test_efforts_are_limits(fields: dict[str, Any], most: int) -> None:
    kit = Kit(template=OPENED)
    assert kit.chat("hi", **fields).status_code == 200
    thinking = kit.scheduler.submits[-1].sampling.thinking
    assert thinking is not None
    assert thinking.most_tokens == most


@pytest.mark.parametrize("effort", ["high", "xhigh"])
def test_great_efforts_know_no_limit(effort: str) -> None:
    kit = Kit(template=OPENED)
    assert kit.chat("hi", reasoning_effort=effort).status_code == 200
    assert kit.scheduler.submits[-1].sampling.thinking is None


@pytest.mark.parametrize("fields", [{"reasoning_effort": "none"}, {"thinking_token_budget": 0}])
@pytest.mark.parametrize("template", [HYBRID, OPENED, HYBRID.replace("enable_thinking", "something_else")])
def test_no_thinking_is_begun_and_ended_in_the_prompt(template: str, fields: dict[str, Any]) -> None:
    kit = Kit(template=template)
    kit.says("Hi")
    result = kit.chat("hi", **fields)
    assert message(result)["content"] == "Hi"
    assert kit.prompt() == "<user>hi<assistant><think>\n\n</think>\n\n"
    assert reasoning_tokens(result) == 0


def test_a_template_that_knows_efforts_is_told_the_word() -> None:
    kit = Kit(template="{{ reasoning_effort }}|{{ messages[0].content }}</think>|")
    assert kit.chat("hi", reasoning_effort="high").status_code == 200
    assert kit.prompt().startswith("high|hi")


def test_a_model_that_does_not_think_never_exceeds_an_effort() -> None:
    kit = Kit()
    for effort in ("none", "low", "medium", "high"):
        assert kit.chat("hi", reasoning_effort=effort).status_code == 200
    assert all(submit.sampling.thinking is None for submit in kit.scheduler.submits)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"reasoning_effort": "enormous"}, "reasoning_effort"),
        ({"thinking_token_budget": -1}, "thinking_token_budget"),
        ({"thinking_token_budget": 1.5}, "thinking_token_budget"),
        ({"reasoning_effort": "none", "enable_thinking": True}, "enable_thinking"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any], param: str) -> None:
    error = Kit(template=HYBRID).chat("hi", **fields)
    assert error.status_code == 400
    assert error.json["error"]["param"] == param


def test_a_budget_without_thinking_is_refused() -> None:
    error = Kit().chat("hi", thinking_token_budget=10).json["error"]
    assert (error["param"], error["code"]) == ("thinking_token_budget", "not_available")


@pytest.mark.parametrize(
    ("begun", "answer", "expected"),
    [
        ("<think>I", " see</think>Hi", ("I see", "Hi")),
        ("<think>I</think>Hel", "lo", (None, "lo")),
        ("Hel", "lo", (None, "lo")),
    ],
)
def test_a_message_is_continued_where_its_thinking_stands(
    begun: str, answer: str, expected: tuple[str | None, str]
) -> None:
    kit = Kit(
        template="{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}{# </think> #}"
    )
    kit.says(answer)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": begun}]
    result = kit.post("/v1/chat/completions", {"messages": messages, "continue_final_message": True})
    found = message(result)
    reasoning = expected[0] and expected[0].removeprefix("I ")
    assert (found.get("reasoning_content"), found["content"]) == (reasoning, expected[1])


def test_counting_tokens_counts_what_is_put_behind_the_prompt() -> None:
    kit = Kit(template=HYBRID)
    body = {
        "model": "served/model",
        "max_tokens": 5,
        "messages": [{"role": "user", "content": "hi"}],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    }
    answer = kit.post("/v1/messages", body).json
    counted = kit.post("/v1/messages/count_tokens", {k: v for k, v in body.items() if k != "max_tokens"}).json
    assert counted["input_tokens"] == answer["usage"]["input_tokens"] == len("<user>hi<assistant><think>\n")


def test_ids_and_log_probabilities_cover_the_thinking_too() -> None:
    kit = Kit(template=HYBRID)
    kit.says(ANSWER)
    choice = kit.chat("hi", logprobs=True, return_token_ids=True).json["choices"][0]
    assert choice["token_ids"] == [*kit.ids(ANSWER), EOS]
    assert len(choice["logprobs"]["content"]) == len(kit.ids(ANSWER)) + 1
