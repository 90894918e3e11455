"""Texts and conversations to a prompt's token ids, with bounded work however long they are. Called by the
routes, off the event loop."""

from typing import Any, Final

import msgspec

from shoal.errors import RequestError
from shoal.frontend.chat_template import ChatTemplate
from shoal.frontend.reasoning import thinking_variables
from shoal.frontend.schemas.chat import ChatCompletionRequest, ChatMessage
from shoal.frontend.service import Service
from shoal.frontend.tools import choose, history
from shoal.frontend.tools.wish import as_template_has_it, tool_wish
from shoal.frontend.values import invalid as invalid
from shoal.frontend.values import not_available, prompt_ids
from shoal.messages import Limits
from shoal.tokenizer import Tokenizer

_ROLES: Final = ("system", "developer", "user", "assistant", "tool", "function")
_PROBE_CHARACTERS_A_TOKEN: Final = 16
"""Texts longer than this many characters for each token of the context are probed first."""
_BEFORE: Final = "\n"
_OWN_VARIABLES: Final = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
)


def text_ids(service: Service, limits: Limits, text: str, *, add_special: bool, field: str) -> list[int]:
    """Token ids of ``text``. A text whose beginning alone is twice the context is refused without its rest."""
    probe = limits.session_len * _PROBE_CHARACTERS_A_TOKEN
    if len(text) > 2 * probe:
        tokens = len(service.tokenizer.encode(text[:probe], add_special=add_special))
        if tokens > 2 * limits.session_len:
            raise overflow(limits, field, f"far more than {tokens} tokens are in the {field}")
    ids = service.tokenizer.encode(text, add_special=add_special)
    if ids and max(ids) >= service.vocab_size:
        raise _without_embedding(service, max(ids), field)
    return ids


def _without_embedding(service: Service, token_id: int, field: str) -> RequestError:
    """Tokens are added to tokenizers, [PAD] for one, whose models were never given rows for them."""
    spelled = service.tokenizer.token_bytes(token_id).decode("utf-8", "replace")
    message = (
        f"{field}: {spelled[:40]!r} is token {token_id}, which this model has no embedding for "
        f"(0 to {service.vocab_size - 1}); leave it out"
    )
    return RequestError(400, message, param=field, code="invalid_value")


def overflow(limits: Limits, field: str, numbers: str) -> RequestError:
    """The refusal of what does not fit the context."""
    message = (
        f"this server's context length is {limits.session_len} tokens, but {numbers}; shorten the {field}, "
        "ask for fewer tokens, or start the server with a larger --session_len"
    )
    return RequestError(400, message, param=field, code="context_length_exceeded")


def continuation_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of ``text`` as it goes on within a text: without the space that some tokenizers put before one."""
    if not tokenizer.strips_first_space:
        return tokenizer.encode(text, add_special=False)
    before = tokenizer.encode(_BEFORE, add_special=False)
    whole = tokenizer.encode(_BEFORE + text, add_special=False)
    if whole[: len(before)] == before:
        return whole[len(before) :]
    return tokenizer.encode(text, add_special=False)


def chat_ids(service: Service, limits: Limits, request: ChatCompletionRequest) -> list[int]:
    """The prompt's token ids of a chat request: its messages through the chat template, or what it gives instead."""
    messages = request.messages
    if request.input_ids:
        if messages:
            raise invalid("input_ids", "stand for the whole prompt: messages must be empty beside them")
        _refuse_wishes(request, "input_ids stand for the whole prompt: leave it out, or send messages")
        return prompt_ids(service, "input_ids", request.input_ids)
    if not messages:
        raise invalid("messages", "must not be empty")
    if isinstance(messages, str) or request.do_preprocess is False:
        why = "needs the chat template: send messages as a list, and no do_preprocess: false"
        if request.chat_template:
            raise invalid("chat_template", why)
        _refuse_wishes(request, why)
    if isinstance(messages, str):
        return text_ids(service, limits, messages, add_special=True, field="messages")
    if request.do_preprocess is False:
        return text_ids(service, limits, _raw_text(messages), add_special=True, field="messages")
    text = chat_text(service, messages, request)
    return text_ids(service, limits, text, add_special=False, field="messages")


def _refuse_wishes(request: ChatCompletionRequest, why: str) -> None:
    """What a request says to the template is refused where none is rendered."""
    for name, neutral in (("chat_template_kwargs", {}), ("enable_thinking", False), ("verbosity", "medium")):
        if getattr(request, name) not in (None, neutral):
            raise invalid(name, why)


def chat_text(
    service: Service,
    messages: list[ChatMessage],
    request: ChatCompletionRequest | None = None,
    *,
    to_answer: bool = True,
) -> str:
    """The prompt of a conversation, for the model to answer, rendered as ``request`` wants it. Without a request, the
    conversation alone where there is nothing ``to_answer``."""
    for number, message in enumerate(messages):
        _check_message(message, f"messages[{number}]")
    template, wanted = service.template, service.settings.tool_call_parser
    if request is None:
        style = choose.choose(wanted, template, service.tokenizer)
        return history.render(template, style, _plain(messages), (), add_generation_prompt=to_answer)
    if request.chat_template:
        template = template.replaced(request.chat_template)
    continues = bool(request.continue_final_message)
    if continues and request.add_generation_prompt:
        raise invalid("continue_final_message", "contradicts add_generation_prompt: true; give one of them")
    wish = tool_wish(request)
    if wish is not None and wanted == choose.NONE:
        raise not_available(wish.field, "this server was started with --tool_call_parser none; leave them out")
    return history.render(
        template,
        choose.choose(wanted, template, service.tokenizer),
        _plain(messages),
        [as_template_has_it(function) for function in wish.functions] if wish is not None else [],
        add_generation_prompt=request.add_generation_prompt is not False and not continues,
        continue_final_message=continues,
        **template_variables(template, request),
    )


def template_variables(template: ChatTemplate, request: ChatCompletionRequest) -> dict[str, Any]:
    """What a request gives the template besides its messages. A wish that the template does not look at is refused."""
    variables = thinking_variables(template, request) | (request.chat_template_kwargs or {})
    for name in variables:
        if not name.isidentifier() or name in _OWN_VARIABLES:
            raise invalid("chat_template_kwargs", f"{name[:40]!r} cannot be set here")
    for name, value in (request.chat_template_kwargs or {}).items():
        if value and not template.reads(name):
            field = f"chat_template_kwargs.{name[:40]}"
            raise not_available(field, "this model's chat template does not read it; leave it out")
    for name, wish, neutral in (
        ("enable_thinking", request.enable_thinking, False),
        ("verbosity", request.verbosity, "medium"),
    ):
        if wish is None:
            continue
        if template.reads(name):
            variables.setdefault(name, wish)
        elif wish != neutral:
            raise not_available(name, "this model's chat template does not know it; leave it out")
    return variables


def _raw_text(messages: list[ChatMessage]) -> str:
    """The contents, one after the other and with nothing between them."""
    for number, message in enumerate(messages):
        _check_message(message, f"messages[{number}]")
    contents = [message.content or "" for message in messages]
    return "".join(
        [text if isinstance(text, str) else "".join([part.text or "" for part in text]) for text in contents]
    )


def _check_message(message: ChatMessage, where: str) -> None:
    if message.role not in _ROLES:
        raise invalid(f"{where}.role", f"must be one of {', '.join(_ROLES)}, not {message.role[:40]!r}")
    if not isinstance(message.content, list):
        if message.content is None and message.role != "assistant":
            raise invalid(f"{where}.content", "must not be null")
        return
    for number, part in enumerate(message.content):
        if part.type != "text" or part.text is None:
            name = f"{where}.content[{number}]"
            raise RequestError(
                400, f"{name}: this model reads only text parts", param=name, code="not_available"
            )


def _plain(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """As dictionaries without what was not given; a template tells absent from null."""
    plain = [without_nulls(msgspec.to_builtins(message)) for message in messages]
    for message in plain:
        message.setdefault("content", None)
        if message["role"] == "developer":
            message["role"] = "system"
    return plain


def without_nulls(value: Any) -> Any:
    """What was given of a message, at any depth; the arguments of a call are as they are."""
    if isinstance(value, dict):
        return {
            key: item if key == "arguments" else without_nulls(item)
            for key, item in value.items()
            if item is not None
        }
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def chat_characters(request: ChatCompletionRequest) -> int:
    """About how much text there is to tokenise. A template that came with the request counts as much: it is a
    stranger's program, which may take long."""
    messages = request.messages
    if request.chat_template:
        return 1 << 20
    if isinstance(messages, str):
        return len(messages)
    return sum(_content_characters(message) for message in messages)


def _content_characters(message: ChatMessage) -> int:
    if isinstance(message.content, list):
        return 64 + sum(len(part.text or "") for part in message.content)
    return 64 + len(message.content or "")
