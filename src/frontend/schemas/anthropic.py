"""The body of POST /v1/messages, its answer and the events of its stream: Anthropic's Messages API."""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Struct, UnsetType

from shoal.frontend.schemas.base import RequestBody, Whole, doc

_CACHE = doc("A hint; equal beginnings of prompts are always cached.", {"type": "ephemeral"})


class TextBlock(RequestBody, tag_field="type", tag="text"):
    """Text."""

    text: Annotated[str, doc("The text.", "Hello")]
    cache_control: Annotated[Any, _CACHE] = None
    citations: Annotated[Any, doc("Not available.", None, neutral=([],))] = None


class SystemBlock(RequestBody, kw_only=True):
    """A part of the system prompt."""

    type: Annotated[Literal["text"], doc("Always `text`.", "text")]
    text: Annotated[str, doc("The text.", "Answer briefly.")]
    cache_control: Annotated[Any, _CACHE] = None
    citations: Annotated[Any, doc("Not available.", None, neutral=([],))] = None


class ThinkingBlock(RequestBody, tag_field="type", tag="thinking"):
    """What the model thought in an earlier turn."""

    thinking: Annotated[str, doc("The thoughts.", "The user wants a greeting.")]
    signature: Annotated[str, doc("As it was answered; not checked.", "shoal")] = ""


class RedactedThinkingBlock(RequestBody, tag_field="type", tag="redacted_thinking"):
    """Thoughts of another server, which cannot be read: left out of the prompt."""

    data: Annotated[str, doc("Opaque.", "…")]


class ToolUseBlock(RequestBody, tag_field="type", tag="tool_use"):
    """A tool call of an earlier turn."""

    id: Annotated[str, doc("Names the call.", "toolu_0123456789abcdef")]
    name: Annotated[str, doc("The tool.", "get_weather")]
    input: Annotated[dict[str, Any], doc("Its arguments.", {"city": "Paris"})]
    cache_control: Annotated[Any, _CACHE] = None
    caller: Annotated[Any, doc("A hint.", None)] = None


class ImageBlock(RequestBody, tag_field="type", tag="image"):
    """An image; refused, since no model that reads images is served."""

    source: Annotated[Any, doc("The image.", {"type": "url", "url": "https://example.org/a.png"})]
    cache_control: Annotated[Any, _CACHE] = None


class DocumentBlock(RequestBody, tag_field="type", tag="document"):
    """A document; only plain text is read."""

    source: Annotated[
        dict[str, Any], doc("The document.", {"type": "text", "media_type": "text/plain", "data": "Paris is…"})
    ]
    title: Annotated[str | None, doc("Its title.", "Facts")] = None
    context: Annotated[str | None, doc("What is known of it.", "Written in 2020.")] = None
    citations: Annotated[Any, doc("Not available.", None, neutral=({"enabled": False},))] = None
    cache_control: Annotated[Any, _CACHE] = None


class ToolResultBlock(RequestBody, tag_field="type", tag="tool_result"):
    """What a tool gave back."""

    tool_use_id: Annotated[str, doc("Of which call.", "toolu_0123456789abcdef")]
    content: Annotated[
        str | list[TextBlock | ImageBlock | DocumentBlock] | None, doc("The result.", "18 °C, sunny")
    ] = None
    is_error: Annotated[bool, doc("Whether the tool failed.", False)] = False
    cache_control: Annotated[Any, _CACHE] = None


Block = (
    TextBlock
    | ThinkingBlock
    | RedactedThinkingBlock
    | ToolUseBlock
    | ToolResultBlock
    | ImageBlock
    | DocumentBlock
)


class InputMessage(RequestBody):
    """One message of the conversation."""

    role: Annotated[Literal["user", "assistant", "system"], doc("Who said it.", "user")]
    content: Annotated[str | list[Block], doc("What was said.", "Hello! How are you?")]


class AnthropicTool(RequestBody):
    """A tool that the model may call."""

    name: Annotated[str, doc("Its name.", "get_weather")]
    input_schema: Annotated[
        dict[str, Any],
        doc("JSON Schema of its arguments.", {"type": "object", "properties": {"city": {"type": "string"}}}),
    ]
    description: Annotated[str | None, doc("What it does.", "The weather in a city.")] = None
    type: Annotated[str | None, doc("Only `custom`: the server has no tools of its own.", "custom")] = None
    strict: Annotated[bool | None, doc("Whether the arguments must match the schema.", True)] = None
    cache_control: Annotated[Any, _CACHE] = None
    eager_input_streaming: Annotated[bool | None, doc("Always so.", True)] = None
    defer_loading: Annotated[Any, doc("Not available.", None, neutral=(False,))] = None
    allowed_callers: Annotated[Any, doc("Not available.", None, neutral=(["direct"], []))] = None
    input_examples: Annotated[Any, doc("Not available.", None, neutral=([],))] = None


class AnthropicToolChoice(RequestBody):
    """Whether tools are to be called."""

    type: Annotated[
        Literal["auto", "any", "tool", "none"], doc("`auto`, `any` tool, the named `tool`, or `none`.", "auto")
    ]
    name: Annotated[str | None, doc("The tool, for `tool`.", "get_weather")] = None
    disable_parallel_tool_use: Annotated[bool, doc("At most one call an answer.", False)] = False


class Thinking(RequestBody):
    """Whether the model thinks before it answers."""

    type: Annotated[
        Literal["enabled", "disabled", "adaptive"],
        doc("`enabled`, `disabled`, or as the model likes.", "enabled"),
    ]
    budget_tokens: Annotated[Whole | None, doc("Most tokens of thinking, for `enabled`.", 1024)] = None
    display: Annotated[
        Any, doc("Only `summarized`: thoughts are shown as they are.", None, neutral=("summarized",))
    ] = None


class OutputFormat(RequestBody):
    """What the answer must look like."""

    type: Annotated[Literal["json_schema"], doc("Only `json_schema`.", "json_schema")]
    schema: Annotated[dict[str, Any], doc("JSON Schema of the answer.", {"type": "object"})]


class OutputConfig(RequestBody):
    """How the answer is to be."""

    effort: Annotated[str | None, doc("low, medium or high, for models that know it.", "medium")] = None
    format: Annotated[OutputFormat | None, doc("What it must look like.")] = None


class MessagesMetadata(RequestBody):
    """Of the request."""

    user_id: Annotated[str | None, doc("Who asks; recorded in the log.", "user-1")] = None


class CountTokensRequest(RequestBody):
    """POST /v1/messages/count_tokens; also the part of POST /v1/messages that becomes the prompt."""

    model: Annotated[str, doc("The served model's name.", "SmolLM2-135M-Instruct")]
    messages: Annotated[
        list[InputMessage], doc("The conversation.", [{"role": "user", "content": "Hello! How are you?"}])
    ]
    system: Annotated[str | list[SystemBlock] | None, doc("The system prompt.", "Answer briefly.")] = None
    tools: Annotated[list[AnthropicTool] | None, doc("What the model may call.")] = None
    tool_choice: Annotated[AnthropicToolChoice | None, doc("Whether it is to call something.")] = None
    thinking: Annotated[Thinking | None, doc("Whether it thinks first.")] = None
    output_config: Annotated[OutputConfig | None, doc("How the answer is to be.")] = None
    cache_control: Annotated[Any, _CACHE] = None
    context_management: Annotated[Any, doc("Not available.", None, neutral=({"edits": []}, {}))] = None
    mcp_servers: Annotated[Any, doc("Not available.", None, neutral=([],))] = None


class MessagesRequest(CountTokensRequest, kw_only=True):
    """POST /v1/messages."""

    max_tokens: Annotated[Whole, doc("Most tokens of the answer.", 256)]
    stream: Annotated[bool | None, doc("Answer as server-sent events.", False)] = None
    stop_sequences: Annotated[list[str] | None, doc("Texts that end the answer.", ["\n\n"])] = None
    temperature: Annotated[float | None, doc("0 is greedy; default: the model's, else 1.", 0.7)] = None
    top_p: Annotated[float | None, doc("Nucleus sampling, above 0 and up to 1.", 0.9)] = None
    top_k: Annotated[Whole | None, doc("Only the best k tokens; 0 is off.", 40)] = None
    metadata: Annotated[MessagesMetadata | None, doc("Of the request.")] = None
    service_tier: Annotated[str | None, doc("A hint: `auto` or `standard_only`.", "auto")] = None
    container: Annotated[Any, doc("Not available.", None, neutral=())] = None
    inference_geo: Annotated[Any, doc("Not available.", None, neutral=())] = None
    speed: Annotated[Any, doc("Only `standard`.", None, neutral=("standard",))] = None
    diagnostics: Annotated[Any, doc("Not available.", None, neutral=({},))] = None
    seed: Annotated[Whole | None, doc("Shoal's own: the same seed draws the same answer.", 1)] = None
    timeout: Annotated[float | None, doc("Shoal's own: seconds after which it is given up.", 30.0)] = None


# --- answers ---------------------------------------------------------------------------------------------


class TokenCount(Struct):
    """Answer of POST /v1/messages/count_tokens."""

    input_tokens: Annotated[int, doc("Tokens of the prompt.", 12)]


class MessagesUsage(Struct, kw_only=True):
    """Exact token counts."""

    input_tokens: Annotated[int, doc("Prompt tokens that were computed.", 12)]
    cache_creation_input_tokens: Annotated[
        int, doc("Always 0: what is computed is cached without a price.", 0)
    ] = 0
    cache_read_input_tokens: Annotated[int, doc("Prompt tokens that were found in the cache.", 0)] = 0
    output_tokens: Annotated[int, doc("Tokens of the answer so far.", 30)]


class AnswerText(Struct, tag_field="type", tag="text"):
    """Text of an answer."""

    text: Annotated[str, doc("The text.", "Hello!")]
    citations: Annotated[None, doc("Always null.", None)] = None


class AnswerThinking(Struct, tag_field="type", tag="thinking"):
    """What the model thought."""

    thinking: Annotated[str, doc("The thoughts.", "A greeting.")]
    signature: Annotated[str, doc("To be sent back with them.", "shoal")] = ""


class AnswerToolUse(Struct, tag_field="type", tag="tool_use"):
    """A tool call."""

    id: Annotated[str, doc("Names the call.", "toolu_0123456789abcdef")]
    name: Annotated[str, doc("The tool.", "get_weather")]
    input: Annotated[Any, doc("Its arguments.", {"city": "Paris"})]


AnswerBlock = AnswerText | AnswerThinking | AnswerToolUse


class MessagesAnswer(Struct, kw_only=True):
    """Answer of POST /v1/messages."""

    id: Annotated[str, doc("Names the answer.", "msg_0123456789abcdef")]
    type: Annotated[str, doc("Always message.", "message")] = "message"
    role: Annotated[str, doc("Always assistant.", "assistant")] = "assistant"
    model: Annotated[str, doc("Who answered.", "SmolLM2-135M-Instruct")]
    content: Annotated[list[AnswerBlock], doc("The answer.", [{"type": "text", "text": "Hello!"}])]
    stop_reason: Annotated[
        str | None, doc("end_turn, max_tokens, stop_sequence or tool_use; null while it goes on.", "end_turn")
    ] = None
    stop_sequence: Annotated[str | None, doc("Which of `stop_sequences` ended it.", None)] = None
    usage: Annotated[MessagesUsage, doc("Token counts.")]


class TextDelta(Struct, tag_field="type", tag="text_delta"):
    """More text."""

    text: Annotated[str, doc("The text.", " there")]


class ThinkingDelta(Struct, tag_field="type", tag="thinking_delta"):
    """More thoughts."""

    thinking: Annotated[str, doc("The thoughts.", " so")]


class SignatureDelta(Struct, tag_field="type", tag="signature_delta"):
    """The end of the thoughts."""

    signature: Annotated[str, doc("To be sent back with them.", "shoal")]


class InputJsonDelta(Struct, tag_field="type", tag="input_json_delta"):
    """More of a call's arguments."""

    partial_json: Annotated[str, doc("A part of their JSON text.", '{"city":')]


class MessageStart(Struct, tag_field="type", tag="message_start"):
    """First event."""

    message: Annotated[MessagesAnswer, doc("The answer, still empty.")]


class ContentBlockStart(Struct, tag_field="type", tag="content_block_start"):
    """A block begins."""

    index: Annotated[int, doc("Its place in `content`.", 0)]
    content_block: Annotated[AnswerBlock, doc("The block, still empty.", {"type": "text", "text": ""})]


class ContentBlockDelta(Struct, tag_field="type", tag="content_block_delta"):
    """A block goes on."""

    index: Annotated[int, doc("Its place in `content`.", 0)]
    delta: Annotated[
        TextDelta | ThinkingDelta | SignatureDelta | InputJsonDelta,
        doc("What is added.", {"type": "text_delta", "text": "Hello"}),
    ]


class ContentBlockStop(Struct, tag_field="type", tag="content_block_stop"):
    """A block ends."""

    index: Annotated[int, doc("Its place in `content`.", 0)]


class StopDelta(Struct):
    """How the answer ended."""

    stop_reason: Annotated[str | None, doc("As in the answer.", "end_turn")]
    stop_sequence: Annotated[str | None, doc("As in the answer.", None)]


class MessageDelta(Struct, tag_field="type", tag="message_delta"):
    """The end of the answer."""

    delta: Annotated[StopDelta, doc("How it ended.")]
    usage: Annotated[MessagesUsage, doc("Complete counts.")]


class MessageStop(Struct, tag_field="type", tag="message_stop"):
    """Last event."""


class Ping(Struct, tag_field="type", tag="ping"):
    """Keeps a silent connection open."""


MessageEvent = (
    MessageStart | ContentBlockStart | ContentBlockDelta | ContentBlockStop | MessageDelta | MessageStop | Ping
)


class AnthropicErrorDetail(Struct):
    """What went wrong."""

    type: Annotated[str, doc("A kind of error.", "not_found_error")]
    message: Annotated[str, doc("What, and what helps.", "the model 'x' is not served here")]


class AnthropicError(Struct, tag_field="type", tag="error"):
    """Every error of /v1/messages."""

    error: Annotated[AnthropicErrorDetail, doc("What went wrong.")]
    request_id: Annotated[str | UnsetType, doc("The X-Request-Id.", "0123456789abcdef")] = UNSET
