"""What becomes of requests: tokens arrive, sequences end, lose their seat, lose their ranks. Pure like plan.

Whatever a request holds goes back in ``_release``, called only from here, whichever way it leaves its seat.
Called by plan (preempt) and core.
"""

from collections.abc import Iterable

from shoal.messages import Fault, FinishReason, PooledRow, RepetitionLimit, ScoredRow, TokenLogprob
from shoal.scheduler.blocks import BlockPool
from shoal.scheduler.book import Book
from shoal.scheduler.request import Emitted, Ended, Event, Pooled, Request, Sampled, Scored, State

NON_FINITE = "the model produced a value that is not finite for this request; nothing else was affected"
NOTHING_ALLOWED = (
    "no token is allowed here: what the request asks for (grammar, allowed_token_ids, bad_words, min_tokens, "
    "thinking_token_budget) contradicts itself"
)
GRAMMAR_FAILED = "the grammar is too complex to be followed any further; please simplify it"
DEADLY = "a worker process died each time that this request was computed, at last alone; please change it"

_UNDRAWN = {-2: NOTHING_ALLOWED, -3: GRAMMAR_FAILED}


def apply(book: Book, pool: BlockPool, sampled: Iterable[Sampled]) -> tuple[list[Event], int]:
    """The events of one step's result, and how many of its rows were for sequences that had left."""
    events: list[Event] = []
    stale = 0
    for row in sampled:
        request = book.owner(row.slot, row.epoch)
        if request is None:
            stale += 1
        else:
            events += _advance(book, pool, request, row)
    return events, stale


def read(book: Book, scored: Iterable[ScoredRow], pooled: Iterable[PooledRow]) -> list[Event]:
    """What one step's result says of prompts whose sequences have not left. Comes before ``apply``, which may end
    them."""
    return [
        *(
            Scored(request, row.position, row.logprobs)
            for row in scored
            if (request := book.owner(row.slot, row.epoch))
        ),
        *(Pooled(request, row.vector) for row in pooled if (request := book.owner(row.slot, row.epoch))),
    ]


def finish(
    book: Book,
    pool: BlockPool,
    request: Request,
    reason: FinishReason,
    *,
    stop_id: int | None = None,
    detail: str = "",
    fault: Fault = "server",
) -> Ended:
    """Ends a request wherever it is; what it holds is free at once."""
    _release(pool, request)
    book.close(request)
    return Ended(request, reason, stop_id, detail, fault)


def preempt(book: Book, pool: BlockPool, request: Request) -> None:
    """Takes the seat and the blocks of a running request; what is known stays, to be computed again."""
    _release(pool, request)
    book.unseat(request)


def crew_lost(book: Book, pool: BlockPool, culprit: Request | None) -> list[Event]:
    """The ranks and all they held are gone: what ran waits, to be computed again, but for the ``culprit``."""
    events: list[Event] = []
    for request in list(book.seated.values()):
        if request is culprit:
            events.append(finish(book, pool, request, "failed", detail=DEADLY, fault="worker"))
        else:
            preempt(book, pool, request)
    book.forget_ranks()
    pool.reset(0)
    return events


def _advance(book: Book, pool: BlockPool, request: Request, row: Sampled) -> list[Event]:
    request.pending -= 1
    request.drafted -= row.drafts
    request.planned -= row.drafts + 1 - len(row.tokens)
    book.serve_more(request, len(row.tokens) - 1)
    events: list[Event] = []
    for token_id, logprob in row.tokens:
        events += _append(book, pool, request, token_id, logprob)
        if request.state is State.DONE:
            break
    return events


def _append(
    book: Book, pool: BlockPool, request: Request, token_id: int, logprob: TokenLogprob | None
) -> list[Event]:
    if undrawn := _UNDRAWN.get(token_id):
        return [finish(book, pool, request, "failed", detail=undrawn, fault="request")]
    if token_id < 0:
        return [_fail_non_finite(book, pool, request)]
    if request.pooling:
        return [finish(book, pool, request, "stop")]
    emitted = Emitted(request, request.generated, token_id, logprob)
    request.tokens.append(token_id)
    pool.index.publish(request)
    if token_id in request.stop_ids:
        return [emitted, finish(book, pool, request, "stop", stop_id=token_id)]
    if request.known >= request.limit:
        return [emitted, finish(book, pool, request, "length")]
    if request.repetition and _repeats(request, request.repetition):
        return [emitted, finish(book, pool, request, "repetition")]
    return [emitted]


def _repeats(request: Request, limit: RepetitionLimit) -> bool:
    """Whether the answer ends in a pattern that stands there often enough: then it equals itself moved by one."""
    tokens, generated = request.tokens, request.generated
    for length in range(limit.min_pattern, min(limit.max_pattern, generated // limit.min_count) + 1):
        if tokens[-1] == tokens[-1 - length]:
            span = length * limit.min_count
            if tokens[-span:-length] == tokens[length - span :]:
                return True
    return False


def _fail_non_finite(book: Book, pool: BlockPool, request: Request) -> Ended:
    """Nothing that this request read or wrote is found again; who already shares what it wrote starts over."""
    written = set(request.blocks[request.hits :])
    pool.forget(request.blocks)
    ended = finish(book, pool, request, "failed", detail=NON_FINITE)
    for other in list(book.seated.values()):
        if not written.isdisjoint(other.blocks):
            pool.forget(other.blocks)
            preempt(book, pool, other)
    return ended


def _release(pool: BlockPool, request: Request) -> None:
    if request.state is State.RUNNING:
        pool.give_back(request.blocks)
    request.blocks = []
    request.planned = request.pending = request.drafted = 0
    request.hits = request.sent_blocks = request.published = 0
