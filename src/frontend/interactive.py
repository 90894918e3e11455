"""POST /v1/chat/interactive: conversations that the server keeps, as LMDeploy has them.

The store is ``storage/sessions.py``; a turn's life is in ``sessions.py``, its prompt in ``session_prompt.py``.
"""

import asyncio
import re
import time
from hashlib import blake2b
from typing import Any, Final

import falcon
import falcon.asgi
import msgspec
from msgspec import UNSET, Struct, structs

from shoal.errors import RequestError
from shoal.frontend import body, checks, stream
from shoal.frontend.exchange import exchange_of
from shoal.frontend.prompts import chat_characters
from shoal.frontend.routes import Operation, Route
from shoal.frontend.schemas.chat import ChatCompletionRequest, ChatMessage
from shoal.frontend.schemas.interactive import GenerateRequest, GenerateResponse
from shoal.frontend.service import Service, off_loop
from shoal.frontend.session_prompt import Prompt, build, context_after
from shoal.frontend.sessions import OpenSession, SessionTurn, Terms
from shoal.frontend.turn import AnswerPiece, open_turn
from shoal.frontend.values import invalid, whole
from shoal.messages import Limits
from shoal.storage.sessions import FRESH, Context, Replay

_ENCODER: Final = msgspec.json.Encoder()
_ROUTE_DEFAULTS: Final = {"temperature": 0.8, "top_p": 0.8, "top_k": 40}
_LARGEST_ID: Final = (1 << 63) - 1
_MOST_TOKENS: Final = 1 << 31
_CANCEL_PATIENCE_S: Final = 10.0
_CANCEL_POLL_S: Final = 0.02
_ABORT_PATIENCE_S: Final = 1.0
_PASSED_ON: Final = (
    "model", "seed", "min_p", "repetition_penalty", "min_new_tokens", "ignore_eos", "skip_special_tokens",
    "spaces_between_special_tokens", "adapter_name", "image_url", "timeout", "user", "kwargs",
)  # fmt: skip
"""Fields that mean here what they mean in a chat completion."""
_NAMES_HERE: Final = {"max_tokens": "request_output_len", "min_tokens": "min_new_tokens", "messages": "prompt"}
"""What this route calls the fields of a chat completion."""
_MESSAGE: Final = re.compile(r"messages\[(\d+)\]")


def routes(service: Service) -> list[Route]:
    """The interactive route."""
    return [
        Route(
            path="/v1/chat/interactive",
            resource=Interactive(service),
            operations={
                "POST": Operation(
                    summary="Say the next thing in a conversation that the server keeps",
                    description=_DESCRIPTION,
                    body=GenerateRequest,
                    answer=GenerateResponse,
                    event=GenerateResponse,
                    event_media=stream.NDJSON.media_type,
                    errors=(404, 408, 409, 413),
                )
            },
        )
    ]


_DESCRIPTION: Final = (
    "With `interactive_mode` the session goes on in the next call with the same `session_id`; one turn at a time "
    "(409). A session that is full answers with no text, `finish_reason` length and the header `X-Session-State: "
    "full`. A request that is sent again with the same `X-Request-Id` gets the same answer and is no second turn. To "
    'end a session: `{"prompt": "", "session_id": 1, "request_output_len": 0, "interactive_mode": false}`.'
)


class Interactive:
    """The route."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def on_post(self, req: falcon.asgi.Request, resp: falcon.asgi.Response) -> None:
        """Answers one turn, whole or as a stream; cancels one; ends a session."""
        await _respond(self._service, req, resp, await body.read(req, GenerateRequest))


async def answer(service: Service, req: falcon.asgi.Request, resp: falcon.asgi.Response, raw: bytes) -> None:
    """The same for a body that has been read: LMDeploy's /generate of 2023."""
    await _respond(service, req, resp, body.decode_for(req, raw, GenerateRequest))


async def _respond(
    service: Service, req: falcon.asgi.Request, resp: falcon.asgi.Response, request: GenerateRequest
) -> None:
    service.check_model(request.model)
    session = whole("session_id", request.session_id, FRESH, FRESH, _LARGEST_ID)
    if request.cancel or request.stop is True:
        _send(resp, await _cancel(service, exchange_of(req).tenant, session, request))
    elif _ends_session(request):
        _send(resp, await _end_session(service, exchange_of(req).tenant, session))
    else:
        await _run_turn(service, req, resp, request, session)


# --- a turn ----------------------------------------------------------------------------------------------


async def _run_turn(
    service: Service,
    req: falcon.asgi.Request,
    resp: falcon.asgi.Response,
    request: GenerateRequest,
    session: int,
) -> None:
    exchange, store = exchange_of(req), service.storage.sessions
    checks.check_task(service)
    call = _Call(service, req, resp, request, wanted=_wanted(request))
    terms = Terms(
        messages=_messages(request), keeps=bool(request.interactive_mode), streams=bool(request.stream)
    )
    limits = await service.switchboard.wait_ready()
    ask = store.ask(
        tenant=exchange.tenant,
        session=session,
        label=exchange.request_id,
        retryable=req.get_header("X-Request-Id") is not None,
        digest=_digest(request),
    )
    begun = await store.begin(ask)
    if isinstance(begun, Replay):
        _send_whole(call, msgspec.json.decode(begun.answer, type=GenerateResponse))
        return
    opened = OpenSession(store, ask, begun, terms)
    exchange.on_close(opened.give_up)
    try:
        await _answer_turn(call, opened, limits)
    except RequestError as error:
        opened.give_up()
        raise _in_our_words(error, len(begun.entries)) from error


class _Call(Struct, frozen=True):
    """One HTTP request."""

    service: Service
    req: falcon.asgi.Request
    resp: falcon.asgi.Response
    request: GenerateRequest
    wanted: int | None
    """Most tokens of the answer; 0: none; None: what fits."""

    @property
    def framing(self) -> stream.Framing:
        """Of a stream."""
        return stream.SSE if stream.wants_events(self.req) else stream.NDJSON


async def _answer_turn(call: _Call, opened: OpenSession, limits: Limits) -> None:
    chat = _chat_request(call, opened.history())
    context = opened.begun.context
    try:
        prompt = await off_loop(
            chat_characters(chat),
            lambda: build(call.service, limits, opened.history(), context, to_answer=call.wanted != 0),
        )
    except RequestError as error:
        if error.code != "context_length_exceeded":
            raise
        detail = f"session {opened.number} is full: {error.message.replace('messages', 'prompt')}"
        await _refuse_full(call, opened, context.tokens, 0, detail)
        return
    before = prompt.history_tokens
    added = len(prompt.ids) - before
    if before + added + (call.wanted or 1) > limits.session_len:
        detail = _full_detail(opened.number, before, added, limits, call.wanted)
        await _refuse_full(call, opened, before, added, detail)
        return
    if call.wanted == 0:
        checks.check_available(chat)
        await _keep(call, opened, prompt)
        return
    exchange = exchange_of(call.req)
    running = await open_turn(call.service, exchange, call.req, chat, prompt_ids=prompt.ids)
    turn = SessionTurn(call.service, opened, prompt, running)
    exchange.on_close(turn.leave)
    if opened.terms.streams:
        await stream.begin(call.req, call.resp, exchange, turn, _LineWriter(turn), call.framing)
        return
    while not turn.done:
        await turn.advance()
    await turn.settle()
    _send(call.resp, turn.whole())


class _LineWriter:
    """One object a piece; the last one, when the turn is recorded, says why it ended."""

    def __init__(self, turn: SessionTurn) -> None:
        self._turn = turn

    def opening(self) -> list[msgspec.Struct]:
        """Nothing before the first text."""
        return []

    def chunks(self, piece: AnswerPiece) -> list[msgspec.Struct]:
        """What the piece adds."""
        return [self._turn.line(piece.text, piece.reasoning)] if piece.text or piece.reasoning else []

    def closing(self) -> list[msgspec.Struct]:
        """The reason and the final counts."""
        return [structs.replace(self._turn.whole(), text="", reasoning_content=UNSET)]


def _full_detail(session: int, before: int, added: int, limits: Limits, wanted: int | None) -> str:
    asked = f"{wanted} for the answer" if wanted else "at least 1 for the answer"
    return (
        f"session {session} is full: {before} tokens of history, {added} of this turn and {asked} are more than its "
        f"{limits.session_len}; ask for fewer with request_output_len, end the session, or start the server with a "
        "larger --session_len"
    )


async def _refuse_full(
    call: _Call, opened: OpenSession, history_tokens: int, input_tokens: int, detail: str
) -> None:
    """The turn does not fit: nothing of it is kept. A last turn ends the session all the same."""
    full = GenerateResponse(
        text="",
        tokens=0,
        input_tokens=input_tokens,
        history_tokens=history_tokens,
        finish_reason="length",
        session_id=opened.number,
        detail=detail,
    )
    if opened.begun.exists and not opened.terms.keeps:
        await opened.end(full, [], Context())
    else:
        opened.give_up()
    call.resp.set_header("X-Session-State", "full")
    _send_whole(call, full)


async def _keep(call: _Call, opened: OpenSession, prompt: Prompt) -> None:
    """Nothing is to be generated: the messages become history, to go on from. So LMDeploy's page resumes a session."""
    before = prompt.history_tokens
    kept = _nothing(opened.number, "the messages are kept; nothing was to be answered")
    kept.history_tokens, kept.input_tokens = before, len(prompt.ids) - before
    await opened.end(kept, opened.said(), context_after(call.service, prompt, "", [], ()))
    _send_whole(call, kept)


def _send(resp: falcon.asgi.Response, response: GenerateResponse) -> None:
    resp.content_type = falcon.MEDIA_JSON
    resp.data = _ENCODER.encode(response)


def _send_whole(call: _Call, response: GenerateResponse) -> None:
    """An answer that is complete already, as a stream of one line where one was asked for."""
    if not call.request.stream:
        _send(call.resp, response)
        return
    call.resp.content_type = call.framing.media_type
    call.resp.data = call.framing.event(response) + call.framing.end


# --- no turn ---------------------------------------------------------------------------------------------


async def _cancel(service: Service, tenant: str, session: int, request: GenerateRequest) -> GenerateResponse:
    """Ends the answer that runs in the session, on whichever frontend, and waits until it is recorded."""
    if session == FRESH:
        name = "cancel" if request.cancel else "stop"
        raise invalid("session_id", f"{name}: true needs the session_id whose answer is to be ended")
    store = service.storage.sessions
    holder = await store.find_holder(tenant, session)
    detail = "cancelled" if holder is not None else "no answer was running"
    deadline_s = time.monotonic() + _CANCEL_PATIENCE_S
    while holder is not None:
        if time.monotonic() > deadline_s:
            message = f"request {holder.label} of session {session} does not end; try again"
            raise RequestError(503, message, code="not_cancelled", retry_after_s=1)
        await service.switchboard.abort(holder.label, tenant, _ABORT_PATIENCE_S)
        await asyncio.sleep(_CANCEL_POLL_S)
        holder = await store.find_holder(tenant, session)
    return _nothing(session, detail)


def _ends_session(request: GenerateRequest) -> bool:
    return (
        not request.interactive_mode
        and request.request_output_len == 0
        and request.prompt in ("", None)
        and request.messages in ("", None)
    )


async def _end_session(service: Service, tenant: str, session: int) -> GenerateResponse:
    """Forgets a session; one that does not exist has ended."""
    if session != FRESH:
        await service.storage.sessions.delete(tenant, session)
    return _nothing(session, "")


def _nothing(session: int, detail: str) -> GenerateResponse:
    """As LMDeploy answers what is no turn."""
    return GenerateResponse(
        text="", tokens=0, input_tokens=0, history_tokens=0, finish_reason="stop", session_id=session,
        detail=detail or UNSET,
    )  # fmt: skip


# --- the request -----------------------------------------------------------------------------------------


def _messages(request: GenerateRequest) -> list[ChatMessage]:
    """What the turn adds to the conversation."""
    if request.prompt is not None and request.messages is not None:
        raise invalid("messages", "is another name for prompt; give one of them")
    said = request.prompt if request.prompt is not None else request.messages
    if said is None:
        raise RequestError(400, "missing field: prompt", param="prompt", code="missing_field")
    if isinstance(said, str):
        return [ChatMessage(role="user", content=said)]
    if not said:
        raise invalid("prompt", "must not be an empty list")
    return said


def _wanted(request: GenerateRequest) -> int | None:
    """Most tokens of the answer; 0: none is asked for; None: what fits."""
    if request.request_output_len is None:
        return None
    wanted = whole("request_output_len", request.request_output_len, 0, 0, _MOST_TOKENS)
    if not wanted and not (request.interactive_mode and (request.prompt or request.messages)):
        raise invalid(
            "request_output_len",
            'must be at least 1; 0 ends a session, with prompt "" and interactive_mode false, or keeps messages '
            "unanswered, with interactive_mode true",
        )
    return wanted


def _chat_request(call: _Call, history: list[ChatMessage]) -> ChatCompletionRequest:
    """The turn as a chat completion. What is unset comes from the model's authors, then from this route's defaults."""
    request, declared = call.request, call.service.defaults.declared
    fields: dict[str, Any] = {name: getattr(request, name) for name in _PASSED_ON}
    for name, default in _ROUTE_DEFAULTS.items():
        given = getattr(request, name)
        fields[name] = default if given is None and name not in declared else given
    stop = request.stop if isinstance(request.stop, str | list) else None
    return ChatCompletionRequest(messages=history, max_tokens=call.wanted, stop=stop, **fields)


def _digest(request: GenerateRequest) -> bytes:
    """Tells a retry from another request with the same id; whether it streams makes no other turn of it."""
    return blake2b(_ENCODER.encode(structs.replace(request, stream=None)), digest_size=16).digest()


def _in_our_words(error: RequestError, said_before: int) -> RequestError:
    """A refusal of the chat completion that the turn was made into, with this route's names of fields; its messages
    begin with those ``said_before``."""
    theirs = error.param or ""
    ours = _NAMES_HERE.get(theirs, theirs)
    place = _MESSAGE.match(theirs)
    if place is not None:
        ours = f"prompt[{max(0, int(place[1]) - said_before)}]{theirs[place.end() :]}"
    message = ours + error.message.removeprefix(theirs) if error.message.startswith(theirs) else error.message
    return RequestError(
        error.status, message, param=ours or None, code=error.code, retry_after_s=error.retry_after_s
    )
