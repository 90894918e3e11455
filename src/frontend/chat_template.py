"""Messages to prompt text, by the Jinja template that comes with a model. Called by ``chat.py``.

The result is what Hugging Face's ``apply_chat_template`` gives. Templates run in ``template_sandbox.py``.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

import jinja2
import jinja2.meta

from shoal.errors import ModelError, RequestError
from shoal.frontend.template_sandbox import MAX_OUTPUT_CHARS, TemplateEnvironment, check_time, time_limit
from shoal.tokenizer import Tokenizer

_MAX_SOURCE_CHARS = 1 << 20
_MAX_REQUEST_CHARS = 1 << 16
_MAX_REQUEST_TOKENS = 1 << 14
"""Compiling takes time for each, and nothing can interrupt it."""
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A model's chat template, or the want of one."""

    def __init__(
        self,
        source: str | None,
        special_tokens: Mapping[str, str],
        *,
        tool_source: str | None = None,
        origin: str = "",
    ) -> None:
        """``tool_source`` is used instead when a request has tools; ``origin`` names the file in errors."""
        self._special_tokens = dict(special_tokens)
        self._source = source
        self._template = None if source is None else _compile(source, origin)
        self._variables = _variables(source or "") | _variables(tool_source or "")
        self._tool_template = None if tool_source is None else _compile(tool_source, origin)
        self.source = f"{source or ''}{tool_source or ''}"
        """All of it, for what it tells of the model."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, path: str = "") -> "ChatTemplate":
        """The model's own template, or the one in the file that ``--chat_template`` names."""
        if not path:
            return cls(tokenizer.chat_template, tokenizer.special_tokens, tool_source=tokenizer.tool_template)
        try:
            with open(path, encoding="utf-8") as file:
                source = file.read(_MAX_SOURCE_CHARS + 1)
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"--chat_template {path}: cannot be read as a Jinja template: {error}") from error
        return cls(source, tokenizer.special_tokens, origin=f"--chat_template {path}: ")

    @property
    def exists(self) -> bool:
        """Whether the model can chat."""
        return self._template is not None

    @property
    def reads_tools(self) -> bool:
        """Whether the template tells the model of tools."""
        return self._tool_template is not None or self.reads("tools")

    def reads(self, name: str) -> bool:
        """Whether the template looks at a variable that is not always there (``enable_thinking``…)."""
        return name in self._variables

    def replaced(self, source: str) -> "ChatTemplate":
        """The template that a request brings along, with this one's special tokens. Raises RequestError."""
        if len(source) > _MAX_REQUEST_CHARS:
            raise _refused(f"has {len(source)} characters; at most {_MAX_REQUEST_CHARS} are taken")
        try:
            return _of_request(source, tuple(self._special_tokens.items()))
        except ModelError as error:
            raise _refused(str(error)) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt of a conversation, special tokens as text. ``kwargs`` reach the template (``enable_thinking``…).
        With ``continue_final_message`` it ends where the last message ends, for the model to go on there."""
        template = self._tool_template if tools and self._tool_template is not None else self._template
        if template is None:
            raise RequestError(
                400,
                "this model has no chat template: use /v1/completions, or start the server with --chat_template",
                param="messages",
            )
        conversation = [_with_reasoning(_without_none(message)) for message in normalise_messages(messages)]
        if continue_final_message:
            conversation[-1] = _tagged(conversation[-1])
            add_generation_prompt = False
        text = _render(
            template,
            {
                **self._special_tokens,
                **kwargs,
                "messages": conversation,
                "tools": tools,
                "documents": documents,
                "add_generation_prompt": add_generation_prompt,
            },
        )
        return _cut_at_tag(text) if continue_final_message else text


# --- messages ----------------------------------------------------------------------------------------------


def normalise_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with each content as one string: templates concatenate it. Parts of type text are joined."""
    if not messages:
        raise RequestError(400, "messages is empty: give at least one message", param="messages")
    return [
        {**message, "content": _content_text(message.get("content"), f"messages[{n}].content")}
        for n, message in enumerate(messages)
    ]


def _content_text(content: object, field: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise RequestError(400, f"{field} must be a string or a list of text parts", param=field)
    return "".join([_part_text(part, f"{field}[{n}]", field) for n, part in enumerate(content)])


def _part_text(part: object, place: str, field: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text":
        raise RequestError(400, f"{place} has type {kind!r}: this model reads text only", param=field)
    text = part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        raise RequestError(400, f"{place}.text must be a string", param=field)
    return text


def _without_none(message: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if value is not None}


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Templates read a message's reasoning under different names."""
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _tagged(message: dict[str, Any]) -> dict[str, Any]:
    if not message["content"]:
        raise RequestError(
            400,
            "continue_final_message needs a last message with content to continue",
            param="continue_final_message",
        )
    return {**message, "content": message["content"] + _TAG}


def _cut_at_tag(text: str) -> str:
    """The prompt up to the end of the last message; a template that trims contents takes their white space along."""
    place = text.rfind(_TAG.strip())
    if place < 0:
        raise RequestError(
            400,
            "this model's chat template does not show the last message as it is",
            param="continue_final_message",
        )
    return text[:place] if text.startswith(_TAG, place) else text[:place].rstrip()


# --- rendering ---------------------------------------------------------------------------------------------


def _render(template: jinja2.Template, variables: dict[str, Any]) -> str:
    try:
        with time_limit():
            return "".join(_capped(template.generate(variables)))
    except Exception as error:
        detail = str(error).strip() or type(error).__name__
        raise RequestError(
            400, f"the model's chat template refuses this conversation: {detail[:500]}", param="messages"
        ) from error


def _capped(pieces: Iterable[str]) -> Iterator[str]:
    total = 0
    for piece in pieces:
        total += len(piece)
        if total > MAX_OUTPUT_CHARS:
            raise jinja2.exceptions.SecurityError("its output is too long")
        check_time()
        yield piece


def _compile(source: str, origin: str) -> jinja2.Template:
    if len(source) > _MAX_SOURCE_CHARS:
        raise ModelError(f"{origin}the chat template is over {_MAX_SOURCE_CHARS} characters long")
    try:
        return TemplateEnvironment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(
            f"{origin}the chat template is not valid Jinja: {error.message} (line {error.lineno})"
        ) from error
    except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError, OverflowError, MemoryError) as error:
        raise ModelError(f"{origin}the chat template cannot be compiled: {type(error).__name__}") from error


@lru_cache(maxsize=16)
def _of_request(source: str, special_tokens: tuple[tuple[str, str], ...]) -> ChatTemplate:
    """Compiled once for a client that sends its template along with every request. Raises ModelError."""
    try:
        tokens = sum(1 for _ in islice(TemplateEnvironment().lex(source), _MAX_REQUEST_TOKENS + 1))
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"is not valid Jinja: {error.message} (line {error.lineno})") from error
    if tokens > _MAX_REQUEST_TOKENS:
        raise ModelError(f"has more than {_MAX_REQUEST_TOKENS} words and signs")
    with time_limit():
        return ChatTemplate(source, dict(special_tokens))


def _refused(why: str) -> RequestError:
    return RequestError(400, f"chat_template: {why}", param="chat_template", code="invalid_value")


def _variables(source: str) -> frozenset[str]:
    """The names that a template takes from outside."""
    return frozenset(jinja2.meta.find_undeclared_variables(TemplateEnvironment().parse(source)))
