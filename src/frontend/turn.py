"""One answer of a chat model, from a chat request to parsed pieces: text, reasoning and tool calls apart.

/v1/chat/completions, /v1/responses, /v1/messages and /v1/chat/interactive all go through ``open_turn``: they differ in
what they read and write, not in how a model is asked.
"""

from typing import Final

import falcon.asgi
from msgspec import Struct, structs

from shoal.frontend import checks
from shoal.frontend.answer_form import answer_form
from shoal.frontend.chat_prompt import ChatPrompt, chat_prompt
from shoal.frontend.constraint import Held, grammar_of
from shoal.frontend.exchange import Exchange
from shoal.frontend.generation import Generation
from shoal.frontend.prompts import chat_characters
from shoal.frontend.reading import AnswerPiece as AnswerPiece
from shoal.frontend.reading import AnswerReader, Reading
from shoal.frontend.reading import CallDelta as CallDelta
from shoal.frontend.schemas.chat import ChatCompletionRequest
from shoal.frontend.schemas.usage import Usage
from shoal.frontend.service import Service, off_loop
from shoal.frontend.tools.wish import ToolWish, tool_wish

TIMEOUT_HEADER: Final = "X-Request-Timeout"


class WholeCall(Struct, kw_only=True):
    """A complete tool call."""

    id: str
    name: str
    arguments: str


class WholeAnswer(Struct, kw_only=True):
    """One choice, complete."""

    text: str = ""
    reasoning: str = ""
    calls: list[WholeCall] = []
    pieces: list[AnswerPiece] = []
    """All of them, for their log-probabilities."""
    finish_reason: str = ""
    stop_reason: str | int | None = None


class Turn:
    """A running answer: a ``stream.Source`` of ``AnswerPiece``."""

    def __init__(
        self,
        generation: Generation,
        request: ChatCompletionRequest,
        reading: Reading,
        wish: ToolWish | None = None,
    ) -> None:
        self.generation = generation
        self.request = request
        self.wish = wish
        """What the request says of its tools."""
        self._readers = [AnswerReader(reading) for _ in range(generation.job.choices)]
        self._shows_ids = bool(request.return_token_ids)

    @property
    def done(self) -> bool:
        """Whether every choice is complete."""
        return self.generation.done

    def usage(self) -> Usage:
        """Counts so far; complete once settled."""
        usage = self.generation.usage()
        usage.completion_tokens_details.reasoning_tokens = sum(
            reader.reasoning_tokens for reader in self._readers
        )
        return usage

    async def first_news(self, patience_s: float) -> None:
        """Waits a little for a refusal, and raises it as RequestError."""
        await self.generation.first_news(patience_s)

    async def settle(self) -> None:
        """Waits until the counts are complete."""
        await self.generation.settle()

    async def advance(self, patience_s: float | None = None) -> list[AnswerPiece]:
        """What has come; empty when patience is over. Raises RequestError on a failure."""
        read = [self._readers[piece.index].read(piece) for piece in await self.generation.advance(patience_s)]
        return [piece for piece in read if self._tells(piece)]

    async def whole(self) -> list[WholeAnswer]:
        """Waits for every choice."""
        answers = [WholeAnswer() for _ in self.generation.choices]
        while not self.done:
            for piece in await self.advance():
                add(answers[piece.index], piece)
        await self.settle()
        return answers

    def _tells(self, piece: AnswerPiece) -> bool:
        """Whether there is anything in it: markers and held text make none."""
        seen = piece.text or piece.reasoning or piece.calls or piece.finish_reason or piece.logprobs
        return bool(seen or (self._shows_ids and piece.ids))


def add(answer: WholeAnswer, piece: AnswerPiece) -> None:
    """Puts a piece to what came before of its choice."""
    answer.text += piece.text
    answer.reasoning += piece.reasoning
    for call in piece.calls:
        if call.index == len(answer.calls):
            answer.calls.append(WholeCall(id=call.id, name=call.name, arguments=""))
        answer.calls[call.index].arguments += call.arguments
    answer.pieces.append(piece)
    if piece.finish_reason is not None:
        answer.finish_reason, answer.stop_reason = piece.finish_reason, piece.stop_reason


async def count_prompt(service: Service, request: ChatCompletionRequest) -> int:
    """Tokens of the prompt that ``request`` would have. Raises RequestError."""
    service.check_model(request.model)
    checks.check_available(request)
    limits = await service.switchboard.wait_ready()
    prompt = await off_loop(chat_characters(request), lambda: chat_prompt(service, limits, request))
    return len(prompt.ids)


async def open_turn(
    service: Service,
    exchange: Exchange,
    req: falcon.asgi.Request,
    request: ChatCompletionRequest,
    *,
    prompt_ids: list[int] | None = None,
) -> Turn:
    """Checks ``request``, renders its prompt and submits it. Raises RequestError. ``prompt_ids`` are taken instead of
    rendering: a session knows the very tokens that its answers were drawn as."""
    checks.check_task(service)
    service.check_model(request.model)
    checks.check_available(request)
    exchange.note(request)
    logprobs = checks.chat_logprobs(request)
    form, wish = answer_form(request), tool_wish(request)
    limits = await service.switchboard.wait_ready()
    prompt = await off_loop(chat_characters(request), lambda: chat_prompt(service, limits, request, prompt_ids))
    tool_format = prompt.style.format if wish is not None and wish.functions else None
    held = Held(
        form=form, wish=wish, tool_format=tool_format,
        markers=prompt.markers, state=prompt.state, closing_ids=prompt.closing_ids,
    )  # fmt: skip
    grammar = await grammar_of(service, request, held)
    job = checks.make_job(
        service, request, [prompt.ids], limits,
        label=exchange.request_id, logprobs=logprobs, header_timeout=req.get_header(TIMEOUT_HEADER),
        tenant=exchange.tenant, priority=exchange.priority,
        grammar=grammar, thinking=prompt.budget,
    )  # fmt: skip
    calls_are_held = grammar is not None and tool_format is not None
    reading = _reading(prompt, wish, held=calls_are_held, streams=bool(request.stream))
    shown = reading.shown_ids(service.tokenizer)
    job = structs.replace(job, shown_ids=shown, reports_ids=job.reports_ids or prompt.markers is not None)
    generation = Generation(service, job)
    exchange.open(generation)
    return Turn(generation, request, reading, wish)


def _reading(prompt: ChatPrompt, wish: ToolWish | None, *, held: bool, streams: bool) -> Reading:
    reading = Reading(markers=prompt.markers, state=prompt.state, closing_ids=prompt.closing_ids)
    if wish is None or not wish.functions:
        return reading
    return structs.replace(
        reading,
        tool_format=prompt.style.format,
        names=wish.allowed,
        patient=not (streams or held),
        held=held,
    )
