"""One turn of a session while it runs: a ``Turn`` whose end is recorded before its client hears of it.

What is kept of a turn that did not end by itself:
* cancelled: the question and what there is of the answer, marked;
* its client hung up on a stream: the same, as that much was seen; a retry takes it back and runs again;
* its client hung up without having seen any of it, or the turn failed: nothing.
"""

import time
from typing import Any, Final

import msgspec
from msgspec import UNSET, Struct

from shoal.errors import RequestError
from shoal.frontend.prompts import without_nulls
from shoal.frontend.schemas.chat import ChatMessage
from shoal.frontend.schemas.interactive import GenerateResponse
from shoal.frontend.service import Service
from shoal.frontend.session_prompt import Prompt, context_after
from shoal.frontend.turn import AnswerPiece, Turn, WholeAnswer, add
from shoal.storage.session_store import SessionStore
from shoal.storage.sessions import Ask, Begun, Context, Ending, Entry, Mark

_ENCODER: Final = msgspec.json.Encoder()
_CANCELLED: Final = ("abort", "aborted", "cancelled")
"""How a turn's end is called that somebody asked for."""


class Terms(Struct, frozen=True, kw_only=True):
    """What a turn has to do with its session."""

    messages: list[ChatMessage]
    """What this turn adds."""
    keeps: bool
    """Interactive: the session goes on."""
    streams: bool


class OpenSession:
    """A session whose lease this request holds. Given up by its exchange unless it is ended before."""

    def __init__(self, store: SessionStore, ask: Ask, begun: Begun, terms: Terms) -> None:
        self.begun = begun
        self.terms = terms
        self.over = False
        """The store has been told how the turn ends."""
        self._store = store
        self._ask = ask

    @property
    def number(self) -> int:
        """The session's id."""
        return self.begun.lease.session

    def history(self) -> list[ChatMessage]:
        """The conversation with this turn's messages."""
        said = [msgspec.convert(entry.message, ChatMessage) for entry in self.begun.entries]
        return said + self.terms.messages

    async def end(self, answer: GenerateResponse, entries: list[Entry], context: Context) -> None:
        """Records the turn. RequestError where that fails."""
        self.over = True
        await self._store.end(self._ending(_ENCODER.encode(answer), entries, context, answer.tokens))

    def leave_partial(self, entries: list[Entry], context: Context, tokens: int) -> None:
        """Records what there is of a turn whose client is gone."""
        self.over = True
        self._store.end_soon(self._ending(None, entries, context, tokens))

    def said(self) -> list[Entry]:
        """This turn's messages as they are kept."""
        now = time.time()
        return [
            Entry(message=without_nulls(msgspec.to_builtins(message)), created=now)
            for message in self.terms.messages
        ]

    def give_up(self) -> None:
        """Leaves nothing of the turn; nothing where it is over."""
        if not self.over:
            self.over = True
            self._store.give_up(self.begun.lease)

    def _ending(self, answer: bytes | None, entries: list[Entry], context: Context, tokens: int) -> Ending:
        return Ending(
            ask=self._ask, begun=self.begun, keeps=self.terms.keeps, entries=entries, context=context,
            answer=answer, generated_tokens=tokens, now=time.time(),
        )  # fmt: skip


class SessionTurn:
    """A ``stream.Source`` like ``Turn``; ``settle`` records the turn."""

    def __init__(self, service: Service, session: OpenSession, prompt: Prompt, turn: Turn) -> None:
        self.answer = WholeAnswer()
        self._service = service
        self._session = session
        self._prompt = prompt
        self._turn = turn
        self._failed = False

    @property
    def done(self) -> bool:
        """Whether the answer is complete."""
        return self._turn.done

    async def first_news(self, patience_s: float) -> None:
        """Waits a little for a refusal, and raises it as RequestError."""
        await self._turn.first_news(patience_s)

    async def advance(self, patience_s: float | None = None) -> list[AnswerPiece]:
        """What has come; empty when patience is over. Raises RequestError on a failure."""
        try:
            pieces = await self._turn.advance(patience_s)
        except RequestError:
            self._failed = True
            raise
        for piece in pieces:
            add(self.answer, piece)
        return pieces

    async def settle(self) -> None:
        """Waits until the counts are complete and the turn is recorded. RequestError where that fails."""
        await self._turn.settle()
        mark: Mark = "cancelled" if self.answer.finish_reason in _CANCELLED else ""
        await self._session.end(self.whole(), self._entries(mark), self._context())

    def leave(self) -> None:
        """When the request is over, however it ended: what is not recorded by now is kept in part, or given up."""
        session = self._session
        seen = bool(self.answer.text or self.answer.reasoning)
        if session.over or self._failed or not (seen and session.terms.streams and session.terms.keeps):
            session.give_up()
            return
        session.leave_partial(self._entries("disconnected"), self._context(), self._tokens)

    def whole(self) -> GenerateResponse:
        """The answer with all its counts."""
        response = self.line(self.answer.text, self.answer.reasoning)
        response.finish_reason = self.finish_reason
        response.cached_tokens = self._turn.usage().prompt_tokens_details.cached_tokens
        if self.finish_reason == "cancelled":
            response.detail = "cancelled: what there is of the answer stays in the session"
        return response

    def line(self, text: str, reasoning: str = "") -> GenerateResponse:
        """A line of a stream that is not the last one."""
        history = self._prompt.history_tokens
        return GenerateResponse(
            text=text,
            tokens=self._tokens,
            input_tokens=len(self._prompt.ids) - history,
            history_tokens=history,
            session_id=self._session.number,
            reasoning_content=reasoning or UNSET,
        )

    @property
    def finish_reason(self) -> str:
        """Why the answer ended, in this route's words."""
        reason = self.answer.finish_reason
        return "cancelled" if reason in _CANCELLED else reason

    @property
    def _tokens(self) -> int:
        return self._turn.generation.completion_tokens

    def _context(self) -> Context:
        generation = self._turn.generation
        return context_after(
            self._service, self._prompt, self.answer.text, generation.choices[0].ids, generation.job.stop_ids
        )

    def _entries(self, mark: Mark) -> list[Entry]:
        answer: dict[str, Any] = {"role": "assistant", "content": self.answer.text}
        if self.answer.reasoning:
            answer["reasoning_content"] = self.answer.reasoning
        reason = "cancelled" if mark else self.finish_reason
        entry = Entry(message=answer, created=time.time(), tokens=self._tokens, finish_reason=reason, mark=mark)
        return [*self._session.said(), entry]
