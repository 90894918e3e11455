"""One response under way: its turn, its object, and its record in the store."""

import sqlite3
from typing import Any, Final

import msgspec

from shoal.frontend.responses_events import Outline
from shoal.frontend.responses_translation import ENCRYPTED
from shoal.frontend.schemas.responses import (
    IncompleteDetails,
    ResponseInputDetails,
    ResponseItem,
    ResponseObject,
    ResponseOutputDetails,
    ResponsesRequest,
    ResponseUsage,
)
from shoal.frontend.schemas.usage import Usage
from shoal.frontend.service import Service, now
from shoal.frontend.turn import AnswerPiece, Turn
from shoal.storage import responses as store
from shoal.storage.responses import StoredResponse

_ENCODER: Final = msgspec.json.Encoder()


class ResponseRun:
    """A ``stream.Source``: hands the turn's pieces on, and keeps the response when the turn has ended."""

    def __init__(
        self,
        service: Service,
        tenant: str,
        request: ResponsesRequest,
        items: list[ResponseItem],
        response: ResponseObject,
    ) -> None:
        self.response = response
        self.outline = Outline(
            response.id.removeprefix("resp_"),
            service.tokenizer,
            seals_reasoning=ENCRYPTED in (request.include or ()),
        )
        self._service = service
        self._tenant = tenant
        self._items = items
        self._turn: Turn | None = None
        self._is_kept = False

    def attach(self, turn: Turn) -> None:
        """The turn that answers."""
        self._turn = turn
        sampling = turn.generation.job.sampling
        self.response.temperature, self.response.top_p = sampling.temperature, sampling.top_p

    @property
    def turn(self) -> Turn:
        """The turn that answers."""
        assert self._turn is not None
        return self._turn

    @property
    def done(self) -> bool:
        """Whether the answer is complete."""
        return self.turn.done

    async def first_news(self, patience_s: float) -> None:
        """Waits a little for a refusal, and raises it as RequestError."""
        await self.turn.first_news(patience_s)

    async def advance(self, patience_s: float | None = None) -> list[AnswerPiece]:
        """What has come. Raises RequestError on a failure."""
        pieces = await self.turn.advance(patience_s)
        for piece in pieces:
            if piece.finish_reason == "length":
                self.response.status = "incomplete"
                self.response.incomplete_details = IncompleteDetails("max_output_tokens")
            elif piece.finish_reason == "abort":
                self.response.status = "cancelled"
            elif piece.finish_reason is not None:
                self.response.status = "completed"
                self.response.completed_at = now()
        return pieces

    async def settle(self) -> None:
        """Counts, and keeps the response where that was asked for."""
        await self.turn.settle()
        self.response.usage = _usage(self.turn.usage())
        self.response.output = self.outline.items
        if self.response.store:
            await self.keep()

    async def keep(self, owner: str = "") -> bool:
        """Writes the response as it is now; whether anybody still wants it. One that was deleted since it was last
        written stays so, and one that was cancelled too."""

        def write(connection: sqlite3.Connection) -> bool:
            if self._is_kept:
                known = store.find(connection, self._tenant, self.response.id)
                if known is None:
                    return False
                if known.status == "cancelled":
                    self.response.status, self.response.completed_at = "cancelled", None
            self._is_kept = True
            cancelled = self.response.status == "cancelled"
            store.put(connection, self._stored("" if cancelled else owner))
            return not cancelled

        return await self._service.storage.responses.run(write)

    def _stored(self, owner: str) -> StoredResponse:
        return StoredResponse(
            id=self.response.id,
            tenant=self._tenant,
            previous=self.response.previous_response_id,
            status=self.response.status,
            owner=owner,
            input=_ENCODER.encode(self._items),
            output=_ENCODER.encode(self.response.output),
            record=_ENCODER.encode(self.response),
        )


def new_response(service: Service, request: ResponsesRequest, response_id: str) -> ResponseObject:
    """The response before its answer: what was asked, as OpenAI shows it."""
    reasoning, text = request.reasoning, request.text
    return ResponseObject(
        id=response_id,
        created_at=now(),
        status="queued" if request.background else "in_progress",
        background=bool(request.background),
        instructions=request.instructions,
        max_output_tokens=_integer(request.max_output_tokens),
        max_tool_calls=_integer(request.max_tool_calls),
        model=service.settings.model_name,
        parallel_tool_calls=request.parallel_tool_calls is not False,
        previous_response_id=request.previous_response_id,
        reasoning={"effort": reasoning.effort if reasoning is not None else None, "summary": None},
        store=request.store is not False,
        temperature=service.defaults.temperature,
        text={
            "format": _shown(text.format) if text is not None and text.format is not None else {"type": "text"}
        },
        tool_choice=request.tool_choice or "auto",
        tools=[_shown(tool) for tool in request.tools or ()],
        top_logprobs=_integer(request.top_logprobs) or 0,
        top_p=service.defaults.top_p,
        user=request.user,
        metadata=request.metadata or {},
        prompt_cache_key=request.prompt_cache_key,
        safety_identifier=request.safety_identifier,
    )


def _shown(body: msgspec.Struct) -> dict[str, Any]:
    """As it was asked, without what was not."""
    return {name: value for name, value in msgspec.to_builtins(body).items() if value is not None}


def _integer(value: float | None) -> int | None:
    return None if value is None else int(value)


def _usage(usage: Usage) -> ResponseUsage:
    details = usage.completion_tokens_details
    return ResponseUsage(
        usage.prompt_tokens,
        ResponseInputDetails(usage.prompt_tokens_details.cached_tokens),
        usage.completion_tokens,
        ResponseOutputDetails(details.reasoning_tokens),
        usage.total_tokens,
    )
