"""From Anthropic's messages to a chat request, and from an answer to content blocks. No I/O."""

import json
import re
from typing import Any, Final

import msgspec

from shoal.errors import RequestError
from shoal.frontend.prompts import invalid
from shoal.frontend.renamed import names
from shoal.frontend.schemas.anthropic import (
    AnswerBlock,
    AnswerText,
    AnswerThinking,
    AnswerToolUse,
    AnthropicTool,
    AnthropicToolChoice,
    CountTokensRequest,
    DocumentBlock,
    ImageBlock,
    InputMessage,
    MessagesRequest,
    RedactedThinkingBlock,
    SystemBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from shoal.frontend.schemas.chat import ChatCompletionRequest
from shoal.frontend.turn import WholeAnswer
from shoal.frontend.unavailable import refuse_unavailable

SIGNATURE: Final = "shoal"
"""Stands where Anthropic signs thoughts; thoughts that come back are taken as they are."""
NAMES_HERE: Final = [
    (re.compile(r"(tools\[\d+\])\.function\.parameters"), r"\1.input_schema"),
    (re.compile(r"(tools\[\d+\])\.function"), r"\1"),
    (re.compile(r"tool_choice\.function"), "tool_choice"),
    (re.compile(r"response_format(\.json_schema)?"), "output_config.format"),
    (re.compile(r"messages.*"), "messages"),
    *names(
        stop="stop_sequences",
        reasoning_effort="output_config.effort",
        thinking_token_budget="thinking.budget_tokens",
        enable_thinking="thinking",
    ),
]
"""What this API calls the fields of a chat request."""
_EFFORTS: Final = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
_STOP_REASONS: Final = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def chat_request(request: CountTokensRequest) -> ChatCompletionRequest:
    """The same question in the chat form. Raises RequestError for what cannot be honoured."""
    refuse_unavailable(request, "")
    fields: dict[str, Any] = {"model": request.model, "messages": _messages(request)}
    fields |= _tool_fields(request.tools or [], request.tool_choice)
    fields |= _thinking_fields(request)
    if isinstance(request, MessagesRequest):
        fields |= _sampling_fields(request)
    if request.messages and request.messages[-1].role == "assistant":
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    return msgspec.convert(fields, ChatCompletionRequest)


def blocks(answer: WholeAnswer) -> list[AnswerBlock]:
    """An answer as content blocks."""
    content: list[AnswerBlock] = []
    if answer.reasoning:
        content.append(AnswerThinking(answer.reasoning, SIGNATURE))
    if answer.text:
        content.append(AnswerText(answer.text))
    content += [AnswerToolUse(call_id(call.id), call.name, arguments(call.arguments)) for call in answer.calls]
    return content


def stop(finish_reason: str, stop_reason: str | int | None) -> tuple[str, str | None]:
    """Anthropic's ``stop_reason`` and ``stop_sequence``."""
    if finish_reason == "stop" and isinstance(stop_reason, str):
        return "stop_sequence", stop_reason
    return _STOP_REASONS.get(finish_reason, "end_turn"), None


def call_id(ours: str) -> str:
    """In Anthropic's form."""
    return "toolu_" + ours.removeprefix("call_").removeprefix("toolu_")


def arguments(text: str) -> Any:
    """A call's arguments; a call that was cut off has none that can be read."""
    try:
        return msgspec.json.decode(text) if text else {}
    except (msgspec.DecodeError, RecursionError):
        return {}


def _messages(request: CountTokensRequest) -> list[dict[str, Any]]:
    if not request.messages:
        raise invalid("messages", "must not be empty")
    messages: list[dict[str, Any]] = []
    if request.system:
        text = request.system if isinstance(request.system, str) else _joined(request.system)
        messages.append({"role": "system", "content": text})
    for number, message in enumerate(request.messages):
        messages += _translated(message, f"messages[{number}]")
    return messages


def _joined(parts: list[SystemBlock]) -> str:
    return "\n\n".join(part.text for part in parts)


def _translated(message: InputMessage, where: str) -> list[dict[str, Any]]:
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for number, block in enumerate(message.content):
        place = f"{where}.content[{number}]"
        match block:
            case ThinkingBlock(thinking=thinking) if message.role == "assistant":
                thoughts.append(thinking)
            case RedactedThinkingBlock() if message.role == "assistant":
                pass
            case ToolUseBlock() if message.role == "assistant":
                function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
                calls.append({"id": block.id, "type": "function", "function": function})
            case ToolResultBlock() if message.role == "user":
                results.append(_result(block, place))
            case TextBlock() | ImageBlock() | DocumentBlock():
                texts.append(_text(block, place))
            case _:
                kind = type(block).__struct_config__.tag
                raise invalid(place, f"a block of type {kind} cannot stand in a message of the {message.role}")
    if message.role != "assistant":
        spoken = [{"role": message.role, "content": "\n".join(texts)}] if texts or not results else []
        return results + spoken
    answer: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        answer["reasoning_content"] = "\n".join(thoughts)
    if calls:
        answer["tool_calls"] = calls
    return [answer]


def _result(block: ToolResultBlock, place: str) -> dict[str, Any]:
    content = block.content
    if isinstance(content, list):
        content = "\n".join(_text(part, f"{place}.content[{number}]") for number, part in enumerate(content))
    text = f"error: {content or ''}" if block.is_error else content or ""
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": text}


def _text(block: TextBlock | ImageBlock | DocumentBlock, place: str) -> str:
    match block:
        case TextBlock(text=text):
            return text
        case DocumentBlock(source={"type": "text", "data": str(text)}):
            return "\n".join(part for part in (block.title, block.context, text) if part)
        case DocumentBlock():
            message = f"{place}: of documents only source.type text is read"
            raise RequestError(400, message, param=place, code="not_available")
        case ImageBlock():
            message = f"{place}: this model reads only text, no images"
            raise RequestError(400, message, param=place, code="not_available")


def _tool_fields(tools: list[AnthropicTool], choice: AnthropicToolChoice | None) -> dict[str, Any]:
    if not tools:
        if choice is not None and choice.type in ("any", "tool"):
            raise invalid("tool_choice", "needs tools")
        return {}
    fields: dict[str, Any] = {"tools": [_tool(tool, f"tools[{number}]") for number, tool in enumerate(tools)]}
    if choice is None:
        return fields
    if (choice.type == "tool") != (choice.name is not None):
        raise invalid("tool_choice.name", "names the tool of type tool, and of no other type")
    named = {"type": "function", "function": {"name": choice.name}}
    fields["tool_choice"] = {"auto": "auto", "any": "required", "none": "none", "tool": named}[choice.type]
    if choice.disable_parallel_tool_use:
        fields["parallel_tool_calls"] = False
    return fields


def _tool(tool: AnthropicTool, where: str) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        message = f"{where}.type: the server has no tool {tool.type[:40]!r} of its own; only custom tools"
        raise RequestError(400, message, param=f"{where}.type", code="not_available")
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _thinking_fields(request: CountTokensRequest) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    config, thinking = request.output_config, request.thinking
    if config is not None and config.format is not None:
        schema = {"name": "answer", "schema": config.format.schema, "strict": True}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    if config is not None and config.effort is not None:
        if config.effort not in _EFFORTS:
            raise invalid("output_config.effort", f"must be one of {', '.join(_EFFORTS)}")
        fields["reasoning_effort"] = _EFFORTS[config.effort]
    if thinking is not None and thinking.type == "enabled":
        fields["enable_thinking"] = True
        fields["thinking_token_budget"] = thinking.budget_tokens
    elif thinking is not None and thinking.type == "disabled":
        fields["chat_template_kwargs"] = {"enable_thinking": False}
    return fields


def _sampling_fields(request: MessagesRequest) -> dict[str, Any]:
    if request.service_tier not in (None, "auto", "standard_only"):
        raise invalid("service_tier", "must be auto or standard_only")
    fields = {
        "max_tokens": request.max_tokens,
        "stream": request.stream,
        "stop": request.stop_sequences or None,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "seed": request.seed,
        "timeout": request.timeout,
        "user": request.metadata.user_id if request.metadata is not None else None,
    }
    return {name: value for name, value in fields.items() if value is not None}
