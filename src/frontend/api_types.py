"""The bodies of the OpenAI routes, in and out, as msgspec structs. Field names are the contract: see API.md.

A field that the contract has and Shoal does not honour yet is declared with the values that ask for nothing
(``neutral``); ``checks.py`` refuses all others. Numbers that stand for integers are ``Whole``: 64.0 is 64.
"""

from typing import Annotated, Any, Final, get_args, get_type_hints

import msgspec
from msgspec import UNSET, Struct, UnsetType

Whole = int | float
_NEUTRAL: Final = "neutral"


def neutral(*values: Any) -> msgspec.Meta:
    """Marks a field that is not available yet; null and ``values`` are accepted, since they ask for nothing."""
    return msgspec.Meta(extra={_NEUTRAL: values})


class RequestBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """Base of what clients send."""


class TextPart(RequestBody):
    """One part of a message's content."""

    type: str
    text: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None
    refusal: str | None = None
    cache_control: Any = None


class CalledFunction(RequestBody):
    """What a tool call names."""

    name: str
    arguments: str | dict[str, Any] = ""


class ToolCall(RequestBody):
    """A call in the history."""

    function: CalledFunction
    id: str | None = None
    type: str = "function"
    index: int | None = None


class ChatMessage(RequestBody):
    """One message of the conversation."""

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    function_call: Annotated[Any, neutral()] = None
    audio: Annotated[Any, neutral()] = None
    annotations: Annotated[Any, neutral([])] = None


class StreamOptions(RequestBody):
    """What a stream carries besides text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Annotated[Any, neutral(False)] = None


class GenerationRequest(RequestBody):
    """What both routes take."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: Whole | None = None
    n: Whole | None = None
    max_tokens: Whole | None = None
    stop: str | list[str] | bool | None = None
    stop_token_ids: list[Whole] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    timeout: float | None = None

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: Annotated[Any, neutral("auto", "default")] = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None

    kwargs: Annotated[Any, neutral({})] = None
    session_id: Annotated[Any, neutral(-1)] = None
    adapter_name: Annotated[Any, neutral("")] = None
    image_url: Annotated[Any, neutral("", [])] = None
    spaces_between_special_tokens: Annotated[Any, neutral(True)] = None
    min_tokens: Annotated[Any, neutral(0)] = None
    min_new_tokens: Annotated[Any, neutral(0)] = None
    include_stop_str_in_output: Annotated[Any, neutral(False)] = None
    bad_words: Annotated[Any, neutral([])] = None
    allowed_token_ids: Annotated[Any, neutral([])] = None
    input_ids: Annotated[Any, neutral([])] = None
    return_token_ids: Annotated[Any, neutral(False)] = None
    guided_json: Annotated[Any, neutral()] = None
    guided_regex: Annotated[Any, neutral("")] = None
    guided_choice: Annotated[Any, neutral([])] = None
    guided_grammar: Annotated[Any, neutral("")] = None
    structured_outputs: Annotated[Any, neutral()] = None
    response_format: Annotated[Any, neutral({"type": "text"})] = None
    priority: Annotated[Any, neutral(0)] = None
    cache_salt: Annotated[Any, neutral("")] = None
    prompt_logprobs: Annotated[Any, neutral()] = None
    timings_per_token: Annotated[Any, neutral(False)] = None
    repetition_detection: Annotated[Any, neutral(False)] = None
    do_preprocess: Annotated[Any, neutral(True)] = None


class ChatCompletionRequest(GenerationRequest, kw_only=True):
    """POST /v1/chat/completions."""

    messages: str | list[ChatMessage]
    max_completion_tokens: Whole | None = None
    logprobs: bool | None = None
    top_logprobs: Whole | None = None

    tools: Annotated[Any, neutral([])] = None
    tool_choice: Annotated[Any, neutral("none", "auto")] = None
    parallel_tool_calls: Annotated[Any, neutral(True, False)] = None
    functions: Annotated[Any, neutral([])] = None
    function_call: Annotated[Any, neutral("none", "auto")] = None
    modalities: Annotated[Any, neutral(["text"])] = None
    audio: Annotated[Any, neutral()] = None
    prediction: Annotated[Any, neutral()] = None
    moderation: Annotated[Any, neutral()] = None
    reasoning_effort: Annotated[Any, neutral("none")] = None
    verbosity: Annotated[Any, neutral("medium")] = None
    web_search_options: Annotated[Any, neutral()] = None
    add_generation_prompt: Annotated[Any, neutral(True)] = None
    continue_final_message: Annotated[Any, neutral(False)] = None
    chat_template: Annotated[Any, neutral("")] = None
    chat_template_kwargs: Annotated[Any, neutral({})] = None
    enable_thinking: Annotated[Any, neutral()] = None
    thinking_token_budget: Annotated[Any, neutral()] = None


class CompletionRequest(GenerationRequest, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    logprobs: Whole | bool | None = None

    top_logprobs: Annotated[Any, neutral(0)] = None
    echo: Annotated[Any, neutral(False)] = None
    suffix: Annotated[Any, neutral("")] = None
    best_of: Whole | None = None


def neutral_values(body: type[RequestBody]) -> dict[str, tuple[Any, ...]]:
    """The fields of ``body`` that are not available yet, each with the values that ask for nothing."""
    hints = get_type_hints(body, include_extras=True)
    return {
        name: meta.extra[_NEUTRAL]
        for name, hint in hints.items()
        for meta in get_args(hint)
        if isinstance(meta, msgspec.Meta) and meta.extra is not None and _NEUTRAL in meta.extra
    }


# --- answers ---------------------------------------------------------------------------------------------


class PromptDetails(Struct):
    """Of the prompt's tokens, those whose keys and values were found in the prefix cache."""

    cached_tokens: int = 0


class Usage(Struct):
    """Exact token counts; a prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class ChatTopLogprob(Struct):
    """A candidate at one position."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatTopLogprob):
    """The sampled token at one position, and its best rivals."""

    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(Struct):
    """Log-probabilities in the chat form."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class CompletionLogprobs(Struct):
    """Log-probabilities in the completions form: parallel lists."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class AnswerMessage(Struct):
    """The assistant's answer."""

    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(Struct):
    """One of n answers."""

    index: int
    message: AnswerMessage
    finish_reason: str
    stop_reason: str | int | None = None
    logprobs: ChatLogprobs | None = None


class ChatCompletion(Struct):
    """Answer of POST /v1/chat/completions."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    object: str = "chat.completion"
    service_tier: str | UnsetType = UNSET


class Delta(Struct):
    """What a chunk adds to the message."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(Struct):
    """What a chunk adds to one choice."""

    index: int
    delta: Delta
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    logprobs: ChatLogprobs | None = None


class ChatChunk(Struct):
    """One event of a streamed chat completion."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET
    object: str = "chat.completion.chunk"


class CompletionChoice(Struct):
    """One answer, or what a chunk adds to it."""

    index: int
    text: str
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: CompletionLogprobs | None = None


class Completion(Struct):
    """Answer of POST /v1/completions; also one event of its stream."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET
    object: str = "text_completion"
