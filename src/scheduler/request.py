"""One sequence and its counters. Owned by the book; plan and apply move it from state to state.

Four counters say everything about its progress: ``known`` tokens (prompt and what was sampled and collected),
``pending`` (sampled by plans in flight, ids not collected yet), ``drafted`` (how many more those plans may bring where
drafts prove right) and ``planned`` (tokens whose keys and values have been dispatched, all drafts counted). Always
``planned ≤ known + pending + drafted ≤ limit``; prefill and decode are not states.
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from shoal.messages import Fault, FinishReason, Pooling, RepetitionLimit, Sampling, TokenLogprob

Group = tuple[int, int]
"""An HTTP request: the frontend's number and ``Submit.group``."""


class State(Enum):
    """Where a request is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"


@dataclass(slots=True)
class Timing:
    """When things happened to a request, in nanoseconds since the epoch; 0 is not yet. Only stats reads it."""

    arrived_ns: int = 0
    seated_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0


@dataclass(slots=True, eq=False)
class Request:
    """A sequence from its submit to its one terminal event."""

    frontend_no: int
    request_no: int
    label: str
    serial: int
    """Rises with each submit: breaks ties of arrival."""
    prompt: bytes
    tokens: "array[int]"
    """Prompt, then everything generated and collected."""
    prompt_len: int
    sampling: Sampling
    limit: int
    """Most tokens of prompt and answer."""
    stop_ids: frozenset[int]
    priority: int
    arrival_ns: int
    deadline_ns: int
    tenant: str = ""
    group: Group = (0, 0)
    cache_salt: str = ""
    repetition: RepetitionLimit | None = None
    prompt_logprobs: int = -1
    pooling: Pooling = ""
    state: State = State.WAITING
    slot: int = -1
    epoch: int = 0
    pending: int = 0
    drafted: int = 0
    planned: int = 0
    blocks: list[int] = field(default_factory=list)
    hits: int = 0
    """Leading blocks that came from the prefix index at this residence."""
    sent_blocks: int = 0
    """Leading blocks that the ranks have been told of."""
    published: int = 0
    """Leading blocks that have been offered to the prefix index."""
    digests: list[bytes] = field(default_factory=list)
    """Chained digests of the leading full blocks, made as they are needed."""
    cached_tokens: int = -1
    """Prompt tokens found in the prefix index at the first seat; -1 before."""
    served_at: int = 0
    """The turn of its last row; see ``Book.serve``."""
    deaths: int = 0
    """Crews that died over it alone, one after the other; see suspects.py."""
    timing: Timing = field(default_factory=Timing)

    @property
    def known(self) -> int:
        """Tokens whose ids are here."""
        return len(self.tokens)

    @property
    def virtual(self) -> int:
        """The most tokens that may exist once the plans in flight are done."""
        return len(self.tokens) + self.pending + self.drafted

    @property
    def todo(self) -> int:
        """Tokens that the next plan may compute: 1 for a decode, 0 when the last sample is in flight."""
        return self.virtual - self.planned if self.virtual < self.limit else 0

    @property
    def can_draft(self) -> bool:
        """Whether its next token is a function of the tokens before it and of nothing that follows them step by step,
        so that several can be drawn at once."""
        wanted = self.sampling
        follows = (
            wanted.grammar or wanted.thinking or wanted.bad_words or wanted.allowed_ids or wanted.min_tokens
        )
        return not (follows or self.pooling)

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.prompt_len

    @property
    def reads_whole_prompt(self) -> bool:
        """Whether the states of all prompt tokens are still wanted, so that no cached prefix may stand for them."""
        return self.pooling == "mean" or (self.prompt_logprobs >= 0 and not self.generated)

    @property
    def order(self) -> tuple[int, int, int]:
        """Who comes first: priority, then arrival."""
        return (self.priority, self.arrival_ns, self.serial)


@dataclass(frozen=True, slots=True)
class Sampled:
    """One row of a step's result."""

    slot: int
    epoch: int
    tokens: tuple[tuple[int, TokenLogprob | None], ...]
    """The guesses that proved right and the token after them. An id is below 0 where none could be drawn; see
    ``StepResult.ids``."""
    drafts: int
    """How many the plan allowed."""


@dataclass(frozen=True, slots=True)
class Emitted:
    """A token became known."""

    request: Request
    position: int
    token_id: int
    logprob: TokenLogprob | None


@dataclass(frozen=True, slots=True)
class Ended:
    """The terminal event of a request."""

    request: Request
    reason: FinishReason
    stop_id: int | None = None
    detail: str = ""
    fault: Fault = "server"


@dataclass(frozen=True, slots=True)
class Scored:
    """Log-probabilities of prompt tokens became known; after a preemption they may come once more."""

    request: Request
    position: int
    """Index in the prompt of the first of them."""
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Pooled:
    """A prompt's vector became known."""

    request: Request
    vector: bytes


Event = Emitted | Scored | Pooled | Ended


def blocks_for(tokens: int, block_size: int) -> int:
    """How many blocks hold that many tokens."""
    return -(-tokens // block_size)


def youngest(requests: Iterable[Request]) -> Request | None:
    """The last in order: the first to make room."""
    return max(requests, key=lambda request: request.order, default=None)
