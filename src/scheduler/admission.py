"""Which submits become requests. Pure. Called by core for each submit.

The frontend has checked the same things and told the client more about them; here they protect the ranks from
a frontend that has not.
"""

from array import array
from dataclasses import dataclass

from shoal.messages import Limits, Rejected, RepetitionLimit, Submit
from shoal.scheduler.book import Book
from shoal.scheduler.quota import group_of
from shoal.scheduler.request import Request, Timing, blocks_for

_INT32_BYTES = 4
_LONGEST_PATTERN = 256
_RETRY_MS_UNKNOWN = 1000
_RETRY_MS_MOST = 60_000


@dataclass(frozen=True, slots=True)
class Gate:
    """What a submit is held against."""

    limits: Limits | None
    """None until a crew has been up."""
    max_queued_requests: int
    max_queued_tokens: int
    draining: bool = False
    asleep: int = 0
    """Level of sleep that the model is at or on its way to."""


@dataclass(frozen=True, slots=True)
class Speed:
    """As measured of late; 0 where nothing was."""

    tokens_per_s: float = 0.0
    """Computed, prompts included."""
    request_s: float = 0.0
    """From a request's arrival to its end."""


def admit(
    submit: Submit, frontend_no: int, serial: int, gate: Gate, book: Book, now_ns: int, speed: Speed
) -> Request | Rejected:
    """The request, paid for but not entered in the book yet, or why not."""
    number = submit.request_no
    if gate.draining:
        return Rejected(number, 503, "the server is shutting down", _RETRY_MS_UNKNOWN, "draining")
    if gate.asleep:
        return Rejected(number, 503, "the model sleeps; POST /wakeup", _RETRY_MS_UNKNOWN, "asleep")
    if gate.limits is None:
        return Rejected(number, 503, "the model is still loading", _RETRY_MS_UNKNOWN, "loading")
    fault = (
        _malformed(submit)
        or _too_urgent(submit, book)
        or unfit(_limit(submit), gate.limits, bool(submit.pooling))
    )
    if fault:
        return Rejected(number, 400, fault)
    if submit.attempt == 0:
        if refused := book.quotas.check(frontend_no, submit, now_ns, speed.request_s):
            return refused
        if fault := _queue_full(_known(submit), gate, book):
            return Rejected(number, 429, fault, _queue_ms(book, speed), "queue_full")
        book.quotas.charge(frontend_no, submit)
    return _request(submit, frontend_no, serial, now_ns)


def unfit(limit: int, limits: Limits, pooled: bool = False) -> str:
    """Why a sequence of up to ``limit`` tokens could never run to its end; empty where it could. The last token of a
    pooled one is never drawn."""
    if limit - pooled > limits.session_len:
        return (
            f"prompt and max_tokens come to {limit} tokens, more than session_len {limits.session_len}; "
            "shorten the prompt or lower max_tokens"
        )
    needed = blocks_for(limit - 1, limits.block_size)
    if needed > limits.num_blocks:
        return (
            f"prompt and max_tokens need {needed} KV blocks of {limits.block_size} tokens, the server has "
            f"{limits.num_blocks}; shorten the prompt or lower max_tokens"
        )
    return ""


def _queue_ms(book: Book, speed: Speed) -> int:
    """When to come back: its prompts must be computed, and those before it must end, at the pace of late."""
    turnover_ms = int(1000 * speed.request_s * len(book.waiting) / len(book)) if len(book) else 0
    return max(retry_ms(book.queued_tokens, speed.tokens_per_s), min(turnover_ms, _RETRY_MS_MOST))


def retry_ms(queued_tokens: int, tokens_per_s: float) -> int:
    """How long so many tokens take at the measured speed."""
    if tokens_per_s <= 0:
        return _RETRY_MS_UNKNOWN
    return max(_RETRY_MS_UNKNOWN, min(_RETRY_MS_MOST, int(1000 * queued_tokens / tokens_per_s)))


def _malformed(submit: Submit) -> str:
    if not submit.prompt or len(submit.prompt) % _INT32_BYTES or len(submit.generated) % _INT32_BYTES:
        return "prompt and generated must be int32 token ids, the prompt at least one"
    if submit.max_tokens < 1:
        return f"max_tokens is {submit.max_tokens}; it must be at least 1"
    if len(submit.generated) // _INT32_BYTES >= submit.max_tokens:
        return "generated already has max_tokens tokens"
    if min(_ids(submit.prompt + submit.generated)) < 0:
        return "token ids must not be negative"
    return _bad_pattern(submit.repetition) if submit.repetition else ""


def _bad_pattern(limit: RepetitionLimit) -> str:
    if not 1 <= limit.min_pattern <= limit.max_pattern <= _LONGEST_PATTERN:
        return (
            f"repetition: the patterns looked for must have 1 to {_LONGEST_PATTERN} tokens, at least one length"
        )
    return "" if limit.min_count >= 2 else "repetition: the count must be at least 2"


def _too_urgent(submit: Submit, book: Book) -> str:
    most_urgent = book.quotas.most_urgent(submit.tenant)
    if most_urgent is None or submit.priority >= most_urgent:
        return ""
    return f"priority {submit.priority}: the most urgent that {submit.tenant} may ask for is {most_urgent}"


def _queue_full(tokens: int, gate: Gate, book: Book) -> str:
    queued = len(book.waiting) - book.free_slots
    if queued >= gate.max_queued_requests:
        return (
            f"{len(book.waiting)} requests are waiting, the most is {gate.max_queued_requests}; try again later"
        )
    if book.waiting and book.queued_tokens + tokens > gate.max_queued_tokens:
        return (
            f"{book.queued_tokens} tokens are waiting, with this request they would be more than "
            f"{gate.max_queued_tokens}; try again later"
        )
    return ""


def _request(submit: Submit, frontend_no: int, serial: int, now_ns: int) -> Request:
    arrival_ns = min(submit.arrival_ns, now_ns) or now_ns
    return Request(
        frontend_no=frontend_no,
        request_no=submit.request_no,
        label=submit.label,
        serial=serial,
        prompt=submit.prompt,
        tokens=_ids(submit.prompt + submit.generated),
        prompt_len=len(submit.prompt) // _INT32_BYTES,
        sampling=submit.sampling,
        limit=_limit(submit),
        stop_ids=frozenset(submit.stop_ids),
        priority=submit.priority,
        tenant=submit.tenant,
        group=group_of(frontend_no, submit),
        cache_salt=submit.cache_salt,
        repetition=submit.repetition,
        prompt_logprobs=submit.prompt_logprobs,
        pooling=submit.pooling,
        arrival_ns=arrival_ns,
        deadline_ns=submit.deadline_ns,
        timing=Timing(arrived_ns=arrival_ns),
    )


def _limit(submit: Submit) -> int:
    return len(submit.prompt) // _INT32_BYTES + (1 if submit.pooling else submit.max_tokens)


def _known(submit: Submit) -> int:
    return (len(submit.prompt) + len(submit.generated)) // _INT32_BYTES


def _ids(raw: bytes) -> "array[int]":
    ids = array("i")
    ids.frombytes(raw)
    return ids
