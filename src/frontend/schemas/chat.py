"""The body of POST /v1/chat/completions, its answer and the chunks of its stream."""

from typing import Annotated, Any

from msgspec import UNSET, Struct, UnsetType

from shoal.frontend.schemas.base import GenerationRequest, RequestBody, Whole, doc
from shoal.frontend.schemas.tools import (
    AnswerCall,
    AnswerFunction,
    CallChunk,
    FunctionDefinition,
    FunctionDelta,
    FunctionName,
    Tool,
    ToolChoice,
)
from shoal.frontend.schemas.usage import PromptLogprobs, Timings, Usage

_TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
_MESSAGES = [{"role": "user", "content": "Hello! How are you?"}]


class TextPart(RequestBody):
    """One part of a message's content."""

    type: Annotated[str, doc("`text`: the served models read nothing else.", "text")]
    text: Annotated[str | None, doc("The text.", "What is in a name?")] = None
    image_url: Annotated[Any, doc("For models that see; refused here.", None)] = None
    input_audio: Annotated[Any, doc("For models that hear; refused here.", None)] = None
    file: Annotated[Any, doc("For models that read files; refused here.", None)] = None
    refusal: Annotated[str | None, doc("Why an earlier answer refused; refused here.", None)] = None
    cache_control: Annotated[
        Any, doc("A hint where a cached prefix ends; every prefix is cached here.", {"type": "ephemeral"})
    ] = None
    prompt_cache_breakpoint: Annotated[
        Any, doc("A hint where a cached prefix ends; every prefix is cached here.", None)
    ] = None


class CalledFunction(RequestBody):
    """What a tool call names."""

    name: Annotated[str, doc("The function.", "get_weather")]
    arguments: Annotated[
        str | dict[str, Any], doc("Its arguments: JSON text, or the object itself.", '{"city": "Paris"}')
    ] = ""


class ToolCall(RequestBody):
    """A call in the history."""

    function: Annotated[CalledFunction, doc("What is called.", {"name": "get_weather", "arguments": "{}"})]
    id: Annotated[str | None, doc("Names the call, for the tool's answer.", "call_1")] = None
    type: Annotated[str, doc("`function`.", "function")] = "function"
    index: Annotated[Whole | None, doc("Of the call in its message, as streams have it.", 0)] = None


class ChatMessage(RequestBody):
    """One message of the conversation."""

    role: Annotated[
        str,
        doc("`system` (or `developer`), `user`, `assistant`, `tool` (or `function`, its older name).", "user"),
    ]
    content: Annotated[
        str | list[TextPart] | None,
        doc(
            "The text, or a list of its parts; null only where an assistant called tools.",
            "Hello! How are you?",
        ),
    ] = None
    name: Annotated[str | None, doc("Who speaks, where the template shows it.", "Ada")] = None
    tool_calls: Annotated[
        list[ToolCall] | None, doc("What the assistant called.", [{"function": {"name": "get_weather"}}])
    ] = None
    tool_call_id: Annotated[str | None, doc("Of a tool's message: the call that it answers.", "call_1")] = None
    reasoning_content: Annotated[
        str | None, doc("What the assistant thought, where the template shows it.", "They greet me.")
    ] = None
    refusal: Annotated[str | None, doc("As an earlier answer had it.", None)] = None
    function_call: Annotated[
        CalledFunction | None,
        doc("What `tool_calls` replaced: the one function called.", {"name": "get_weather", "arguments": "{}"}),
    ] = None
    audio: Annotated[Any, doc("For models that speak; only null.", None, neutral=())] = None
    annotations: Annotated[Any, doc("As an earlier answer had it; only [].", [], neutral=([],))] = None


class ChatCompletionRequest(GenerationRequest, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[
        str | list[ChatMessage],
        doc(
            "The conversation so far; a plain string is continued as it is, without the chat template.",
            _MESSAGES,
        ),
    ]
    logprobs: Annotated[
        bool | None, doc("The choices have the log-probability of each token. Default false.", False)
    ] = None
    top_logprobs: Annotated[
        Whole | None,
        doc("0 to 20: and those of so many likeliest tokens; only with `logprobs: true`. Default 0.", 0),
    ] = None

    # how the prompt is made

    do_preprocess: Annotated[
        bool | None,
        doc(
            "false: the contents of the messages, one after the other, are the prompt, without the chat "
            "template. Default true.",
            True,
        ),
    ] = None
    input_ids: Annotated[
        list[Whole] | None,
        doc('The prompt as token ids; `messages` must then be empty ([] or "").', [1, 9690, 198]),
    ] = None
    add_generation_prompt: Annotated[
        bool | None,
        doc("Whether the template begins the assistant's message for the model. Default true.", True),
    ] = None
    continue_final_message: Annotated[
        bool | None,
        doc(
            "The last message is left open, and the answer is what follows in it. Not together with "
            "`add_generation_prompt: true`. Default false.",
            False,
        ),
    ] = None
    chat_template: Annotated[
        str | None,
        doc(
            "A Jinja template of at most 65536 characters instead of the model's own. It runs in a sandbox "
            "with limits on time and size.",
            "{% for message in messages %}{{ message.content }}\n{% endfor %}",
        ),
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, doc("More variables for the template.", {"enable_thinking": False})
    ] = None
    enable_thinking: Annotated[
        bool | None,
        doc(
            "Whether the model thinks before it answers, where its template can say so; else true is refused. "
            "Default: the template's.",
            False,
        ),
    ] = None
    verbosity: Annotated[
        str | None,
        doc(
            "`low`, `medium` or `high`, where the model's template can say so; else only `medium` is taken. "
            "Default: the template's.",
            "medium",
        ),
    ] = None

    # tools, reasoning

    tools: Annotated[
        list[Tool] | None,
        doc("Functions that the model may call; at most 128.", [_TOOL]),
    ] = None
    tool_choice: Annotated[
        str | ToolChoice | None,
        doc(
            "`auto`: the model decides; `none`: it calls nothing, and is not told of the tools; `required`: it calls "
            "at least one; or one of them by name. A call that is asked for is held by a grammar, so that it is "
            "valid whatever the model. Default `auto`.",
            "auto",
        ),
    ] = None
    parallel_tool_calls: Annotated[
        bool | None, doc("Whether one answer may have several calls. Default true.", True)
    ] = None
    functions: Annotated[
        list[FunctionDefinition] | None,
        doc(
            "What `tools` replaced; the answer has `function_call`, and at most one.", [{"name": "get_weather"}]
        ),
    ] = None
    function_call: Annotated[
        str | FunctionName | None,
        doc("What `tool_choice` replaced: `auto`, `none` or a function's name. With `functions` only.", "auto"),
    ] = None
    reasoning_effort: Annotated[
        str | None,
        doc(
            "How much a model may think: `none`: not at all; `minimal`, `low`, `medium`: at most 512, 1024 and 4096 "
            "tokens of thinking; `high`, `xhigh`: as much as it likes. A template that knows efforts is told the "
            "word instead. A model that does not think never exceeds it. Default: as the model likes.",
            "low",
        ),
    ] = None
    thinking_token_budget: Annotated[
        Whole | None,
        doc(
            "Most tokens of thinking: then its end is forced, and the answer begins. 0: no thinking. Only for "
            "models that think. Default: none.",
            1024,
        ),
    ] = None

    # OpenAI's own that need more than a text model

    modalities: Annotated[Any, doc("What the answer is: text.", ["text"], neutral=(["text"],))] = None
    audio: Annotated[Any, doc("For models that speak; only null.", None, neutral=())] = None
    prediction: Annotated[Any, doc("A draft of the answer; only null.", None, neutral=())] = None
    moderation: Annotated[Any, doc("OpenAI's moderation; only null.", None, neutral=())] = None
    web_search_options: Annotated[Any, doc("OpenAI's web search; only null.", None, neutral=())] = None


class ChatTopLogprob(Struct):
    """A candidate at one position."""

    token: Annotated[str, doc("Its text; parts of a character show as U+FFFD.", " sky")]
    logprob: Annotated[
        float,
        doc(
            "Natural logarithm of its probability, after penalties and before temperature; -9999 is "
            "impossible.",
            -0.31,
        ),
    ]
    bytes: Annotated[list[int], doc("Its exact UTF-8 bytes.", [32, 115, 107, 121])]


class ChatTokenLogprob(ChatTopLogprob):
    """The sampled token at one position, and its best rivals."""

    top_logprobs: Annotated[list[ChatTopLogprob], doc("The likeliest tokens there, best first.", [])]


class ChatLogprobs(Struct):
    """Log-probabilities in the chat form."""

    content: Annotated[list[ChatTokenLogprob], doc("One for each token of the answer.", [])]
    refusal: Annotated[None, doc("Always null.", None)] = None


class AnswerMessage(Struct):
    """The assistant's answer."""

    content: Annotated[
        str | None, doc("The text; null where there is none beside tool calls.", "I am well, thank you!")
    ]
    role: Annotated[str, doc("`assistant`.", "assistant")] = "assistant"
    refusal: Annotated[None, doc("Always null.", None)] = None
    reasoning_content: Annotated[
        str | UnsetType, doc("What the model thought, where it did.", "They greet me.")
    ] = UNSET
    tool_calls: Annotated[
        list[AnswerCall] | UnsetType,
        doc("What it called, where it did.", [{"id": "call_1", "function": {"name": "f", "arguments": "{}"}}]),
    ] = UNSET
    function_call: Annotated[
        AnswerFunction | UnsetType, doc("The same where the request had `functions`.", None)
    ] = UNSET


class ChatChoice(Struct):
    """One of n answers."""

    index: Annotated[int, doc("Which one, from 0.", 0)]
    message: Annotated[
        AnswerMessage, doc("The answer.", {"role": "assistant", "content": "Hi!", "refusal": None})
    ]
    finish_reason: Annotated[
        str,
        doc(
            "`stop`: the model or a stop string ended it, or it made the call that `tool_choice` names; "
            "`tool_calls` (`function_call`): it called tools; `length`: its tokens were used up; `repetition`: "
            "it went in circles; `abort`: somebody ended it.",
            "stop",
        ),
    ]
    stop_reason: Annotated[
        str | int | None, doc("The stop string or stop id that ended it; null for the model's own end.", None)
    ] = None
    logprobs: Annotated[ChatLogprobs | None, doc("Where they were asked for.", None)] = None
    token_ids: Annotated[
        list[int] | UnsetType, doc("The tokens of the answer, the one that ended it included.", [57, 2])
    ] = UNSET


class ChatCompletion(Struct):
    """Answer of POST /v1/chat/completions."""

    id: Annotated[str, doc("Names this answer: `chatcmpl-` and the request's id.", "chatcmpl-5f2c")]
    created: Annotated[int, doc("When it was made, Unix seconds.", 1767225600)]
    model: Annotated[str, doc("The served model.", "SmolLM2-135M-Instruct")]
    choices: Annotated[list[ChatChoice], doc("The answers.", [])]
    usage: Annotated[Usage, doc("Exact token counts.", {})]
    system_fingerprint: Annotated[str, doc("Which server, and which version of it.", "shoal-0.1.0")]
    object: Annotated[str, doc("`chat.completion`.", "chat.completion")] = "chat.completion"
    service_tier: Annotated[str | UnsetType, doc("`default`, where the request named a tier.", "default")] = (
        UNSET
    )
    metadata: Annotated[dict[str, str] | UnsetType, doc("As the request gave it.", {"topic": "demo"})] = UNSET
    prompt_logprobs: Annotated[
        PromptLogprobs | UnsetType,
        doc("Where asked for: for each prompt token, by token id, itself and its likeliest rivals.", [None]),
    ] = UNSET
    prompt_token_ids: Annotated[
        list[int] | UnsetType, doc("Where asked for: the tokens of the prompt.", [1, 9690])
    ] = UNSET
    timings: Annotated[Timings | UnsetType, doc("Where asked for: how long it took.", {})] = UNSET


class Delta(Struct):
    """What a chunk adds to the message."""

    role: Annotated[str | UnsetType, doc("In a choice's first chunk: `assistant`.", "assistant")] = UNSET
    content: Annotated[str | UnsetType, doc("More text.", " sky")] = UNSET
    reasoning_content: Annotated[str | UnsetType, doc("More of what the model thinks.", " so")] = UNSET
    tool_calls: Annotated[
        list[CallChunk] | UnsetType, doc("More of its calls.", [{"index": 0, "function": {"arguments": "}"}}])
    ] = UNSET
    function_call: Annotated[
        FunctionDelta | UnsetType, doc("The same where the request had `functions`.", {"arguments": "}"})
    ] = UNSET


class ChatChunkChoice(Struct):
    """What a chunk adds to one choice."""

    index: Annotated[int, doc("Which one, from 0.", 0)]
    delta: Annotated[Delta, doc("What is new.", {"content": " sky"})]
    finish_reason: Annotated[str | None, doc("In a choice's last chunk: why it ended.", None)] = None
    stop_reason: Annotated[
        str | int | UnsetType | None, doc("In a choice's last chunk: the stop string or id.", None)
    ] = UNSET
    logprobs: Annotated[ChatLogprobs | None, doc("Of the chunk's tokens, where asked for.", None)] = None
    token_ids: Annotated[list[int] | UnsetType, doc("The chunk's tokens, where asked for.", [57])] = UNSET


class ChatChunk(Struct):
    """One event of a streamed chat completion."""

    id: Annotated[str, doc("The same in all chunks.", "chatcmpl-5f2c")]
    created: Annotated[int, doc("When the answer began, Unix seconds.", 1767225600)]
    model: Annotated[str, doc("The served model.", "SmolLM2-135M-Instruct")]
    choices: Annotated[list[ChatChunkChoice], doc("One, or none in the chunks of the end.", [])]
    system_fingerprint: Annotated[str, doc("Which server, and which version of it.", "shoal-0.1.0")]
    usage: Annotated[
        Usage | UnsetType | None,
        doc("Where `stream_options` ask for it; null but in the chunk that has it.", None),
    ] = UNSET
    object: Annotated[str, doc("`chat.completion.chunk`.", "chat.completion.chunk")] = "chat.completion.chunk"
    service_tier: Annotated[str | UnsetType, doc("`default`, where the request named a tier.", "default")] = (
        UNSET
    )
    prompt_token_ids: Annotated[
        list[int] | UnsetType, doc("In the first chunk, where asked for: the tokens of the prompt.", [1, 9690])
    ] = UNSET
    timings: Annotated[
        Timings | UnsetType, doc("In a chunk of the end, where asked for: how long it took.", {})
    ] = UNSET
