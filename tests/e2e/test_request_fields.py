"""Fields beyond OpenAI's everyday ones with the real model, through the official openai package."""

import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from server import Server, running_server

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
TEXT = "The capital of France is Paris, and the capital of Italy is Rome."


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server("--unknown_fields", "warn") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def _chat(client: openai.OpenAI, model: str, messages: Any = QUESTION, **extra: Any) -> Any:
    ask = {"temperature": 0, "max_tokens": 24} | {
        name: extra.pop(name) for name in ("temperature", "max_tokens", "stop", "logit_bias") if name in extra
    }
    return client.chat.completions.create(model=model, messages=messages, extra_body=extra, **ask)


def test_an_echo_scores_a_text_as_its_generation_did(client: openai.OpenAI, model: str) -> None:
    ask: dict[str, Any] = {"model": model, "temperature": 0}
    prompt = "The sky is"
    made = client.completions.create(prompt=prompt, max_tokens=6, logprobs=2, **ask).choices[0]
    read = client.completions.create(
        prompt=prompt + made.text, max_tokens=0, echo=True, logprobs=2, **ask
    ).choices[0]
    assert read.text == prompt + made.text
    assert read.logprobs.tokens[-6:] == made.logprobs.tokens
    assert read.logprobs.token_logprobs[0] is None
    assert read.logprobs.token_logprobs[-6:] == pytest.approx(made.logprobs.token_logprobs, abs=1e-9)
    assert read.logprobs.top_logprobs[-6:] == [
        pytest.approx(candidates, abs=1e-9) for candidates in made.logprobs.top_logprobs
    ]
    spans = zip(read.logprobs.tokens, read.logprobs.text_offset, strict=True)
    assert all(read.text.startswith(token, offset) for token, offset in spans)


def test_an_echo_in_a_stream(client: openai.OpenAI, model: str) -> None:
    ask: dict[str, Any] = {
        "model": model, "prompt": ["Once upon", TEXT], "temperature": 0, "max_tokens": 3, "echo": True,
        "logprobs": 0, "n": 2,
    }  # fmt: skip
    plain = client.completions.create(**ask)
    texts, scores = [""] * 4, [[] for _ in range(4)]  # type: ignore[var-annotated]
    for chunk in client.completions.create(**ask, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        scores[choice.index] += choice.logprobs.token_logprobs if choice.logprobs else []
    assert texts == [choice.text for choice in plain.choices]
    assert scores == [choice.logprobs.token_logprobs for choice in plain.choices]


def test_prompt_logprobs_name_the_rendered_prompt(client: openai.OpenAI, model: str) -> None:
    answer = _chat(client, model, prompt_logprobs=1, return_token_ids=True, max_tokens=2)
    ids, lists = answer.prompt_token_ids, answer.prompt_logprobs
    assert len(lists) == len(ids) == answer.usage.prompt_tokens
    assert lists[0] is None
    assert all(str(token) in candidates for token, candidates in zip(ids[1:], lists[1:], strict=True))
    assert all(1 in {each["rank"] for each in candidates.values()} for candidates in lists[1:])
    assert len(answer.choices[0].token_ids) == answer.usage.completion_tokens


def test_the_best_of_several(client: openai.OpenAI, model: str) -> None:
    ask: dict[str, Any] = {
        "model": model,
        "prompt": "My favourite",
        "temperature": 1.5,
        "seed": 3,
        "max_tokens": 8,
    }
    ask["logprobs"] = 0
    every = client.completions.create(n=5, **ask)
    best = client.completions.create(n=2, best_of=5, **ask)

    def mean(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    ranked = sorted(every.choices, key=mean, reverse=True)
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]
    assert best.usage.completion_tokens == every.usage.completion_tokens


def test_words_that_must_not_be_said(client: openai.OpenAI, model: str) -> None:
    assert "Paris" in _chat(client, model).choices[0].message.content
    assert "Paris" not in _chat(client, model, bad_words=["Paris"]).choices[0].message.content


def test_only_the_allowed_tokens_are_drawn(client: openai.OpenAI, model: str) -> None:
    digits = [
        client.completions.create(
            model=model, prompt=digit, max_tokens=1, extra_body={"return_token_ids": True}
        )
        .choices[0]
        .prompt_token_ids[0]  # type: ignore[attr-defined]
        for digit in "0123456789"
    ]
    answer = _chat(client, model, allowed_token_ids=digits, temperature=1, max_tokens=12)
    assert re.fullmatch(r"\d{12}", answer.choices[0].message.content)


def test_an_answer_of_some_length(client: openai.OpenAI, model: str) -> None:
    short = _chat(client, model, max_tokens=60)
    assert short.choices[0].finish_reason == "stop"
    least = short.usage.completion_tokens + 10
    long = _chat(client, model, min_tokens=least, max_tokens=60)
    assert long.usage.completion_tokens >= least


def test_an_answer_that_goes_in_circles_ends(client: openai.OpenAI, model: str) -> None:
    circles = {"max_pattern_size": 8, "min_pattern_size": 2, "min_count": 4}
    answer = _chat(client, model, allowed_token_ids=[504], repetition_detection=circles)
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("repetition", "repetition_detected")
    assert answer.usage.completion_tokens == 2 * 4


def test_a_message_is_continued(client: openai.OpenAI, model: str) -> None:
    begun = [*QUESTION, {"role": "assistant", "content": "The capital of France is the city of"}]
    answer = _chat(client, model, begun, continue_final_message=True, max_tokens=4)
    assert answer.choices[0].message.content.startswith(" Paris")


def test_prompts_made_in_other_ways_are_the_same_prompt(client: openai.OpenAI, model: str) -> None:
    by_template = _chat(client, model, return_token_ids=True)
    by_ids = _chat(client, model, [], input_ids=by_template.prompt_token_ids)
    source = (
        "{% for message in messages %}{{ '<|im_start|>' ~ message.role ~ '\n' ~ message.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    system = {
        "role": "system",
        "content": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    }
    by_own_template = _chat(client, model, [system, *QUESTION], chat_template=source, return_token_ids=True)
    assert by_own_template.prompt_token_ids == by_template.prompt_token_ids
    texts = [answer.choices[0].message.content for answer in (by_template, by_ids, by_own_template)]
    assert len(set(texts)) == 1


def test_timings_are_plausible(client: openai.OpenAI, model: str) -> None:
    timings = _chat(client, model, timings_per_token=True, cache_salt="fresh").timings
    assert timings["prompt_ms"] > 0
    assert timings["predicted_ms"] > 0
    assert timings["predicted_n"] > 1
    assert timings["cache_n"] == 0


def test_a_salt_keeps_prefixes_apart(client: openai.OpenAI, model: str) -> None:
    long = [{"role": "user", "content": "Count the words: " + "six five four three two one " * 20}]
    cached = [
        _chat(client, model, long, cache_salt=salt, max_tokens=2).usage.prompt_tokens_details.cached_tokens
        for salt in ("a", "a", "b")
    ]
    assert cached[0] == 0
    assert cached[1] > 0
    assert cached[2] == 0


def test_unknown_fields_are_named_in_a_header(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.with_raw_response.create(
        model=model, messages=QUESTION, max_tokens=2, extra_body={"gateway_trace": "x"}
    )
    assert "gateway_trace" in answer.headers["Warning"]
    assert answer.parse().choices[0].message.content
