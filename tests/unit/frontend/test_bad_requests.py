"""The table of bad input: each gets a clear error in OpenAI's shape, and nothing reaches the scheduler."""

import asyncio
import json
from typing import Any

import pytest
from frontend_kit import Kit

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
OBFUSCATED = {"include_obfuscation": True}
LOOPS = {"max_pattern_size": 20, "min_count": 4}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}

MALFORMED = [
    (b"", "truncated (byte 0)"),
    (b"{", "truncated (byte 1)"),
    (b"hello", "byte 0"),
    (b'{"prompt": "a"} {}', "byte 17"),
    (b'{"prompt": "a", "temperature": NaN}', "byte 31"),
    (b'{"prompt": "a", "temperature": Infinity}', "byte 31"),
    (b'{"prompt": "a", "temperature": -Infinity}', "byte 32"),
    (b'{"prompt": "a\xff"}', "byte 13"),
    (b'{"prompt": "\xed\xa0\x80"}', "byte 12"),
    (b'{"prompt": "\\ud800"}', "byte 20"),
    (b'{"prompt": "a", "user": "\xc3("}', "byte 25"),
    (b'{"prompt": "a", "stream": true,}', "byte 31"),
    (b'{"prompt": "a", "kwargs": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", "nested too deeply (byte "),
    (
        b'{"prompt": "a", "kwargs": ' + b'{"a":' * 20_000 + b"1" + b"}" * 20_000 + b"}",
        "nested too deeply (byte ",
    ),
]

WRONG_TYPES: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"messages": 5}, "messages"),
    (CHAT, {"messages": [{"role": 1, "content": "a"}]}, "messages[0].role"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
        "messages[0].content[0].text",
    ),
    (CHAT, {"messages": [{"role": "user"}, "hi"]}, "messages[1]"),
    (CHAT, {"messages": HI, "temperature": "hot"}, "temperature"),
    (CHAT, {"messages": HI, "temperature": True}, "temperature"),
    (CHAT, {"messages": HI, "n": "3"}, "n"),
    (CHAT, {"messages": HI, "stream": "yes"}, "stream"),
    (CHAT, {"messages": HI, "stop": [1]}, "stop[0]"),
    (CHAT, {"messages": HI, "metadata": {"a": 1}}, "metadata[...]"),
    (CHAT, {"messages": HI, "bad_words": "x"}, "bad_words"),
    (CHAT, {"messages": HI, "logit_bias": {"5": "x"}}, "logit_bias[...]"),
    (
        CHAT,
        {"messages": HI, "stream_options": {"include_usage": 1}, "stream": True},
        "stream_options.include_usage",
    ),
    (COMPLETIONS, {"prompt": {"a": 1}}, "prompt"),
    (COMPLETIONS, {"prompt": [1.5]}, "prompt[0]"),
    (COMPLETIONS, {"prompt": [[1, "a"]]}, "prompt[0][1]"),
    (COMPLETIONS, {"prompt": None}, "prompt"),
]

BAD_VALUES: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": [{"role": "wizard", "content": "a"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    (CHAT, {"messages": HI, "temperature": -0.1}, "temperature"),
    (CHAT, {"messages": HI, "temperature": 2.01}, "temperature"),
    (CHAT, {"messages": HI, "top_p": 0}, "top_p"),
    (CHAT, {"messages": HI, "top_p": 1.5}, "top_p"),
    (CHAT, {"messages": HI, "top_k": -2}, "top_k"),
    (CHAT, {"messages": HI, "top_k": 1.5}, "top_k"),
    (CHAT, {"messages": HI, "min_p": 1.01}, "min_p"),
    (CHAT, {"messages": HI, "repetition_penalty": 0}, "repetition_penalty"),
    (CHAT, {"messages": HI, "repetition_penalty": 1e-300}, "repetition_penalty"),
    (CHAT, {"messages": HI, "presence_penalty": 2.5}, "presence_penalty"),
    (CHAT, {"messages": HI, "frequency_penalty": -2.5}, "frequency_penalty"),
    (CHAT, {"messages": HI, "seed": 1 << 63}, "seed"),
    (CHAT, {"messages": HI, "seed": -(1 << 63) - 1}, "seed"),
    (CHAT, {"messages": HI, "seed": 1.5}, "seed"),
    (CHAT, {"messages": HI, "max_tokens": 0}, "max_tokens"),
    (CHAT, {"messages": HI, "max_tokens": -5}, "max_tokens"),
    (CHAT, {"messages": HI, "max_completion_tokens": -5}, "max_completion_tokens"),
    (CHAT, {"messages": HI, "max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    (CHAT, {"messages": HI, "n": 0}, "n"),
    (CHAT, {"messages": HI, "n": 17}, "n"),
    (CHAT, {"messages": HI, "stop": [f"s{i}" for i in range(10_000)]}, "stop"),
    (CHAT, {"messages": HI, "stop": ["x" * 1025]}, "stop"),
    (CHAT, {"messages": HI, "stop": ["a", ""]}, "stop"),
    (CHAT, {"messages": HI, "stop": True}, "stop"),
    (CHAT, {"messages": HI, "stop_token_ids": [258]}, "stop_token_ids"),
    (CHAT, {"messages": HI, "stop_token_ids": [-1]}, "stop_token_ids"),
    (CHAT, {"messages": HI, "logit_bias": {"258": 1}}, "logit_bias"),
    (CHAT, {"messages": HI, "logit_bias": {"-1": 1}}, "logit_bias"),
    (CHAT, {"messages": HI, "logit_bias": {"x": 1}}, "logit_bias"),
    (CHAT, {"messages": HI, "logit_bias": {"²": 1}}, "logit_bias"),
    (CHAT, {"messages": HI, "logit_bias": {"5": 1, "05": -1}}, "logit_bias"),
    (CHAT, {"messages": HI, "logit_bias": {"5": 101}}, "logit_bias.5"),
    (CHAT, {"messages": HI, "top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    (CHAT, {"messages": HI, "top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"messages": HI, "timeout": 0}, "timeout"),
    (CHAT, {"messages": HI, "stream_options": {"include_usage": True}}, "stream_options"),
    (CHAT, {"messages": HI, "min_tokens": -1}, "min_tokens"),
    (CHAT, {"messages": HI, "min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    (CHAT, {"messages": HI, "min_tokens": 5, "min_new_tokens": 4}, "min_tokens"),
    (CHAT, {"messages": HI, "bad_words": [" "]}, "bad_words"),
    (CHAT, {"messages": HI, "bad_words": ["x" * 257]}, "bad_words"),
    (CHAT, {"messages": HI, "bad_words": ["x"] * 257}, "bad_words"),
    (CHAT, {"messages": HI, "allowed_token_ids": [258]}, "allowed_token_ids"),
    (CHAT, {"messages": HI, "allowed_token_ids": [1.5]}, "allowed_token_ids"),
    (CHAT, {"messages": HI, "allowed_token_ids": [1] * 259}, "allowed_token_ids"),
    (CHAT, {"messages": HI, "priority": 1 << 40}, "priority"),
    (CHAT, {"messages": HI, "priority": 0.5}, "priority"),
    (CHAT, {"messages": HI, "cache_salt": "x" * 1025}, "cache_salt"),
    (CHAT, {"messages": HI, "prompt_logprobs": 21}, "prompt_logprobs"),
    (CHAT, {"messages": HI, "prompt_logprobs": -1}, "prompt_logprobs"),
    (CHAT, {"messages": HI, "prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
    (CHAT, {"messages": HI, "repetition_detection": True}, "repetition_detection"),
    (
        CHAT,
        {"messages": HI, "repetition_detection": LOOPS | {"min_count": 1}},
        "repetition_detection.min_count",
    ),
    (
        CHAT,
        {"messages": HI, "repetition_detection": LOOPS | {"max_pattern_size": 257}},
        "repetition_detection.max_pattern_size",
    ),
    (
        CHAT,
        {"messages": HI, "repetition_detection": LOOPS | {"min_pattern_size": 21}},
        "repetition_detection.min_pattern_size",
    ),
    (CHAT, {"messages": HI, "metadata": {str(n): "x" for n in range(17)}}, "metadata"),
    (CHAT, {"messages": HI, "metadata": {"k" * 65: "x"}}, "metadata"),
    (CHAT, {"messages": HI, "metadata": {"k": "x" * 513}}, "metadata"),
    (CHAT, {"messages": HI, "safety_identifier": "x" * 65}, "safety_identifier"),
    (CHAT, {"messages": HI, "prompt_cache_retention": "a week"}, "prompt_cache_retention"),
    (CHAT, {"messages": HI, "input_ids": [1]}, "input_ids"),
    (CHAT, {"messages": [], "input_ids": [258]}, "input_ids"),
    (
        CHAT,
        {"messages": HI, "add_generation_prompt": True, "continue_final_message": True},
        "continue_final_message",
    ),
    (CHAT, {"messages": HI, "chat_template": "x" * 65537}, "chat_template"),
    (CHAT, {"messages": HI, "chat_template": "{{a}}" * 6000}, "chat_template"),
    (CHAT, {"messages": HI, "chat_template": "{% for"}, "chat_template"),
    (CHAT, {"messages": HI, "chat_template": "{{ x|nofilter }}"}, "chat_template"),
    (CHAT, {"messages": HI, "chat_template": "{{" + "(" * 9000 + ")" * 9000 + "}}"}, "chat_template"),
    (CHAT, {"messages": HI, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    (CHAT, {"messages": HI, "chat_template_kwargs": {"a b": 1}}, "chat_template_kwargs"),
    (CHAT, {"messages": "hi", "chat_template": "x"}, "chat_template"),
    (CHAT, {"messages": "hi", "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
    (CHAT, {"messages": HI, "do_preprocess": False, "enable_thinking": True}, "enable_thinking"),
    (CHAT, {"messages": [], "input_ids": [1], "verbosity": "low"}, "verbosity"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "best_of": 17}, "best_of"),
    (COMPLETIONS, {"prompt": "a", "best_of": 2, "n": 3}, "best_of"),
    (COMPLETIONS, {"prompt": "a", "best_of": 2, "stream": True}, "best_of"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": ""}, "prompt"),
    (COMPLETIONS, {"prompt": [[]]}, "prompt[0]"),
    (COMPLETIONS, {"prompt": ["a", 5]}, "prompt"),
    (COMPLETIONS, {"prompt": [5, 258]}, "prompt"),
    (COMPLETIONS, {"prompt": [[5], [-1]]}, "prompt[1]"),
    (COMPLETIONS, {"prompt": ["a"] * 257}, "prompt"),
    (COMPLETIONS, {"prompt": ["a"] * 100, "n": 3}, "n"),
    (COMPLETIONS, {"prompt": "a", "logprobs": 21}, "logprobs"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 10**400}, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "seed": 1e300}, "seed"),
    (COMPLETIONS, {"prompt": "a", "logprobs": True}, "logprobs"),
]

UNAVAILABLE: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"messages": HI, "chat_template_kwargs": {"mood": 1}}, "chat_template_kwargs.mood"),
    (CHAT, {"messages": HI, "kwargs": {"a": 1}}, "kwargs"),
    (CHAT, {"messages": HI, "service_tier": "flex"}, "service_tier"),
    (CHAT, {"messages": HI, "image_url": "http://x/y.png"}, "image_url"),
    (CHAT, {"messages": HI, "enable_thinking": True}, "enable_thinking"),
    (CHAT, {"messages": HI, "verbosity": "low"}, "verbosity"),
    (CHAT, {"messages": HI, "modalities": ["text", "audio"]}, "modalities"),
    (CHAT, {"messages": HI, "prediction": {"type": "content", "content": "a"}}, "prediction"),
    (CHAT, {"messages": HI, "web_search_options": {}}, "web_search_options"),
    (CHAT, {"messages": HI, "stream": True, "stream_options": OBFUSCATED}, "stream_options.include_obfuscation"),
    (CHAT, {"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]"),
    (CHAT, {"messages": [{"role": "assistant", "content": "a", "audio": {"id": "x"}}]}, "messages[0].audio"),
    (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "suffix"),
    (COMPLETIONS, {"prompt": "a", "top_logprobs": 2}, "top_logprobs"),
    (COMPLETIONS, {"prompt": "a", "do_preprocess": True}, "do_preprocess"),
]  # fmt: skip

UNKNOWN: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"messages": HI, "temprature": 1}, "temprature"),
    (CHAT, {"messages": [{"role": "user", "content": "a", "colour": 1}]}, "messages[0].colour"),
    (CHAT, {"messages": HI, "stream": True, "stream_options": {"foo": 1}}, "stream_options.foo"),
    (COMPLETIONS, {"prompt": "a", "messages": []}, "messages"),
]


@pytest.fixture(scope="module")
def kit() -> Kit:
    return Kit()


def _refused(kit: Kit, path: str, body: object, status: int, param: str | None, code: str) -> str:
    result = kit.post(path, body)
    assert result.status_code == status, result.text
    error = result.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code)
    assert error["type"] == "invalid_request_error"
    assert kit.scheduler.submits == []
    return str(error["message"])


@pytest.mark.parametrize(("raw", "says"), MALFORMED, ids=lambda value: str(value)[:24])
def test_malformed_json(kit: Kit, raw: bytes, says: str) -> None:
    assert says in _refused(kit, COMPLETIONS, raw, 400, None, "malformed_json")


@pytest.mark.parametrize(("path", "body", "param"), WRONG_TYPES, ids=lambda value: str(value)[:40])
def test_wrong_types_name_the_field(kit: Kit, path: str, body: dict[str, Any], param: str) -> None:
    assert param in _refused(kit, path, body, 400, param, "invalid_type")


@pytest.mark.parametrize(("path", "body", "param"), BAD_VALUES, ids=lambda value: str(value)[:40])
def test_bad_values_name_the_field(kit: Kit, path: str, body: dict[str, Any], param: str) -> None:
    message = _refused(
        kit,
        path,
        body,
        400,
        param,
        "too_many_choices" if param == "n" and "prompt" in body else "invalid_value",
    )
    assert param in message


@pytest.mark.parametrize(("path", "body", "param"), UNAVAILABLE, ids=lambda value: str(value)[:40])
def test_what_cannot_be_honoured_is_refused(kit: Kit, path: str, body: dict[str, Any], param: str) -> None:
    assert param in _refused(kit, path, body, 400, param, "not_available")


@pytest.mark.parametrize(("path", "body", "param"), UNKNOWN, ids=lambda value: str(value)[:40])
def test_unknown_fields_are_refused(kit: Kit, path: str, body: dict[str, Any], param: str) -> None:
    assert param in _refused(kit, path, body, 400, param, "unknown_field")


@pytest.mark.parametrize(("path", "name"), [(CHAT, "messages"), (COMPLETIONS, "prompt")])
def test_missing_fields_are_named(kit: Kit, path: str, name: str) -> None:
    _refused(kit, path, {}, 400, name, "missing_field")


@pytest.mark.parametrize("raw", [b"null", b"[]", b'"text"', b"5", b"[" * 5000])
def test_a_body_that_is_no_object(kit: Kit, raw: bytes) -> None:
    assert "object" in _refused(kit, CHAT, raw, 400, None, "invalid_type")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_body_that_is_too_large(kit: Kit, path: str) -> None:
    _refused(kit, path, b'{"prompt": "' + b"x" * (10 << 20) + b'"}', 413, None, "body_too_large")


def test_a_body_one_byte_too_large(kit: Kit) -> None:
    result = kit.post(COMPLETIONS, b"x" * ((8 << 20) + 1))
    assert result.status_code == 413


def test_an_announced_body_is_dropped_before_the_refusal(kit: Kit) -> None:
    """Whoever sent Expect: 100-continue has been told to continue by then."""
    result = kit.post(CHAT, b"x" * (10 << 20), Expect="100-continue")
    assert result.json["error"]["code"] == "body_too_large"


@pytest.mark.parametrize("came", [b"", b'{"prompt": "a"}'])
def test_a_body_shorter_than_announced(kit: Kit, came: bytes) -> None:
    """The HTTP server tells a body that did not come in time as a disconnect."""
    answer = call(kit, "http", came, content_length=500)
    assert answer[0]["status"] == 408
    assert json.loads(answer[1]["body"])["error"]["param"] == "Content-Length"
    assert kit.scheduler.submits == []


def test_a_websocket_is_refused(kit: Kit) -> None:
    assert call(kit, "websocket") == [{"type": "websocket.close"}]


def call(kit: Kit, kind: str, body: bytes = b"", content_length: int = 0) -> list[dict[str, Any]]:
    """What the application sends to a client that disconnects after ``body``."""
    headers = [(b"host", b"localhost"), (b"content-length", str(content_length).encode())]
    scope = {
        "type": kind, "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": COMPLETIONS, "query_string": b"", "headers": headers, "root_path": "",
    }  # fmt: skip
    incoming = [{"type": "http.request", "body": body, "more_body": True}] if body else []
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return incoming.pop() if incoming else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(kit.app(scope, receive, send))
    return sent


def test_a_compressed_body(kit: Kit) -> None:
    assert kit.post(CHAT, b"\x1f\x8b", **{"Content-Encoding": "gzip"}).status_code == 415


@pytest.mark.parametrize("body", [{"x" * 99_999: 1, "prompt": "a"}, {"model": "x" * 99_999, "prompt": "a"}])
def test_errors_quote_only_the_beginning_of_what_is_long(kit: Kit, body: dict[str, Any]) -> None:
    result = kit.post(COMPLETIONS, body)
    assert result.status_code in (400, 404)
    assert 1000 < len(result.content) < 4000


def test_an_unknown_model_is_told_the_served_one(kit: Kit) -> None:
    for path, body in ((CHAT, {"messages": HI}), (COMPLETIONS, {"prompt": "a"})):
        result = kit.post(path, {"model": "internlm-chat-7b", **body})
        assert result.status_code == 404
        error = result.json["error"]
        assert (error["type"], error["code"], error["param"]) == ("not_found_error", "model_not_found", "model")
        assert "served/model" in error["message"]


@pytest.mark.parametrize(
    ("path", "body"), [(CHAT, {"messages": "x" * 200}), (COMPLETIONS, {"prompt": "x" * 200})]
)
def test_a_prompt_that_fills_the_context(kit: Kit, path: str, body: dict[str, Any]) -> None:
    message = _refused(kit, path, body, 400, next(iter(body)), "context_length_exceeded")
    assert "200 tokens" in message
    assert "201" in message


def test_more_tokens_than_fit_are_refused_with_the_numbers(kit: Kit) -> None:
    message = _refused(
        kit, COMPLETIONS, {"prompt": "abc", "max_tokens": 198}, 400, "prompt", "context_length_exceeded"
    )
    assert "200 tokens, but 201 were asked for (3 in the prompt, 198 in the answer)" in message


@pytest.mark.parametrize("value", ["soon", "nan", "-1", "0", "inf"])
def test_a_bad_timeout_header(kit: Kit, value: str) -> None:
    result = kit.post(COMPLETIONS, {"prompt": "a"}, **{"X-Request-Timeout": value})
    assert result.status_code == 400
    assert result.json["error"]["param"] == "X-Request-Timeout"


@pytest.mark.parametrize("value", ["a b", "x" * 129, "ü", "a;b"])
def test_a_bad_request_id(kit: Kit, value: str) -> None:
    result = kit.post(COMPLETIONS, {"prompt": "a"}, **{"X-Request-Id": value})
    assert result.status_code == 400
    assert result.json["error"]["param"] == "X-Request-Id"


def test_unknown_routes_and_methods(kit: Kit) -> None:
    unknown = kit.get("/v2/models")
    assert unknown.status_code == 404
    assert unknown.json["error"]["code"] == "unknown_route"
    wrong = kit.get(CHAT)
    assert wrong.status_code == 405
    assert wrong.json["error"]["code"] == "method_not_allowed"
    assert "POST" in wrong.headers["allow"]


@pytest.mark.parametrize(
    ("path", "body"), [(CHAT, {"messages": "a<|begin|>"}), (COMPLETIONS, {"prompt": ["a", "a<|begin|>"]})]
)
def test_a_text_with_a_token_that_the_model_has_no_row_for(path: str, body: dict[str, Any]) -> None:
    kit = Kit()
    kit.service.vocab_size = 257
    result = kit.post(path, body)
    assert result.status_code == 400
    assert "<|begin|>" in result.json["error"]["message"]
    assert "257" in result.json["error"]["message"]
    assert kit.scheduler.submits == []


def test_an_adapter_that_is_not_served(kit: Kit) -> None:
    result = kit.post(CHAT, {"messages": HI, "adapter_name": "poet"})
    assert result.status_code == 404
    assert result.json["error"]["code"] == "adapter_not_found"
    assert "poet" in result.json["error"]["message"]


def test_a_server_for_embeddings_does_not_generate() -> None:
    kit = Kit(task="embed")
    for path, body in ((CHAT, {"messages": HI}), (COMPLETIONS, {"prompt": "a"})):
        result = kit.post(path, body)
        assert (result.status_code, result.json["error"]["code"]) == (400, "wrong_task")
        assert "--task embed" in result.json["error"]["message"]


def test_errors_carry_what_clients_of_lmdeploy_read(kit: Kit) -> None:
    body = kit.post(CHAT, {"messages": []}).json
    assert (body["object"], body["code"], body["message"]) == ("error", 400, body["error"]["message"])


def test_chat_without_a_template() -> None:
    kit = Kit(template=None)
    assert "chat template" in kit.chat().json["error"]["message"]
    kit.says("raw")
    assert kit.post(CHAT, {"messages": "hi"}).json["choices"][0]["message"]["content"] == "raw"
