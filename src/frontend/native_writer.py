"""Answers of /generate, whole and as a stream: cumulative in SGLang's form, what is new in LMDeploy's."""

from collections.abc import Sequence
from typing import Final

from msgspec import UNSET, Struct

from shoal.frontend.generation import Choice, Generation, Piece
from shoal.frontend.schemas.native import NativeAnswer, NativeEnd, NativeMeta, NativeRequest, Scores
from shoal.frontend.service import Service
from shoal.messages import TokenLogprob

_LOWEST: Final = -9999.0
"""JSON has no infinity."""


class _Part(Struct):
    """What has come of one answer."""

    text: str = ""
    ids: list[int] = []
    logprobs: list[TokenLogprob] = []
    end: NativeEnd | None = None


class NativeWriter:
    """A ``stream.Writer``, and the whole answers."""

    def __init__(
        self,
        service: Service,
        generation: Generation,
        request: NativeRequest,
        *,
        several: bool,
        scored_from: int,
    ) -> None:
        self.several = several
        """Whether there is a list of answers."""
        self._service = service
        self._generation = generation
        self._sglang = request.text is not None or request.sampling_params is not None
        self._wants_logprobs = bool(request.return_logprob)
        self._wants_top = bool(request.top_logprobs_num)
        self._wants_text = bool(request.return_text_in_logprobs)
        self._scored_from = scored_from
        self._parts = [_Part() for _ in generation.choices]

    def opening(self) -> list[Struct]:
        """Nothing."""
        return []

    def chunks(self, piece: Piece) -> list[Struct]:
        """One event: all that there is so far, or what is new."""
        if not self._sglang:
            self._parts[piece.index] = _Part()
        self.add(piece)
        return [self._answer(piece.index)]

    def closing(self) -> list[Struct]:
        """Nothing: each answer's last event has its counts."""
        return []

    def add(self, piece: Piece) -> None:
        """Takes a piece."""
        part = self._parts[piece.index]
        part.text += piece.text
        part.ids += piece.ids
        part.logprobs += piece.logprobs
        if piece.finish_reason is not None:
            part.end = _end(piece, self._generation.choices[piece.index])

    def whole(self) -> list[NativeAnswer]:
        """Every answer, once all pieces have come."""
        return [self._answer(index) for index in range(len(self._parts))]

    def _answer(self, index: int) -> NativeAnswer:
        return NativeAnswer(
            self._parts[index].text,
            self._parts[index].ids,
            self._meta(index),
            index if self.several else UNSET,
        )

    def _meta(self, index: int) -> NativeMeta:
        part, choice = self._parts[index], self._generation.choices[index]
        job = self._generation.job
        meta = NativeMeta(
            id=job.label,
            prompt_tokens=len(job.prompts[index // job.choices]),
            completion_tokens=choice.tokens,
            cached_tokens=choice.cached_tokens,
            finish_reason=part.end,
        )
        if self._wants_logprobs:
            meta.output_token_logprobs = self._scores(part.ids, part.logprobs)
            if self._wants_top:
                meta.output_top_logprobs = self._top(part.logprobs)
            self._add_prompt_scores(meta, index)
        return meta

    def _add_prompt_scores(self, meta: NativeMeta, index: int) -> None:
        """The first token of a prompt has no log-probability: null."""
        job = self._generation.job
        first = index - index % job.choices
        if self._scored_from < 0:
            return
        prompt = job.prompts[index // job.choices]
        scored = self._generation.choices[first].prompt_logprobs
        begin = max(self._scored_from, 1)
        missing: Scores = [self._score(prompt[0], None)] if self._scored_from == 0 else []
        meta.input_token_logprobs = missing + self._scores(prompt[begin:], scored[begin - 1 :])
        if self._wants_top:
            meta.input_top_logprobs = [[] for _ in missing] + self._top(scored[begin - 1 :])

    def _scores(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> Scores:
        return [self._score(token_id, entry.logprob) for token_id, entry in zip(ids, logprobs, strict=True)]

    def _top(self, logprobs: Sequence[TokenLogprob]) -> list[Scores]:
        return [[self._score(token_id, logprob) for token_id, logprob in entry.top] for entry in logprobs]

    def _score(self, token_id: int, logprob: float | None) -> list[float | int | str | None]:
        shown = None if logprob is None else max(logprob, _LOWEST)
        if not self._sglang:
            return [shown, token_id]
        raw = self._service.tokenizer.token_bytes(token_id)
        return [shown, token_id, raw.decode("utf-8", "replace") if self._wants_text else None]


def _end(piece: Piece, choice: Choice) -> NativeEnd:
    if piece.finish_reason == "length":
        return NativeEnd("length", length=choice.tokens)
    matched = UNSET if piece.stop_reason is None else piece.stop_reason
    return NativeEnd(piece.finish_reason or "stop", matched=matched)
