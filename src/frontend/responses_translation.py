"""From the Responses API's items to a chat request. No I/O."""

import base64
import binascii
import re
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from shoal.errors import RequestError
from shoal.frontend.prompts import invalid
from shoal.frontend.renamed import names
from shoal.frontend.schemas.chat import ChatCompletionRequest
from shoal.frontend.schemas.responses import (
    InputTokensRequest,
    ResponseItem,
    ResponsePart,
    ResponsesRequest,
    ResponseTool,
)
from shoal.frontend.unavailable import refuse_unavailable

LOGPROBS: Final = "message.output_text.logprobs"
ENCRYPTED: Final = "reasoning.encrypted_content"
_INCLUDES: Final = (
    LOGPROBS,
    ENCRYPTED,
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)
"""The others are of tools and inputs that cannot occur, and so ask for nothing."""
_ROLES: Final = ("user", "assistant", "system", "developer")
_SAME_NAME: Final = (
    "temperature", "top_p", "top_k", "min_p", "seed", "stop", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "ignore_eos", "priority", "timeout", "chat_template_kwargs", "user", "stream",
)  # fmt: skip
_PREFIX: Final = "shoal:"
NAMES_HERE: Final = [
    (re.compile(r"(tools\[\d+\])\.function"), r"\1"),
    (re.compile(r"tool_choice\.function"), "tool_choice"),
    (re.compile(r"response_format(\.json_schema)?"), "text.format"),
    (re.compile(r"messages.*"), "input"),
    *names(max_tokens="max_output_tokens", reasoning_effort="reasoning.effort"),
]
"""What this API calls the fields of a chat request."""


def items_of(request: InputTokensRequest) -> list[ResponseItem]:
    """The items of this turn; a text is one message of the user."""
    given = request.input
    if isinstance(given, str):
        return [ResponseItem(type="message", role="user", content=given)]
    if not given:
        raise invalid("input", "must not be empty")
    return given


def chat_request(request: InputTokensRequest, history: Sequence[ResponseItem]) -> ChatCompletionRequest:
    """The same question in the chat form, after ``history``. Raises RequestError for what cannot be honoured."""
    refuse_unavailable(request, "")
    messages = [{"role": "system", "content": request.instructions}] if request.instructions else []
    messages += _messages([*history, *items_of(request)], len(history))
    fields: dict[str, Any] = {"model": request.model, "messages": messages}
    fields |= _tool_fields(request)
    if request.reasoning is not None and request.reasoning.effort is not None:
        fields["reasoning_effort"] = request.reasoning.effort
    fields |= _format_fields(request)
    if isinstance(request, ResponsesRequest):
        fields |= _sampling_fields(request)
    return msgspec.convert(fields, ChatCompletionRequest)


def encrypted(reasoning: str) -> str:
    """Thoughts for a client that keeps them itself: opaque, not secret, since it has them in clear as well."""
    return _PREFIX + base64.b64encode(reasoning.encode()).decode()


def _messages(items: Sequence[ResponseItem], known: int) -> list[dict[str, Any]]:
    """``known`` items are of earlier turns; errors count from the first one after them."""
    messages: list[dict[str, Any]] = []
    thoughts = ""
    for number, item in enumerate(items):
        where = f"input[{number - known}]" if number >= known else "previous_response_id"
        kind = item.type or "message"
        if kind == "reasoning":
            thoughts += _reasoning(item, where)
            continue
        message = _message(kind, item, where)
        if message["role"] == "assistant":
            if thoughts:
                message["reasoning_content"], thoughts = thoughts, ""
            if _continues(messages, message):
                messages[-1].setdefault("tool_calls", []).extend(message["tool_calls"])
                continue
        messages.append(message)
    return messages


def _continues(messages: list[dict[str, Any]], message: dict[str, Any]) -> bool:
    """A call belongs to the assistant's message, or to the call, that it follows."""
    return bool(messages) and messages[-1]["role"] == "assistant" and "tool_calls" in message


def _message(kind: str, item: ResponseItem, where: str) -> dict[str, Any]:
    match kind:
        case "message":
            if item.role not in _ROLES:
                raise invalid(f"{where}.role", f"must be one of {', '.join(_ROLES)}")
            if item.content is None:
                raise invalid(f"{where}.content", "must not be null")
            return {"role": item.role, "content": _text(item.content, f"{where}.content")}
        case "function_call":
            if item.call_id is None or item.name is None or item.arguments is None:
                raise invalid(where, "a function_call needs call_id, name and arguments")
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            return {"role": "assistant", "content": "", "tool_calls": [call]}
        case "function_call_output":
            if item.call_id is None or item.output is None:
                raise invalid(where, "a function_call_output needs call_id and output")
            return {
                "role": "tool",
                "tool_call_id": item.call_id,
                "content": _text(item.output, f"{where}.output"),
            }
    message = (
        f"{where}.type: {kind[:40]!r} is not read; message, function_call, function_call_output, reasoning are"
    )
    raise RequestError(400, message, param=f"{where}.type", code="not_available")


def _reasoning(item: ResponseItem, where: str) -> str:
    parts = item.content or item.summary
    if parts:
        return _text(parts, f"{where}.content")
    sealed = item.encrypted_content
    if sealed is None:
        return ""
    try:
        if not sealed.startswith(_PREFIX):
            raise ValueError(sealed)
        return base64.b64decode(sealed.removeprefix(_PREFIX), validate=True).decode()
    except (binascii.Error, ValueError) as error:
        name = f"{where}.encrypted_content"
        raise invalid(name, "was not made by this server; leave the reasoning item out") from error


def _text(content: str | list[ResponsePart], where: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for number, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text
        if text is None:
            place = f"{where}[{number}]"
            message = f"{place}: this model reads only text, no {part.type.removeprefix('input_')}"
            raise RequestError(400, message, param=place, code="not_available")
        texts.append(text)
    return "".join(texts)


def _tool_fields(request: InputTokensRequest) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if request.tools:
        fields["tools"] = [_tool(tool, f"tools[{number}]") for number, tool in enumerate(request.tools)]
    if request.tool_choice is not None:
        fields["tool_choice"] = _choice(request.tool_choice)
    if request.parallel_tool_calls is not None:
        fields["parallel_tool_calls"] = request.parallel_tool_calls
    return fields


def _tool(tool: ResponseTool, where: str) -> dict[str, Any]:
    if tool.type != "function":
        message = f"{where}.type: the server has no tool {tool.type[:40]!r} of its own; only functions"
        raise RequestError(400, message, param=f"{where}.type", code="not_available")
    if not tool.name:
        raise invalid(f"{where}.name", "must not be empty")
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.parameters or {}}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _choice(choice: str | dict[str, Any]) -> Any:
    if isinstance(choice, str):
        return choice
    if choice.get("type") == "function" and isinstance(choice.get("name"), str):
        return {"type": "function", "function": {"name": choice["name"]}}
    if choice.get("type") == "allowed_tools" and isinstance(choice.get("tools"), list):
        tools = [_choice(tool) for tool in choice["tools"] if isinstance(tool, dict)]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode", "auto"), "tools": tools}}
    raise invalid("tool_choice", "must be auto, none, required, a function's type and name, or allowed_tools")


def _format_fields(request: InputTokensRequest) -> dict[str, Any]:
    wanted = request.text.format if request.text is not None else None
    if wanted is None or wanted.type == "text":
        return {}
    if wanted.type == "json_object":
        return {"response_format": {"type": "json_object"}}
    if wanted.schema is None:
        raise invalid("text.format.schema", "must be given for json_schema")
    schema = {"name": wanted.name or "answer", "schema": wanted.schema, "strict": wanted.strict}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def _sampling_fields(request: ResponsesRequest) -> dict[str, Any]:
    for name in request.include or ():
        if name not in _INCLUDES:
            raise invalid("include", f"{name[:80]!r} is not known; {LOGPROBS} and {ENCRYPTED} are")
    fields = {name: getattr(request, name) for name in _SAME_NAME}
    fields["max_tokens"] = request.max_output_tokens
    if LOGPROBS in (request.include or ()) or request.top_logprobs:
        fields |= {"logprobs": True, "top_logprobs": request.top_logprobs or 0}
    return {name: value for name, value in fields.items() if value is not None}
