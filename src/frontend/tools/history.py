"""Conversations with calls and results in them, as a model's chat template can show them. Called by ``prompts.py``."""

import json
from collections.abc import Sequence
from typing import Any

from shoal.errors import RequestError
from shoal.frontend.chat_template import ChatTemplate, normalise_messages
from shoal.frontend.tools.choose import ToolStyle
from shoal.frontend.tools.format import ToolFormat

Message = dict[str, Any]


def render(
    template: ChatTemplate,
    style: ToolStyle,
    messages: Sequence[Message],
    tools: Sequence[Message],
    **options: Any,
) -> str:
    """The prompt of a conversation with ``tools``. Raises RequestError."""
    current = [_without_function_call(message, number) for number, message in enumerate(messages)]
    try:
        if not style.by_template:
            return template.render(rewritten(style.format, current, tools), **options)
        return _rendered(template, current, tools, options)
    except RecursionError as error:
        raise RequestError(
            400, "messages: a call's arguments are nested too deeply", param="messages"
        ) from error


def _rendered(
    template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Message], options: dict[str, Any]
) -> str:
    """By a template that knows tools. Most take the arguments of calls as objects; some put text together, and need
    strings."""
    objects = [_with_arguments(message, _object) for message in messages]
    try:
        return template.render(objects, tools=tools or None, **options)
    except RequestError:
        texts = [_with_arguments(message, _text) for message in messages]
        if texts == objects:
            raise
        return template.render(texts, tools=tools or None, **options)


def rewritten(form: ToolFormat, messages: Sequence[Message], tools: Sequence[Message]) -> list[Message]:
    """The conversation in plain messages: calls and results are written out as the model would see them."""
    plain: list[Message] = []
    for message in normalise_messages(messages):
        if message["role"] == "tool":
            _add_result(form, plain, message["content"])
        else:
            plain.append(_written_out(form, message))
    return form.introduced(plain, tools) if tools else plain


def _add_result(form: ToolFormat, plain: list[Message], text: str) -> None:
    """Results that stand together are one message: many templates want the roles to alternate."""
    role, content = form.result(text)
    if plain and plain[-1].get("brings results"):
        plain[-1]["content"] += f"\n{content}"
    else:
        plain.append({"role": role, "content": content, "brings results": True})


def _written_out(form: ToolFormat, message: Message) -> Message:
    calls = [
        {"name": call["function"]["name"], "arguments": _object(call["function"].get("arguments"))}
        for call in message.get("tool_calls") or ()
    ]
    if not calls:
        return message
    content = "\n".join(filter(None, [message["content"], form.spelled(calls)]))
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**rest, "content": content}


def _without_function_call(message: Message, number: int) -> Message:
    """What ``functions`` had, in the form of ``tools``."""
    if message["role"] == "function":
        return {**message, "role": "tool"}
    if message.get("function_call") is None:
        return message
    rest = {name: value for name, value in message.items() if name != "function_call"}
    call = {"id": f"call{number:05}", "type": "function", "function": message["function_call"]}
    return {**rest, "tool_calls": [call]}


def _with_arguments(message: Message, form: Any) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": form(call["function"].get("arguments"))}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _object(arguments: Any) -> Any:
    """Arguments as an object, where their text is one."""
    if not isinstance(arguments, str):
        return arguments or {}
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
