"""The official openai package against a running server with the real default model."""

from collections.abc import Iterator

import openai
import pytest
from server import Server, running_server

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def test_lists_and_retrieves_models(client: openai.OpenAI, model: str) -> None:
    assert client.models.retrieve(model).id == model
    with pytest.raises(openai.NotFoundError, match="no-such"):
        client.models.retrieve("no-such")


def test_chat_answers_paris(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=40)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_stream_joins_to_the_plain_answer(client: openai.OpenAI, model: str) -> None:
    ask = {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": 40}
    plain = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    assert text == plain.choices[0].message.content
    assert reasons == ["stop"]
    assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == plain.usage.prompt_tokens


def test_second_asking_hits_the_prefix_cache(client: openai.OpenAI, model: str) -> None:
    long = [{"role": "user", "content": "Count the words: " + "one two three four five " * 30}]
    first = client.chat.completions.create(model=model, messages=long, temperature=0, max_tokens=4)
    again = client.chat.completions.create(model=model, messages=long, temperature=0, max_tokens=4)
    assert again.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 16
    assert again.choices[0].message.content == first.choices[0].message.content


def test_logprobs(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, max_tokens=8, logprobs=True, top_logprobs=3
    )
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    for entry in entries:
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs)
        assert len(entry.top_logprobs) == 3
        assert bytes(entry.bytes).decode() == entry.token
    assert "".join(entry.token for entry in entries).startswith(answer.choices[0].message.content)


def test_completions_logprobs_and_offsets(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(
        model=model, prompt="The sky is", max_tokens=5, temperature=0, logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert logprobs.text_offset[0] == 0
    assert all(len(top) >= 2 for top in logprobs.top_logprobs)


def test_n_choices_differ_and_repeat_under_one_seed(client: openai.OpenAI, model: str) -> None:
    ask = {"model": model, "messages": [{"role": "user", "content": "Write a short poem about the sea."}]}
    first = client.chat.completions.create(**ask, n=3, seed=7, temperature=1.0, max_tokens=24)
    again = client.chat.completions.create(**ask, n=3, seed=7, temperature=1.0, max_tokens=24)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in again.choices]


def test_completions_take_every_prompt_form(client: openai.OpenAI, model: str) -> None:
    ask = {"model": model, "max_tokens": 3, "temperature": 0}
    single = client.completions.create(prompt="The capital of France is", **ask)
    several = client.completions.create(prompt=["Hello", "The capital of France is"], **ask)
    ids = client.completions.create(prompt=[504, 3575, 282, 4649, 314], **ask)
    lists = client.completions.create(prompt=[[504, 3575], [504, 3575, 282, 4649, 314]], **ask)
    assert several.choices[1].text == single.choices[0].text
    assert lists.choices[1].text == ids.choices[0].text
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.usage.prompt_tokens > single.usage.prompt_tokens


def test_stop_strings_cut_the_text(client: openai.OpenAI, model: str) -> None:
    ask = {"model": model, "prompt": "1, 2, 3, 4, 5,", "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**ask).choices[0].text
    stop = whole[10:13]
    cut = client.completions.create(**ask, stop=[stop]).choices[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"model": "nope"}, openai.NotFoundError, "nope"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"max_tokens": -1}, openai.BadRequestError, "max_tokens"),
        ({"extra_body": {"no_such_field": 1}}, openai.BadRequestError, "no_such_field"),
        ({"messages": [{"role": "user", "content": "x " * 20000}]}, openai.BadRequestError, "8192"),
    ],
)
def test_typed_errors(
    client: openai.OpenAI, model: str, change: dict[str, object], error: type[Exception], names: str
) -> None:
    ask: dict[str, object] = {"model": model, "messages": QUESTION} | change
    with pytest.raises(error, match=names):
        client.chat.completions.create(**ask)
