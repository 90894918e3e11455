"""One HTTP request's sequences, from ``Job`` to pieces of text. Both OpenAI routes go through here.

A ``Generation`` submits n × prompts sequences, turns their tokens into text, matches stop strings, and says how
each choice ended. It is closed by its ``Exchange``, whatever happened, which cancels what is still open.
"""

import time
from typing import Final

from msgspec import Struct, structs

from shoal.errors import RequestError
from shoal.frontend.checks import Job
from shoal.frontend.detokenize import Detokenizer
from shoal.frontend.mailbox import Lost, Mailbox, News
from shoal.frontend.sampling import seed_of_choice
from shoal.frontend.schemas.usage import PromptDetails, Timings, Usage
from shoal.frontend.service import Service
from shoal.messages import (
    Finished,
    PooledVector,
    Rejected,
    RejectReason,
    ScoredPrompt,
    Submit,
    TokenLogprob,
    TokenRun,
)
from shoal.wire import pack_ids

_DEADLINE_SLACK_S: Final = 2.0
"""The scheduler ends requests at their deadline; past this the frontend no longer waits for it."""
_SETTLE_PATIENCE_S: Final = 0.5
_RETRY_AFTER_S: Final = 1.0
_REASONS: Final = {"stop": "stop", "length": "length", "repetition": "repetition", "aborted": "abort"}
"""What clients read for the ends that are no failure; the last two as vLLM says them."""
_REJECTIONS: Final[dict[RejectReason, str]] = {
    "invalid": "invalid_value",
    "loading": "not_ready",
    "draining": "draining",
    "asleep": "sleeping",
    "queue_full": "queue_full",
    "concurrency": "rate_limit_exceeded",
    "request_rate": "rate_limit_exceeded",
    "token_rate": "rate_limit_exceeded",
}
"""OpenAI's code for each reason of the scheduler's."""
_REPETITION: Final = "repetition_detected"


class Piece(Struct):
    """What became certain of one choice."""

    index: int
    text: str
    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    """Empty, or one for each id."""
    finish_reason: str | None = None
    """Set in the choice's last piece."""
    stop_reason: str | int | None = None


class Choice(Struct):
    """The state of one sequence."""

    index: int
    request_no: int
    detokenizer: Detokenizer
    tokens: int = 0
    """Generated tokens up to the end of the answer, the one that ended it included."""
    ids: list[int] = []
    """Those tokens."""
    prompt_logprobs: list[TokenLogprob] = []
    """Where they are asked for: of the prompt's second token and those behind it."""
    vector: bytes = b""
    """Where one is asked for: the prompt's, float32[hidden]."""
    cached_tokens: int = 0
    finished: bool = False
    """Its text is complete."""
    settled: bool = False
    """Its terminal event has come."""
    times_us: tuple[int, int, int] = (0, 0, 0)
    """Of the queue, the prefill and the decoding, known once settled."""


class Generation:
    """The sequences of one job."""

    def __init__(self, service: Service, job: Job) -> None:
        self.job = job
        self.choices: list[Choice] = []
        self._service = service
        self._mailbox = Mailbox()
        self._stop_ids = frozenset(job.stop_ids)

    def start(self) -> None:
        """Submits every sequence, prompt by prompt."""
        for number, prompt in enumerate(self.job.prompts):
            template = self._template(prompt, self.job.max_tokens[number])
            for choice in range(self.job.choices):
                self._submit(template, choice)

    async def first_news(self, patience_s: float) -> None:
        """Waits a little for a refusal, which can then still be an HTTP status. Raises it as RequestError."""
        for _, news in await self._mailbox.peek(patience_s):
            self._raise_failure(news)

    async def advance(self, patience_s: float | None = None) -> list[Piece]:
        """Waits for news; the pieces that came. Empty when patience is over. Raises RequestError on a failure."""
        pieces: list[Piece] = []
        for index, news in await self._mailbox.take(self._patience(patience_s)):
            piece = self._apply(self.choices[index], news)
            if piece is not None:
                pieces.append(piece)
        if not pieces:
            self._check_deadline()
        return pieces

    async def settle(self) -> None:
        """Waits for the terminal events of sequences that a stop string ended: they carry the cache's share."""
        while not all(choice.settled for choice in self.choices):
            news = await self._mailbox.take(_SETTLE_PATIENCE_S)
            if not news:
                return
            for index, item in news:
                if isinstance(item, Finished):
                    self._settle(self.choices[index], item)

    @property
    def done(self) -> bool:
        """Whether the text of every choice is complete."""
        return all(choice.finished for choice in self.choices)

    @property
    def prompt_tokens(self) -> int:
        """Each prompt once."""
        return sum(map(len, self.job.prompts))

    @property
    def completion_tokens(self) -> int:
        """Of all choices."""
        return sum(choice.tokens for choice in self.choices)

    def usage(self) -> Usage:
        """Counts so far; complete once settled. A prompt's cached tokens are those of its first choice to run."""
        n = self.job.choices
        by_prompt = [self.choices[first : first + n] for first in range(0, len(self.choices), n)]
        cached = sum(min(choice.cached_tokens for choice in choices) for choices in by_prompt)
        prompt, completion = self.prompt_tokens, self.completion_tokens
        return Usage(prompt, completion, prompt + completion, PromptDetails(cached))

    def timings(self) -> Timings:
        """How long the slowest sequence took, and how fast all of them were together; complete once settled. A
        sequence's first token belongs to its prefill."""
        times = [choice.times_us for choice in self.choices]
        queue_us, prefill_us, decode_us = (max(each) for each in zip(*times, strict=True))
        usage = self.usage()
        cached = usage.prompt_tokens_details.cached_tokens
        computed, generated = usage.prompt_tokens - cached, usage.completion_tokens
        decoded = max(generated - len(self.choices), 0)
        return Timings(
            queue_ms=queue_us / 1000,
            cache_n=cached,
            prompt_n=computed,
            prompt_ms=prefill_us / 1000,
            prompt_per_token_ms=prefill_us / 1000 / max(computed, 1),
            prompt_per_second=computed * 1e6 / max(prefill_us, 1),
            predicted_n=generated,
            predicted_ms=decode_us / 1000,
            predicted_per_token_ms=decode_us / 1000 / max(decoded, 1),
            predicted_per_second=decoded * 1e6 / max(decode_us, 1),
        )

    def close(self) -> None:
        """Cancels what has no terminal event yet; may come at any time, and twice."""
        for choice in self.choices:
            self._service.switchboard.cancel(choice.request_no, "disconnected")

    # --- inside ---

    def _template(self, prompt: list[int], max_tokens: int) -> Submit:
        job = self.job
        return Submit(
            request_no=0,
            label=job.label,
            prompt=pack_ids(prompt),
            sampling=job.sampling,
            max_tokens=max_tokens,
            stop_ids=job.stop_ids,
            arrival_ns=time.time_ns(),
            deadline_ns=job.deadline_ns,
            pooling=job.pooling,
            priority=job.priority,
            tenant=job.tenant,
            cache_salt=job.cache_salt,
            repetition=job.repetition,
        )

    def _submit(self, template: Submit, choice: int) -> None:
        job, index = self.job, len(self.choices)
        seed = seed_of_choice(job.sampling.seed, choice)
        scores = job.prompt_logprobs >= 0 and (choice == 0 or job.scores_every_choice)
        submit = structs.replace(
            template,
            sampling=structs.replace(job.sampling, seed=seed),
            prompt_logprobs=job.prompt_logprobs if scores else -1,
            group=self.choices[0].request_no if self.choices else 0,
        )
        detokenizer = Detokenizer(
            self._service.tokenizer,
            job.stop,
            job.skip_special,
            job.include_stop,
            unstoppable=job.sampling.min_tokens,
            goes_on=job.goes_on,
            shown_ids=job.shown_ids,
        )
        request_no = self._service.switchboard.submit(submit, self._mailbox, index)
        self.choices.append(Choice(index, request_no, detokenizer))

    def _apply(self, choice: Choice, news: News) -> Piece | None:
        match news:
            case TokenRun():
                ignored = choice.finished or self.job.prompt_only
                return None if ignored else self._apply_run(choice, news)
            case ScoredPrompt(position=position, logprobs=logprobs):
                _add_scores(choice, position, logprobs)
                return None
            case PooledVector(vector=vector):
                choice.vector = vector
                return None
            case Finished():
                self._settle(choice, news)
                return None if choice.finished else self._finish(choice, news)
        self._raise_failure(news)
        return None

    def _apply_run(self, choice: Choice, run: TokenRun) -> Piece | None:
        """The id that ended the sequence counts and has a log-probability, but no text unless ``include_stop``."""
        hidden = run.ids[-1] in self._stop_ids and not self.job.include_stop
        delta = choice.detokenizer.push(run.ids[:-1] if hidden else run.ids)
        if delta.stopped is not None:
            choice.tokens += delta.consumed
            choice.ids += run.ids[: delta.consumed]
            choice.finished = True
            self._service.switchboard.cancel(choice.request_no, "stop_string")
            ids, logprobs = run.ids[: delta.consumed], run.logprobs[: delta.consumed]
            return Piece(choice.index, delta.text, ids, logprobs, "stop", delta.stopped)
        choice.tokens += len(run.ids)
        choice.ids += run.ids
        if delta.text or run.logprobs or self.job.reports_ids:
            return Piece(choice.index, delta.text, run.ids, run.logprobs)
        return None

    def _finish(self, choice: Choice, news: Finished) -> Piece:
        if news.reason not in _REASONS:
            raise _failure(news)
        choice.finished = True
        if self.job.prompt_only:
            return Piece(choice.index, "", finish_reason="length")
        text = choice.detokenizer.finish()
        stopped = choice.detokenizer.stopped
        if stopped is not None:
            return Piece(choice.index, text, finish_reason="stop", stop_reason=stopped)
        return Piece(
            choice.index, text, finish_reason=_REASONS[news.reason], stop_reason=self._stop_reason(news)
        )

    def _stop_reason(self, news: Finished) -> str | int | None:
        if news.reason == "repetition":
            return _REPETITION
        return news.stop_id if news.stop_id not in self._service.eos_ids else None

    def _settle(self, choice: Choice, news: Finished) -> None:
        choice.settled = True
        choice.cached_tokens = news.cached_tokens
        choice.times_us = (news.queue_us, news.prefill_us, news.decode_us)

    def _raise_failure(self, news: News) -> None:
        match news:
            case Rejected(code=code, detail=detail, retry_ms=retry_ms, reason=reason):
                retry = None if code < 429 else max(retry_ms / 1000, _RETRY_AFTER_S)
                raise RequestError(code, detail, code=_REJECTIONS[reason], retry_after_s=retry)
            case Lost(code=code, detail=detail):
                raise RequestError(503, detail, code=code, retry_after_s=_RETRY_AFTER_S)
            case Finished(reason=reason) if reason not in _REASONS:
                raise _failure(news)

    def _patience(self, patience_s: float | None) -> float | None:
        if not self.job.deadline_ns:
            return patience_s
        left = max(0.0, self.job.deadline_ns / 1e9 - time.time()) + _DEADLINE_SLACK_S
        return left if patience_s is None else min(left, patience_s)

    def _check_deadline(self) -> None:
        deadline_ns = self.job.deadline_ns
        if deadline_ns and not self.done and time.time_ns() > deadline_ns + int(_DEADLINE_SLACK_S * 1e9):
            raise _deadline_passed()


def _add_scores(choice: Choice, position: int, logprobs: tuple[TokenLogprob, ...]) -> None:
    """A preempted sequence's prompt is computed again: repeats are dropped."""
    known = 1 + len(choice.prompt_logprobs) - position
    if known < 0:
        raise RequestError(
            503,
            "a part of the prompt's log-probabilities was lost on its way",
            code="tokens_lost",
            retry_after_s=1,
        )
    choice.prompt_logprobs += logprobs[known:]


def _failure(news: Finished) -> RequestError:
    if news.reason == "deadline":
        return _deadline_passed()
    if news.reason == "cancelled":
        return RequestError(
            503, news.detail or "the server cancelled this request", code="cancelled", retry_after_s=1
        )
    if news.fault == "worker":
        return RequestError(500, news.detail, code="worker_lost")
    status = 400 if news.fault == "request" else 500
    return RequestError(status, news.detail or "the model failed on this request", code="generation_failed")


def _deadline_passed() -> RequestError:
    message = (
        "timeout: the request's time is over; give it more seconds (timeout, X-Request-Timeout) or less to do"
    )
    return RequestError(408, message, param="timeout", code="timeout")
