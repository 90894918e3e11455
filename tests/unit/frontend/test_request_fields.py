"""Fields of the two OpenAI routes, each seen where it has its effect: in the submit or in the answer."""

from typing import Any

import pytest
from frontend_kit import EOS, SESSION_LEN, Kit, events

from shoal.messages import RepetitionLimit, Submit
from shoal.wire import unpack_ids

CHAT = "/v1/chat/completions"


def _submitted(path: str = "chat", **fields: Any) -> Submit:
    kit = Kit()
    result = kit.chat(**fields) if path == "chat" else kit.complete(**fields)
    assert result.status_code == 200, result.text
    return kit.scheduler.submits[-1]


# --- how tokens are drawn ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["chat", "completions"])
@pytest.mark.parametrize("name", ["min_tokens", "min_new_tokens"])
def test_min_tokens_hold_the_ends_back(path: str, name: str) -> None:
    sampling = _submitted(path, **{name: 3.0}, stop_token_ids=[7]).sampling
    assert (sampling.min_tokens, sampling.held_back) == (3, (7, EOS))
    sampling = _submitted(path, **{name: 3}, ignore_eos=True, stop_token_ids=[7]).sampling
    assert sampling.held_back == (7,)


@pytest.mark.parametrize("run_length", [1, 4])
def test_stop_strings_wait_for_min_tokens(run_length: int) -> None:
    kit = Kit()
    kit.scheduler.run_length = run_length
    kit.says("ab|cd|ef")
    assert kit.chat(stop="|").json["choices"][0]["message"]["content"] == "ab"
    assert kit.chat(stop="|", min_tokens=3).json["choices"][0]["message"]["content"] == "ab|cd"
    assert kit.chat(stop="|", min_tokens=2).json["choices"][0]["message"]["content"] == "ab"


def test_allowed_token_ids() -> None:
    assert _submitted(allowed_token_ids=[5, 9.0, 5]).sampling.allowed_ids == (5, 9)
    assert _submitted(allowed_token_ids=[]).sampling.allowed_ids == ()


def test_bad_words_are_held_with_and_without_a_space() -> None:
    kit = Kit()
    kit.complete(bad_words=["no", " way"])
    runs = kit.scheduler.submits[-1].sampling.bad_words
    assert set(runs) == {tuple(kit.ids(text)) for text in ("no", " no", "way", " way")}


def test_loops_are_the_schedulers_to_find() -> None:
    detection = {"max_pattern_size": 20, "min_pattern_size": 2, "min_count": 4}
    assert _submitted(repetition_detection=detection).repetition == RepetitionLimit(2, 20, 4)
    detection = {"max_pattern_size": 20, "min_count": 2}
    assert _submitted(repetition_detection=detection).repetition == RepetitionLimit(1, 20, 2)
    for neutral in (None, False, {"max_pattern_size": 0, "min_count": 0}):
        assert _submitted(repetition_detection=neutral).repetition is None


def test_a_loop_is_its_own_reason() -> None:
    kit = Kit()
    kit.scheduler.reason = "repetition"
    choice = kit.chat().json["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("repetition", "repetition_detected")


def test_an_aborted_request_gets_what_there_is() -> None:
    kit = Kit()
    kit.says("half an ans", end=False)
    kit.scheduler.reason = "aborted"
    choice = kit.complete().json["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("half an ans", "abort")


# --- how the request is treated ----------------------------------------------------------------------------


def test_what_the_scheduler_is_told_of_a_request() -> None:
    submit = _submitted(priority=-3.0, cache_salt="pepper")
    assert (submit.priority, submit.cache_salt) == (-3, "pepper")
    submit = _submitted()
    assert (submit.priority, submit.cache_salt, submit.prompt_logprobs) == (0, "", -1)


def test_the_sequences_of_a_request_are_one_group() -> None:
    kit = Kit()
    kit.complete(["a", "b"], n=2)
    kit.complete("c")
    assert [submit.group for submit in kit.scheduler.submits] == [1, 1, 1, 1, 5]


@pytest.mark.parametrize("path", ["chat", "completions"])
def test_hints_change_nothing_and_come_back_where_openai_returns_them(path: str) -> None:
    hints: dict[str, Any] = {
        "user": "u", "safety_identifier": "s", "metadata": {"topic": "demo"}, "store": True,
        "service_tier": "auto", "prompt_cache_key": "k", "prompt_cache_retention": "24h",
        "prompt_cache_options": {"mode": "implicit", "ttl": "30m"}, "session_id": 7,
    }  # fmt: skip
    kit = Kit()
    result = kit.chat(**hints) if path == "chat" else kit.complete(**hints)
    assert result.status_code == 200, result.text
    assert result.json["metadata"] == {"topic": "demo"}
    assert result.json["service_tier"] == "default"
    plain = kit.chat() if path == "chat" else kit.complete()
    assert "metadata" not in plain.json
    assert "service_tier" not in plain.json


@pytest.mark.parametrize("path", ["chat", "completions"])
def test_what_lmdeploys_client_sends_is_neutral(path: str) -> None:
    fields: dict[str, Any] = {
        "kwargs": {}, "stop": False, "session_id": -1, "user": None, "logit_bias": None, "stream_options": None,
        "image_url": None, "adapter_name": None, "min_new_tokens": None, "top_logprobs": 0, "logprobs": False,
        "repetition_penalty": 1.0, "ignore_eos": False, "skip_special_tokens": True,
    }  # fmt: skip
    if path == "completions":
        fields["suffix"] = None
    assert _submitted(path, **fields).max_tokens > 0


def test_the_log_names_user_and_session(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "shoal.frontend"):
        Kit().chat(safety_identifier="ada", session_id="chat-9")
    assert "user=ada session=chat-9" in caplog.text


# --- how the prompt is made --------------------------------------------------------------------------------


def test_input_ids_are_the_whole_prompt() -> None:
    kit = Kit()
    assert kit.post(CHAT, {"messages": [], "input_ids": [5, 6.0]}).status_code == 200
    assert kit.post(CHAT, {"messages": "", "input_ids": [7]}).status_code == 200
    assert [unpack_ids(submit.prompt) for submit in kit.scheduler.submits] == [[5, 6], [7]]


def test_without_preprocessing_the_contents_are_the_prompt() -> None:
    kit = Kit()
    messages = [
        {"role": "system", "content": "a "},
        {"role": "user", "content": [{"type": "text", "text": "b"}]},
    ]
    assert kit.post(CHAT, {"messages": messages, "do_preprocess": False}).status_code == 200
    assert kit.prompt() == "a b"


def test_the_models_turn_may_be_left_to_the_client() -> None:
    kit = Kit()
    kit.chat("hi", add_generation_prompt=False)
    assert kit.prompt() == "<user>hi"
    kit.chat("hi", add_generation_prompt=True)
    assert kit.prompt() == "<user>hi<assistant>"


def test_a_final_message_is_continued() -> None:
    kit = Kit()
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well,"}]
    kit.post(CHAT, {"messages": messages, "continue_final_message": True, "add_generation_prompt": False})
    assert kit.prompt() == "<user>hi<assistant>Well,"


def test_a_template_of_the_requests_own() -> None:
    kit = Kit()
    template = "{{ greeting }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
    kit.chat("hi", chat_template=template, chat_template_kwargs={"greeting": "yo"})
    assert kit.prompt() == "yo[hi]"
    kit.chat("hi")
    assert kit.prompt() == "<user>hi<assistant>"


HOSTILE = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ ''.__class__.__mro__ }}",
    "{{ 'x' * 999999999 }}",
    "{{ messages.append(1) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% include 'secrets' %}",
]


@pytest.mark.parametrize("template", HOSTILE)
def test_a_hostile_template_is_refused(template: str) -> None:
    kit = Kit()
    result = kit.chat(chat_template=template)
    assert result.status_code == 400, result.text
    assert kit.scheduler.submits == []


def test_variables_for_the_template() -> None:
    source = "{{ 'T' if enable_thinking else 'F' }}{{ verbosity }}{{ tone }}{{ messages[0].content }}"
    kit = Kit(template=source)
    kit.chat("a", enable_thinking=True, verbosity="low", chat_template_kwargs={"tone": "!"})
    assert kit.prompt() == "Tlow!a"
    kit.chat("a", chat_template_kwargs={"enable_thinking": True})
    assert kit.prompt() == "Ta"


def test_a_model_that_does_not_think_is_told_not_to() -> None:
    assert _submitted(enable_thinking=False).max_tokens > 0
    assert _submitted(verbosity="medium").max_tokens > 0


# --- what the answer shows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_the_stop_string_is_shown_where_asked_for(stream: bool) -> None:
    kit = Kit()
    kit.says("one. two")
    result = kit.complete(stop=["."], include_stop_str_in_output=True, stream=stream)
    choices = [event["choices"][0] for event in events(result)[:-1]] if stream else result.json["choices"]
    assert "".join(choice["text"] for choice in choices) == "one."
    assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", ".")


def test_the_stop_tokens_text_is_shown_where_asked_for() -> None:
    kit = Kit()
    (bang,) = kit.ids("!")
    kit.says("hey!")
    assert kit.complete(stop_token_ids=[bang]).json["choices"][0]["text"] == "hey"
    assert (
        kit.complete(stop_token_ids=[bang], include_stop_str_in_output=True).json["choices"][0]["text"]
        == "hey!"
    )


@pytest.mark.parametrize("value", [True, False])
def test_nothing_is_put_between_special_tokens(value: bool) -> None:
    kit = Kit()
    kit.scheduler.answer = lambda _: [257, 257, *kit.ids("a")]
    fields = {"skip_special_tokens": False, "spaces_between_special_tokens": value}
    assert kit.complete(**fields).json["choices"][0]["text"] == "<|begin|><|begin|>a"


def test_token_ids_of_chat() -> None:
    kit = Kit()
    kit.says("hé")
    body = kit.chat(return_token_ids=True, n=2).json
    assert body["prompt_token_ids"] == kit.ids("<user>hi<assistant>")
    assert [choice["token_ids"] for choice in body["choices"]] == [[*kit.ids("hé"), EOS]] * 2
    assert "token_ids" not in kit.chat().json["choices"][0]


def test_token_ids_of_streamed_chat() -> None:
    kit = Kit()
    kit.says("hé")
    chunks = events(kit.chat(return_token_ids=True, stream=True))[:-1]
    assert chunks[0]["prompt_token_ids"] == kit.ids("<user>hi<assistant>")
    assert all("prompt_token_ids" not in chunk for chunk in chunks[1:])
    ids = [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", [])]
    assert ids == [*kit.ids("hé"), EOS]


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_of_completions(stream: bool) -> None:
    kit = Kit()
    kit.says("x", "yy")
    result = kit.complete(["A", "BB"], return_token_ids=True, stream=stream)
    choices = [event["choices"][0] for event in events(result)[:-1]] if stream else result.json["choices"]
    for index, (prompt, answer) in enumerate((("A", "x"), ("BB", "yy"))):
        own = [choice for choice in choices if choice["index"] == index]
        assert own[0]["prompt_token_ids"] == kit.ids(prompt)
        assert all("prompt_token_ids" not in choice for choice in own[1:])
        assert [token for choice in own for token in choice["token_ids"]] == [*kit.ids(answer), EOS]


def test_prompt_logprobs_of_chat() -> None:
    kit = Kit()
    body = kit.chat("z", prompt_logprobs=1, n=2).json
    ids = kit.ids("<user>z<assistant>")
    lists = body["prompt_logprobs"]
    assert lists[0] is None
    assert len(lists) == len(ids)
    assert lists[7] == {str(ids[7]): {"logprob": -0.25, "rank": 1, "decoded_token": "<"}}
    asked = [submit.prompt_logprobs for submit in kit.scheduler.submits]
    assert asked == [1, -1], "one choice reads the prompt for all"


def test_prompt_logprobs_of_completions() -> None:
    kit = Kit()
    choices = kit.complete(["ab", "c"], prompt_logprobs=0).json["choices"]
    b = str(kit.ids("b")[0])
    assert choices[0]["prompt_logprobs"] == [
        None,
        {b: {"logprob": -0.25, "rank": None, "decoded_token": "b"}},
    ]
    assert choices[1]["prompt_logprobs"] == [None]


@pytest.mark.parametrize("path", ["chat", "completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_timings(path: str, stream: bool) -> None:
    kit = Kit()
    kit.says("1234")
    kit.scheduler.cached_tokens = 1
    ask = {"timings_per_token": True, "stream": stream, "n": 2}
    result = kit.chat(**ask) if path == "chat" else kit.complete(**ask)
    last = events(result)[-2] if stream else result.json
    if stream:
        assert last["choices"] == []
        assert "usage" not in last
    timings = last["timings"]
    assert [timings[name] for name in ("queue_ms", "prompt_ms", "predicted_ms")] == [100, 200, 300]
    assert (timings["cache_n"], timings["predicted_n"]) == (1, 10)
    assert timings["predicted_per_second"] == pytest.approx(8 / 0.3)
    assert timings["prompt_per_second"] == pytest.approx(timings["prompt_n"] / 0.2)


@pytest.mark.parametrize("path", ["chat", "completions"])
def test_usage_in_every_chunk(path: str) -> None:
    kit = Kit()
    kit.says("ab")
    ask = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    chunks = events(kit.chat(**ask) if path == "chat" else kit.complete(**ask))[:-1]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 3
    if path == "chat":
        assert counts[0] == 0
    assert chunks[-1]["choices"] == []


# --- completions alone -------------------------------------------------------------------------------------


def test_echo() -> None:
    kit = Kit()
    kit.says(" there")
    assert kit.complete("hi", echo=True).json["choices"][0]["text"] == "hi there"
    assert kit.complete(kit.ids("hi"), echo=True).json["choices"][0]["text"] == "hi there"
    texts = [choice["text"] for choice in kit.complete(["a", "b"], n=2, echo=True).json["choices"]]
    assert texts == ["a there", "a there", "b there", "b there"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_echo_with_logprobs(stream: bool, bos: bool) -> None:
    kit = Kit(bos=bos)
    kit.says("cd", end=False)
    result = kit.complete("éb", echo=True, logprobs=1, n=2, stream=stream)
    choices = [event["choices"][0] for event in events(result)[:-1]] if stream else result.json["choices"]
    for index in (0, 1):
        own = [choice for choice in choices if choice["index"] == index]
        lists = {
            key: [item for choice in own if choice["logprobs"] for item in choice["logprobs"][key]]
            for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        assert "".join(choice["text"] for choice in own) == "ébcd"
        first = ["<|begin|>"] if bos else []
        assert lists["tokens"] == [*first, "bytes:\\xc3", "bytes:\\xa9", "b", "c", "d"]
        assert lists["text_offset"] == [*([0] if bos else []), 0, 0, 1, 2, 3]
        assert lists["token_logprobs"][0] is None
        assert lists["top_logprobs"][0] is None
        assert lists["token_logprobs"][1:] == [-0.25] * (len(lists["tokens"]) - 1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("logprobs", [None, 2])
def test_the_prompt_alone(stream: bool, logprobs: int | None) -> None:
    """What evaluation harnesses ask for: the log-probabilities of a text, and nothing generated."""
    kit = Kit()
    result = kit.complete("abc", echo=True, max_tokens=0, logprobs=logprobs, stream=stream)
    choices = [event["choices"][0] for event in events(result)[:-1]] if stream else result.json["choices"]
    assert "".join(choice["text"] for choice in choices) == "abc"
    assert choices[-1]["finish_reason"] == "length"
    if not stream:
        assert result.json["usage"]["completion_tokens"] == 0
    if logprobs:
        assert choices[0]["logprobs"]["tokens"] == ["a", "b", "c"]
        assert len(choices[0]["logprobs"]["top_logprobs"][2]) == 2
    else:
        assert all(choice["logprobs"] is None for choice in choices)


def test_the_best_of_several_are_returned() -> None:
    kit = Kit()
    kit.says("worst", "best", "fair", "w", "b", "f")
    kit.scheduler.logprob_of = lambda submit: (-2.0, -3.0, -1.0)[submit.request_no % 3]
    body = kit.complete(["A", "B"], best_of=3, n=2).json
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [
        (0, "best"), (1, "fair"), (2, "b"), (3, "f"),
    ]  # fmt: skip
    assert all(choice["logprobs"] is None for choice in body["choices"])
    assert body["usage"]["completion_tokens"] == sum(
        len(text) + 1 for text in ("worst", "best", "fair", *"wbf")
    )
    assert [submit.sampling.logprobs for submit in kit.scheduler.submits] == [0] * 6


def test_best_of_counts_the_mean_and_not_the_sum() -> None:
    kit = Kit()
    kit.says("a long answer", "b")
    kit.scheduler.logprob_of = lambda submit: (-2.0, -1.0)[submit.request_no % 2]
    assert kit.complete(best_of=2, logprobs=0).json["choices"][0]["text"] == "a long answer"


def test_a_prompt_without_the_models_beginning() -> None:
    kit = Kit(bos=True)
    kit.complete("a", add_special_tokens=False)
    kit.complete("a")
    assert [unpack_ids(submit.prompt) for submit in kit.scheduler.submits] == [
        kit.ids("a"),
        [257, *kit.ids("a")],
    ]


def test_max_tokens_may_fill_the_context_exactly() -> None:
    assert _submitted("completions", prompt="abc", max_tokens=SESSION_LEN - 3).max_tokens == SESSION_LEN - 3
