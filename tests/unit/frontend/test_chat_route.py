"""POST /v1/chat/completions over a scripted scheduler."""

import random

import pytest
from frontend_kit import EOS, Kit, events, limits

from shoal.frontend.service import Defaults
from shoal.messages import Availability
from shoal.wire import unpack_ids


def test_a_plain_answer() -> None:
    kit = Kit()
    kit.says("Hello, world")
    kit.scheduler.cached_tokens = 16
    body = kit.chat("Say hello", model="served/model").json
    assert body["object"] == "chat.completion"
    assert body["model"] == "served/model"
    assert body["id"].startswith("chatcmpl-")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello, world", "refusal": None},
            "finish_reason": "stop",
            "stop_reason": None,
            "logprobs": None,
        }
    ]
    prompt = "<user>Say hello<assistant>"
    assert kit.prompt() == prompt
    assert body["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": len("Hello, world") + 1,
        "total_tokens": len(prompt) + len("Hello, world") + 1,
        "prompt_tokens_details": {"cached_tokens": 16},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    assert kit.scheduler.cancels == []
    assert kit.service.switchboard.open_sequences == 0


@pytest.mark.parametrize("run_length", [1, 3, 100])
def test_a_stream_joins_to_the_plain_answer(run_length: int) -> None:
    kit = Kit()
    kit.says("Grüße 🎉 ok")
    kit.scheduler.run_length = run_length
    chunks = events(kit.chat(stream=True, stream_options={"include_usage": True}))
    assert chunks.pop() == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    usage = chunks.pop()
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len("Grüße 🎉 ok".encode()) + 1
    assert all(chunk["usage"] is None for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "Grüße 🎉 ok"
    assert not any("\ufffd" in delta.get("content", "") for delta in deltas)
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]


def test_usage_in_every_chunk_where_asked_for() -> None:
    kit = Kit()
    kit.says("abc")
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(kit.chat(stream=True, stream_options=options))[:-1]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 4
    assert "usage" not in events(kit.chat(stream=True))[0]


def test_n_choices_have_seeds_of_their_own_and_one_prompt() -> None:
    kit = Kit()
    kit.says("one", "three", "two")
    body = kit.chat(n=3, seed=5).json
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [choice["message"]["content"] for choice in body["choices"]] == ["one", "three", "two"]
    seeds = [submit.sampling.seed for submit in kit.scheduler.submits]
    assert seeds[0] == 5
    assert len(set(seeds)) == 3
    assert body["usage"]["prompt_tokens"] == len("<user>hi<assistant>")
    assert body["usage"]["completion_tokens"] == len("one" + "three" + "two") + 3
    kit.chat(n=3, seed=5)
    assert [submit.sampling.seed for submit in kit.scheduler.submits[3:]] == seeds


def test_streamed_choices_each_end_once() -> None:
    kit = Kit()
    kit.says("a", "bbbb", "cc")
    chunks = [chunk for chunk in events(kit.chat(n=3, stream=True)) if chunk != "[DONE]"]
    for index, text in enumerate(["a", "bbbb", "cc"]):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in own) == text
        assert [choice["finish_reason"] for choice in own if choice["finish_reason"]] == ["stop"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("run_length", [1, 4, 50])
def test_a_stop_string_ends_the_answer_and_cancels(stream: bool, run_length: int) -> None:
    kit = Kit()
    kit.says("one two three four")
    kit.scheduler.run_length = run_length
    kit.scheduler.cached_tokens = 3
    options = {"stream_options": {"include_usage": True}} if stream else {}
    result = kit.chat(stop=["zzz", "thr"], stream=stream, **options)
    if stream:
        chunks = [chunk for chunk in events(result) if chunk != "[DONE]"]
        usage = chunks.pop()["usage"]
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        last = chunks[-1]["choices"][0]
    else:
        usage, last = result.json["usage"], result.json["choices"][0]
        text = last["message"]["content"]
    assert text == "one two "
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "thr")
    assert usage["completion_tokens"] == len("one two thr")
    assert usage["prompt_tokens_details"]["cached_tokens"] == 3
    if run_length < 50:
        assert [cancel.cause for cancel in kit.scheduler.cancels] == ["stop_string"]
    assert kit.service.switchboard.open_sequences == 0


def test_a_half_of_a_stop_string_comes_out_at_the_end() -> None:
    kit = Kit()
    kit.says("one th")
    choice = kit.chat(stop="three").json["choices"][0]
    assert choice["message"]["content"] == "one th"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)


def test_stop_ids_and_ignored_ends() -> None:
    kit = Kit()
    kit.says("abc.def")
    dot = kit.ids(".")[0]
    choice = kit.chat(stop_token_ids=[dot]).json["choices"][0]
    assert choice["message"]["content"] == "abc"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", dot)
    assert kit.scheduler.submits[-1].stop_ids == (dot, EOS)
    kit.chat(stop_token_ids=[dot], ignore_eos=True)
    assert kit.scheduler.submits[-1].stop_ids == (dot,)


def test_special_tokens_are_skipped_or_shown() -> None:
    kit = Kit()
    kit.says("a<|begin|>b")
    assert kit.chat().json["choices"][0]["message"]["content"] == "ab"
    shown = kit.chat(skip_special_tokens=False).json["choices"][0]["message"]["content"]
    assert shown == "a<|begin|>b"


def test_length_ends_with_length() -> None:
    kit = Kit()
    kit.says("abcdefgh")
    body = kit.chat(max_completion_tokens=5.0).json
    assert body["choices"][0]["message"]["content"] == "abcde"
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 5


def test_the_default_length_is_what_fits() -> None:
    kit = Kit()
    kit.chat("hi")
    assert kit.scheduler.submits[-1].max_tokens == 200 - len("<user>hi<assistant>")


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(stream: bool) -> None:
    kit = Kit()
    kit.says("né")
    result = kit.chat(logprobs=True, top_logprobs=2, stream=stream)
    if stream:
        parts = [chunk["choices"][0]["logprobs"] for chunk in events(result)[:-1]]
        content = [entry for part in parts if part for entry in part["content"]]
    else:
        content = result.json["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content) == "né".encode() + b"<|end|>"
    assert content[0]["token"] == "n"
    assert [entry["logprob"] for entry in content] == [-0.25] * 4
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.25, -1.25]


def test_sampling_values_arrive() -> None:
    kit = Kit(defaults=Defaults(temperature=0.6, top_k=40))
    kit.chat()
    sampling = kit.scheduler.submits[-1].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.6, 40, 1.0)
    assert sampling.logprobs == -1
    fields = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": -1,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": -1,
        "frequency_penalty": 2,
        "seed": 0,
        "logit_bias": {"5": -100, "9": 2.5},
    }
    kit.chat(**fields)
    sampling = kit.scheduler.submits[-1].sampling
    assert sampling.top_k == 0
    assert sampling.seed == 0
    assert sampling.logit_bias == ((5, -100.0), (9, 2.5))
    for name in (
        "temperature",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    ):
        assert getattr(sampling, name) == fields[name]
    kit.chat(seed=-1)
    assert kit.scheduler.submits[-1].sampling.seed == (1 << 64) - 1


def test_unset_seeds_are_drawn() -> None:
    kit = Kit()
    kit.chat()
    kit.chat()
    first, second = (submit.sampling.seed for submit in kit.scheduler.submits)
    assert first != second


def test_neutral_values_are_accepted() -> None:
    kit = Kit()
    neutral = {
        "kwargs": {},
        "stop": False,
        "session_id": -1,
        "logprobs": False,
        "top_logprobs": 0,
        "user": None,
        "logit_bias": None,
        "stream_options": None,
        "image_url": None,
        "adapter_name": None,
        "min_new_tokens": None,
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "parallel_tool_calls": True,
        "service_tier": "auto",
        "metadata": {"a": "b"},
        "store": False,
        "bad_words": [],
        "chat_template_kwargs": {},
        "n": 1.0,
        "model": "",
    }
    assert kit.chat(**neutral).status_code == 200
    for options in ({}, {"include_usage": False, "continuous_usage_stats": None}):
        assert kit.chat(stream_options=options).status_code == 200


def test_messages_of_every_kind_reach_the_template() -> None:
    kit = Kit()
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "developer", "content": "be brief"},
        {
            "role": "user",
            "name": "ann",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        },
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
    ]
    assert kit.post("/v1/chat/completions", {"messages": messages}).status_code == 200
    called = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    answered = "<tool_response>\n42\n</tool_response>"
    assert kit.prompt() == f"<system>be brief<user>ab<assistant>{called}<user>{answered}<assistant>"


def test_a_string_is_a_raw_prompt() -> None:
    kit = Kit(bos=True)
    assert kit.post("/v1/chat/completions", {"messages": "once upon"}).status_code == 200
    assert unpack_ids(kit.scheduler.submits[-1].prompt) == [257, *kit.ids("once upon")]


def test_a_text_far_too_long_is_refused_by_its_beginning() -> None:
    kit = Kit()
    seen: list[int] = []
    encode = kit.tokenizer.encode

    def spy(text: str, add_special: bool) -> list[int]:
        seen.append(len(text))
        return encode(text, add_special)

    kit.tokenizer.encode = spy  # type: ignore[method-assign]
    error = kit.chat("".join(random.choice("abc def") for _ in range(100_000))).json["error"]
    assert error["code"] == "context_length_exceeded"
    assert "200 tokens, but far more than 3200" in error["message"]
    assert seen == [16 * 200]


def test_texts_too_long_for_the_event_loop_are_counted_exactly() -> None:
    kit = Kit()
    kit.scheduler.switchboard.accept(Availability(True, limits(20_000)))
    assert kit.chat("x" * 17_000).json["usage"]["prompt_tokens"] == 17_000 + len("<user><assistant>")
