"""Which submits become requests. Pure. Called by core for each submit.

The frontend has checked the same things and told the client more about them; here they protect the ranks from
a frontend that has not.
"""

from array import array
from dataclasses import dataclass

from shoal.messages import Limits, Rejected, Submit
from shoal.scheduler.book import Book
from shoal.scheduler.request import Request, Timing, blocks_for

_INT32_BYTES = 4
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


def admit(
    submit: Submit, frontend_no: int, serial: int, gate: Gate, book: Book, now_ns: int, tokens_per_s: float
) -> Request | Rejected:
    """The request, not entered in the book yet, or why not."""
    number = submit.request_no
    if gate.draining:
        return Rejected(number, 503, "the server is shutting down", _RETRY_MS_UNKNOWN)
    if gate.limits is None:
        return Rejected(number, 503, "the model is still loading", _RETRY_MS_UNKNOWN)
    if fault := _malformed(submit) or unfit(_limit(submit), gate.limits):
        return Rejected(number, 400, fault)
    if submit.attempt == 0 and (fault := _queue_full(_known(submit), gate, book)):
        return Rejected(number, 429, fault, retry_ms(book.queued_tokens, tokens_per_s))
    return _request(submit, frontend_no, serial, now_ns)


def unfit(limit: int, limits: Limits) -> str:
    """Why a sequence of up to ``limit`` tokens could never run to its end; empty where it could."""
    if limit > limits.session_len:
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


def retry_ms(queued_tokens: int, tokens_per_s: float) -> int:
    """When to come back: how long the queue takes at the measured speed."""
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
    return ""


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
        arrival_ns=arrival_ns,
        deadline_ns=submit.deadline_ns,
        timing=Timing(arrived_ns=arrival_ns),
    )


def _limit(submit: Submit) -> int:
    return len(submit.prompt) // _INT32_BYTES + submit.max_tokens


def _known(submit: Submit) -> int:
    return (len(submit.prompt) + len(submit.generated)) // _INT32_BYTES


def _ids(raw: bytes) -> "array[int]":
    ids = array("i")
    ids.frombytes(raw)
    return ids
