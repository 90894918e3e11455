"""The prompt of a chat request, and where the thinking stands at its end. Called by ``turn.py``, off the event loop."""

from typing import Final

from msgspec import Struct

from shoal.frontend.prompts import chat_ids, continuation_ids
from shoal.frontend.reasoning import (
    Markers,
    State,
    find_markers,
    most_thinking,
    state_after,
    state_in,
    steering,
)
from shoal.frontend.schemas.chat import ChatCompletionRequest
from shoal.frontend.service import Service
from shoal.frontend.tools.choose import ToolStyle, choose
from shoal.messages import Limits, ThinkingBudget

_SEEN_TOKENS: Final = 64
"""Of a prompt's end, where its template may begin the thinking."""


class ChatPrompt(Struct, frozen=True, kw_only=True):
    """What the model is asked, and what its answer will look like."""

    ids: list[int]
    style: ToolStyle
    """Of the tool calls."""
    markers: Markers | None = None
    """Of the thinking; None: it does not think, or is not to be told apart."""
    state: State = "after"
    """Of the thinking, at the end of the prompt."""
    closing_ids: tuple[int, ...] = ()
    """The tokens that end the thinking, as the tokenizer spells its end."""
    budget: ThinkingBudget | None = None


def chat_prompt(
    service: Service, limits: Limits, request: ChatCompletionRequest, given: list[int] | None = None
) -> ChatPrompt:
    """Renders and tokenises ``request``, unless its tokens are ``given``. Where thinking is limited it is begun, since
    the limit counts from the first token; where there shall be none it is ended. Raises RequestError."""
    template, tokenizer = service.template, service.tokenizer
    if request.chat_template:
        template = template.replaced(request.chat_template)
    markers = None if _is_raw(request) else find_markers(service.settings.reasoning_parser, template)
    most = most_thinking(request, markers)
    ids = given or chat_ids(service, limits, request)
    style = choose(service.settings.tool_call_parser, template, tokenizer)
    if markers is None:
        return ChatPrompt(ids=ids, style=style)
    begun = _begun_answer(request)
    state = state_in(markers, begun) if begun else state_after(markers, _end_of(service, ids))
    added, state = steering(markers, state, most)
    closing_ids = tuple(continuation_ids(tokenizer, markers.closing))
    return ChatPrompt(
        ids=[*ids, *continuation_ids(tokenizer, added)] if added else ids,
        style=style,
        markers=markers,
        state=state,
        closing_ids=closing_ids,
        budget=ThinkingBudget(most, closing_ids) if most is not None and state == "within" else None,
    )


def _is_raw(request: ChatCompletionRequest) -> bool:
    """Whether the prompt is a text to be continued, so that the answer is one too."""
    return request.do_preprocess is False or (isinstance(request.messages, str) and not request.input_ids)


def _begun_answer(request: ChatCompletionRequest) -> str:
    """The message that the model is to go on with, where there is one."""
    if not request.continue_final_message or isinstance(request.messages, str) or not request.messages:
        return ""
    content = request.messages[-1].content or ""
    return content if isinstance(content, str) else "".join(part.text or "" for part in content)


def _end_of(service: Service, ids: list[int]) -> str:
    return service.tokenizer.decode(ids[-_SEEN_TOKENS:], skip_special=False)
