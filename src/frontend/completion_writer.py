"""Answers and chunks in OpenAI's completions form: echoes, log-probabilities, the choice among ``best_of``."""

import msgspec
from msgspec import UNSET, Struct, UnsetType

from shoal.frontend.checks import completion_logprobs, tier_of
from shoal.frontend.generation import Generation, Piece
from shoal.frontend.logprobs import CompletionLogprobWriter, prompt_logprobs
from shoal.frontend.schemas.completions import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from shoal.frontend.schemas.usage import Timings, Usage
from shoal.frontend.service import Service, now
from shoal.messages import TokenLogprob


class Echo(Struct, frozen=True, kw_only=True):
    """A prompt as it stands before its answers."""

    text: str
    unseen: int = 0
    """So many of its first tokens have no part in ``text``."""


class CompletionWriter:
    """A ``stream.Writer`` of pieces, and the writer of whole answers."""

    def __init__(
        self,
        service: Service,
        generation: Generation,
        request: CompletionRequest,
        echoes: list[Echo | None],
    ) -> None:
        """``echoes``: one a prompt."""
        options = request.stream_options
        self._service = service
        self._generation = generation
        self._request = request
        self._echoes = echoes
        self._created = now()
        self._wants_usage = options is not None and bool(options.include_usage)
        self._continuous = options is not None and bool(options.continuous_usage_stats)
        self._top = completion_logprobs(request)
        skip_special = generation.job.skip_special
        self._logprobs = [CompletionLogprobWriter(service.tokenizer, skip_special) for _ in generation.choices]
        self._begun: set[int] = set()

    def opening(self) -> list[msgspec.Struct]:
        """Nothing: this form has no roles."""
        return []

    def chunks(self, piece: Piece) -> list[msgspec.Struct]:
        """One chunk with the text and, in the last, the reason of the end; before the first the prompt, where it is
        echoed."""
        choices = []
        begins = piece.index not in self._begun
        self._begun.add(piece.index)
        if begins and self._echo(piece.index) is not None:
            choices.append(self._prompt_choice(piece.index))
        if piece.text or piece.ids or piece.finish_reason:
            logprobs = self._piece_logprobs(piece)
            choice = CompletionChoice(piece.index, piece.text, piece.finish_reason, piece.stop_reason, logprobs)
            if self._request.return_token_ids:
                choice.token_ids = list(piece.ids)
            choices.append(choice)
        if choices and begins and self._request.return_token_ids:
            choices[0].prompt_token_ids = self._prompt(piece.index)
        return [self._frame([choice], self._chunk_usage()) for choice in choices]

    def closing(self) -> list[msgspec.Struct]:
        """Usage and timings, in a chunk without choices."""
        wants_timings = bool(self._request.timings_per_token)
        if not (self._wants_usage or wants_timings):
            return []
        usage = self._generation.usage() if self._wants_usage or self._continuous else UNSET
        return [self._frame([], usage, self._timings())]

    def whole(self, pieces: list[list[Piece]]) -> Completion:
        """The complete answer; ``pieces`` of every choice that was generated."""
        choices = []
        for number, index in enumerate(self._returned(pieces)):
            choice = self._whole_choice(index, pieces[index])
            choice.index = number
            choices.append(choice)
        completion = self._frame(choices, self._generation.usage(), self._timings())
        if self._request.metadata:
            completion.metadata = self._request.metadata
        return completion

    def _returned(self, pieces: list[list[Piece]]) -> list[int]:
        """Which choices are returned: of each prompt the n best ones, where more were generated."""
        generated = self._generation.job.choices
        n = min(int(self._request.n or 1), generated)
        if n == generated:
            return list(range(len(pieces)))
        returned = []
        for first in range(0, len(pieces), generated):
            of_prompt = range(first, first + generated)
            returned += sorted(of_prompt, key=lambda index: -_mean_logprob(pieces[index]))[:n]
        return returned

    def _whole_choice(self, index: int, pieces: list[Piece]) -> CompletionChoice:
        job, last = self._generation.job, pieces[-1]
        whole = CompletionChoice(index, "", last.finish_reason, last.stop_reason)
        parts = [] if self._echo(index) is None else [self._prompt_choice(index)]
        parts += [CompletionChoice(index, piece.text, logprobs=self._piece_logprobs(piece)) for piece in pieces]
        whole.text = "".join([part.text for part in parts])
        whole.logprobs = self._joined([part.logprobs for part in parts])
        if self._request.return_token_ids:
            whole.token_ids = list(self._generation.choices[index].ids)
            whole.prompt_token_ids = self._prompt(index)
        if self._request.prompt_logprobs is not None:
            scores = self._scores(index)
            most = int(self._request.prompt_logprobs)
            prompt = job.prompts[index // job.choices]
            whole.prompt_logprobs = prompt_logprobs(self._service.tokenizer, prompt, scores, most)
        return whole

    def _joined(self, parts: list[CompletionLogprobs | None]) -> CompletionLogprobs | None:
        if self._top < 0:
            return None
        whole = CompletionLogprobs([], [], [], [])
        for part in parts:
            if part is not None:
                whole.tokens += part.tokens
                whole.token_logprobs += part.token_logprobs
                whole.top_logprobs += part.top_logprobs
                whole.text_offset += part.text_offset
        return whole

    def _prompt_choice(self, index: int) -> CompletionChoice:
        """The echoed prompt."""
        echo = self._echo(index)
        assert echo is not None
        logprobs = None
        if self._top >= 0:
            logprobs = self._logprobs[index].write_prompt(
                self._prompt(index), echo.unseen, echo.text, self._scores(index), self._top
            )
        return CompletionChoice(index, echo.text, logprobs=logprobs)

    def _piece_logprobs(self, piece: Piece) -> CompletionLogprobs | None:
        if self._top < 0 or not piece.logprobs:
            return None
        return self._logprobs[piece.index].write(piece.ids, piece.logprobs)

    def _echo(self, index: int) -> Echo | None:
        return self._echoes[index // self._generation.job.choices]

    def _prompt(self, index: int) -> list[int]:
        job = self._generation.job
        return job.prompts[index // job.choices]

    def _scores(self, index: int) -> list[TokenLogprob]:
        """Of the choice's prompt; in a whole answer the prompt's first choice has them for all."""
        n, choices = self._generation.job.choices, self._generation.choices
        return choices[index].prompt_logprobs or choices[index - index % n].prompt_logprobs

    def _timings(self) -> Timings | UnsetType:
        return self._generation.timings() if self._request.timings_per_token else UNSET

    def _chunk_usage(self) -> Usage | UnsetType | None:
        if self._continuous:
            return self._generation.usage()
        return None if self._wants_usage else UNSET

    def _frame(
        self,
        choices: list[CompletionChoice],
        usage: Usage | UnsetType | None,
        timings: Timings | UnsetType = UNSET,
    ) -> Completion:
        return Completion(
            id=f"cmpl-{self._generation.job.label}",
            created=self._created,
            model=self._service.settings.model_name,
            choices=choices,
            system_fingerprint=self._service.fingerprint,
            usage=usage,
            service_tier=tier_of(self._request),
            timings=timings,
        )


def _mean_logprob(pieces: list[Piece]) -> float:
    """A token, of an answer's tokens."""
    values = [entry.logprob for piece in pieces for entry in piece.logprobs]
    return sum(values) / max(len(values), 1)
