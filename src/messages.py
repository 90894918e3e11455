"""Every struct that crosses a process boundary, and nothing else.

Four directions, one union each, at the end of the file:

* frontend → scheduler: ``FrontendMessage``
* scheduler → frontend: ``GatewayMessage``
* scheduler → rank: ``CrewMessage``
* rank → scheduler: ``RankMessage``

Commands are verbs, facts are past participles. Arrays travel as raw little-endian ``bytes`` and say their
dtype and length in the field's docstring. ``wire.py`` puts the receiver's boot id in front of each message,
so that nothing meant for a dead process is taken by its successor.
"""

from typing import Literal

from msgspec import Struct


class Message(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """Base of everything that is sent as a message of its own."""


class Part(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of what travels inside a message."""


# --- parts -----------------------------------------------------------------------------------------------


class Grammar(Part, frozen=True):
    """What the answer must match. Checked and compiled once by the frontend before it travels."""

    source: str
    """llguidance's serialised grammar (JSON)."""
    after: tuple[int, ...] = ()
    """Ids that end the model's thinking: the grammar holds from the token after them; empty: from the first."""


class ThinkingBudget(Part, frozen=True):
    """How long the model may think before it is made to stop."""

    most_tokens: int
    end: tuple[int, ...]
    """Ids that end the thinking: drawn by force once ``most_tokens`` were generated without them."""


class RepetitionLimit(Part, frozen=True):
    """Ends a sequence whose last tokens repeat one pattern."""

    min_pattern: int
    """Tokens of the shortest pattern looked for, at least 1."""
    max_pattern: int
    min_count: int
    """How often in a row the pattern must stand, at least 2."""


class Sampling(Part, frozen=True):
    """How one sequence's tokens are drawn; complete and checked, no field is left to a default elsewhere."""

    seed: int
    """Unsigned 64 bits; drawn by the frontend where the client set none, so that a replay draws the same."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Over prompt and generated tokens (Keskar et al. 2019, CTRL)."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    """Over generated tokens only, as OpenAI defines both."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, value added to its logit)."""
    logprobs: int = -1
    """-1: none; k ≥ 0: the log-probability of the sampled token and of the k best ones."""
    min_tokens: int = 0
    """Before so many were generated, none of ``held_back`` is drawn."""
    held_back: tuple[int, ...] = ()
    """The ids that would end the sequence."""
    allowed_ids: tuple[int, ...] = ()
    """Where there are any, only these are drawn."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Runs of ids that are never completed."""
    grammar: Grammar | None = None
    thinking: ThinkingBudget | None = None


class TokenLogprob(Part, frozen=True):
    """Log-probabilities at one position, after penalties and bias, before temperature: the model's own view."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability), best first."""


class TokenRun(Part, frozen=True):
    """Tokens of one sequence that became known in one step."""

    request_no: int
    position: int
    """How many generated tokens precede ``ids``: a gap or a repeat shows here."""
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    """Empty, or one for each id."""


class ScoredPrompt(Part, frozen=True):
    """Log-probabilities of prompt tokens that one step brought for one sequence."""

    request_no: int
    position: int
    """Index in the prompt of the first token scored; the first token of a prompt has none, so at least 1."""
    logprobs: tuple[TokenLogprob, ...]


class PooledVector(Part, frozen=True):
    """A sequence's pooled hidden state; sent before its ``Finished``."""

    request_no: int
    vector: bytes
    """float32[hidden], not normalised."""


FinishReason = Literal["stop", "length", "repetition", "aborted", "cancelled", "deadline", "failed"]
"""``aborted``: somebody asked for the end of this request, and gets what there is; ``cancelled``: nobody waits for
it any more, or the server is shutting down."""


Fault = Literal["server", "worker", "request"]
"""Why a request failed: a mistake of ours; workers died whenever they computed it; or it contradicts itself."""


class Finished(Part, frozen=True):
    """The one terminal event of an accepted request."""

    request_no: int
    reason: FinishReason
    stop_id: int | None = None
    """The stop id that ended it; the id itself is the last one of the sequence's tokens."""
    cached_tokens: int = 0
    """Prompt tokens whose keys and values were found in the prefix index at the first admission."""
    detail: str = ""
    """For ``failed``: what happened, fit for the client."""
    fault: Fault = "server"
    queue_us: int = 0
    """From arrival to the first seat."""
    prefill_us: int = 0
    """From the first seat to the first token."""
    decode_us: int = 0
    """From the first token to the last."""


Pooling = Literal["", "mean", "last"]
"""How the hidden states (after the final norm) of a prompt become one vector; empty: none is wanted."""


class Seat(Part, frozen=True):
    """A sequence that takes a slot on the ranks: all they need to know of it until it leaves."""

    slot: int
    epoch: int
    """Rises each time the slot is taken; results name (slot, epoch)."""
    prompt: bytes
    """int32 token ids."""
    generated: bytes
    """int32 token ids sampled before this residence (after a preemption, a crew's death…)."""
    sampling: Sampling
    prompt_logprobs: int = -1
    pooling: Pooling = ""


class Limits(Part, frozen=True):
    """What the frontends check requests against."""

    session_len: int
    """Most tokens of prompt and answer together."""
    num_blocks: int
    block_size: int
    """Tokens a block."""
    instance_num: int
    """Most concurrent sequences."""


class Histogram(Part, frozen=True):
    """Cumulative-free bucket counts; ``counts`` is one longer than ``bounds`` (the last is +Inf)."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


class RankStatus(Part, frozen=True):
    """One rank as the scheduler sees it."""

    rank: int
    pid: int
    phase: str
    """``absent``, ``loading``, ``loaded``, ``warming``, ``ready``, ``resting`` (on its way to sleep) or ``asleep``."""
    done: int = 0
    total: int = 0
    device: str = ""
    """As in ``RankHello``; empty while the rank is absent."""
    level: str = ""


# --- frontend → scheduler --------------------------------------------------------------------------------


class Hello(Message, frozen=True):
    """First message of a frontend (or of the supervisor, which only queries)."""

    protocol: int
    fingerprint: str
    boot_id: int
    """The sender's; it prefixes every answer."""
    pid: int
    role: Literal["frontend", "observer"] = "frontend"


class Submit(Message, frozen=True):
    """One sequence to be continued. n choices of one HTTP request are n submits."""

    request_no: int
    """Unique in the life of the frontend's process."""
    label: str
    """The HTTP request's id, for logs."""
    prompt: bytes
    """int32 token ids, at least one."""
    sampling: Sampling
    max_tokens: int
    """Most new tokens, at least one; prompt + max_tokens ≤ session_len."""
    stop_ids: tuple[int, ...] = ()
    """Sampling one of these ends the sequence (end-of-sequence ids included unless ignored)."""
    generated: bytes = b""
    """int32 ids that the client already has, when an unfinished request is handed to a new scheduler."""
    priority: int = 0
    """Lower runs first."""
    tenant: str = ""
    arrival_ns: int = 0
    """time.time_ns() at the frontend."""
    deadline_ns: int = 0
    """Absolute time.time_ns(); 0 is none."""
    attempt: int = 0
    group: int = 0
    """Equal for all sequences of one HTTP request: the first one's ``request_no``. Quotas count requests by it."""
    prompt_logprobs: int = -1
    """-1: none; k ≥ 0: each prompt token's log-probability and the k best ones; no cached prefix is then used."""
    pooling: Pooling = ""
    """Where set, the prompt's vector is wanted and no token: ends with ``stop`` after the prompt is computed."""
    cache_salt: str = ""
    """Only requests of one tenant and salt share cached prefixes."""
    repetition: RepetitionLimit | None = None


class Cancel(Message, frozen=True):
    """Ends a request wherever it is; idempotent."""

    request_no: int
    cause: Literal["disconnected", "stop_string", "asked"] = "asked"


class Query(Message, frozen=True):
    """Asks for ``Stats``."""

    query_no: int


class Abort(Message, frozen=True):
    """Ends requests of any frontend by the HTTP request's id; answered by ``Aborted``."""

    query_no: int
    label: str
    """Empty: every request that ``tenant`` allows."""
    tenant: str | None = None
    """Only this tenant's requests; None: anybody's."""


class Rest(Message, frozen=True):
    """Puts the model to sleep, or wakes it; answered by ``Stats`` with the state then."""

    query_no: int
    level: int
    """0: awake; 1: the cache's memory is given up; 2: the weights' too."""


class Survey(Message, frozen=True):
    """Asks what is open; answered by ``Surveyed``."""

    query_no: int
    tenant: str | None = None
    """Only this tenant's requests; None: anybody's."""


class Goodbye(Message, frozen=True):
    """The frontend is leaving; what it still has open is cancelled."""


# --- scheduler → frontend --------------------------------------------------------------------------------


class Welcome(Message, frozen=True):
    """Answer to ``Hello``."""

    boot_id: int
    """The scheduler's; it prefixes everything the frontend sends."""
    frontend_no: int


class Refused(Message, frozen=True):
    """Answer to a ``Hello`` of another version."""

    detail: str


class Progress(Message, frozen=True):
    """All that one step brought for one frontend."""

    step_id: int
    runs: tuple[TokenRun, ...] = ()
    finished: tuple[Finished, ...] = ()
    scored: tuple[ScoredPrompt, ...] = ()
    pooled: tuple[PooledVector, ...] = ()


RejectReason = Literal[
    "invalid", "loading", "draining", "asleep", "queue_full", "concurrency", "request_rate", "token_rate"
]


class Rejected(Message, frozen=True):
    """A submit that was not accepted: its terminal event."""

    request_no: int
    code: int
    """HTTP status: 400, 429 or 503."""
    detail: str
    retry_ms: int = 0
    reason: RejectReason = "invalid"


class OpenRequest(Part, frozen=True):
    """One HTTP request that is waiting or running."""

    label: str
    tenant: str
    priority: int
    running: int
    """Sequences that have a slot."""
    waiting: int
    prompt_tokens: int
    generated_tokens: int
    age_ms: int
    """Since its arrival."""


class Surveyed(Message, frozen=True):
    """Answer to ``Survey``."""

    query_no: int
    requests: tuple[OpenRequest, ...]
    """The oldest first."""


class Aborted(Message, frozen=True):
    """Answer to ``Abort``."""

    query_no: int
    requests: int
    """HTTP requests that were ended."""


class Draining(Message, frozen=True):
    """No new submits are accepted; what runs is finished."""


class Availability(Message, frozen=True):
    """Sent after ``Welcome`` and whenever it changes: whether a submit would be served now."""

    ready: bool
    limits: Limits | None = None
    """Known once the crew is up."""
    asleep: int = 0
    """Level of sleep; see ``Rest``."""


class Stats(Message, frozen=True):
    """The scheduler's counters and gauges; the source of /metrics, /ready and the supervisor's progress line."""

    query_no: int
    ready: bool
    draining: bool
    ranks: tuple[RankStatus, ...]
    limits: Limits | None
    stalled_ms: int
    """For how long there has been work and no step has ended; 0 when all is well."""
    asleep: int
    """Level of sleep; see ``Rest``."""
    gauges: dict[str, float]
    counters: dict[str, float]
    """Keys are metric names without prefix; a label stands as ``name{key="value"}``."""
    histograms: dict[str, Histogram]


# --- scheduler → rank ------------------------------------------------------------------------------------


class Load(Message, frozen=True):
    """Answer to ``RankHello``, and again after another rank died: forget every slot, have the weights loaded,
    answer ``Loaded``."""

    boot_id: int
    """The scheduler's."""
    crew_epoch: int


class Allocate(Message, frozen=True):
    """Sent to all ranks once all are loaded: form the process group, allocate the cache, warm up."""

    crew_epoch: int
    num_blocks: int
    rendezvous: str
    """Path of a file that does not exist yet, new for each crew epoch (a file store of torch's)."""


class StepPlan(Message, frozen=True):
    """One step: what leaves, what comes, and which tokens of which slots are computed. Strictly in order.

    ``slots``, ``starts`` and ``counts`` are int32 arrays of one length R, one row a sequence: compute the
    keys and values of tokens [start, start+count) of the slot's sequence. ``samples`` is uint8[R]: 1 where a
    token is sampled after the row's last position. A decode row's token may be the one that the step before
    sampled: ranks keep sampled ids in the slot. Its start is -1, for the last token known there, where the steps before
    may bring more than one.
    """

    crew_epoch: int
    step_id: int
    leave: bytes
    """int32 slots that end their residence before this step."""
    admit: tuple[Seat, ...]
    slots: bytes
    starts: bytes
    counts: bytes
    samples: bytes
    block_counts: bytes
    """int32[R]: how many new block ids each row appends to its block table."""
    new_blocks: bytes
    """int32[sum(block_counts)]."""
    drafts: bytes = b""
    """int32[R], or empty where nothing may be guessed: how many tokens the ranks may guess behind a decode row's token
    and compute with it. All ranks guess the same."""


class GiveUp(Message, frozen=True):
    """The model goes to sleep: forget every slot and free the cache's memory, at level 2 the weights' too; answer
    ``GivenUp``. ``Load`` wakes the rank."""

    crew_epoch: int
    level: int


class Stop(Message, frozen=True):
    """End the process in good order."""


# --- rank → scheduler ------------------------------------------------------------------------------------


class RankHello(Message, frozen=True):
    """First message of a rank, and again whenever it has had no scheduler."""

    protocol: int
    fingerprint: str
    boot_id: int
    rank: int
    pid: int
    device: str
    """``cpu``, or ``cuda`` with the GPU's number and name."""
    level: str
    """Which kernels it takes: a processor's instructions (``avx512_amx``), a GPU's architecture (``sm_90``), or
    ``reference``: torch's."""


class Loading(Message, frozen=True):
    """Progress of a load."""

    phase: str
    done: int
    total: int


class Loaded(Message, frozen=True):
    """The weights are there; the scheduler takes the least block count over the ranks."""

    crew_epoch: int
    num_blocks: int
    """How many KV blocks this rank can hold (DESIGN: KV memory is sized once)."""
    most_drafts: int = 0
    """How many tokens of a sequence it can guess in a step."""


class Ready(Message, frozen=True):
    """The group is formed, the cache allocated, a warm-up step has run."""

    crew_epoch: int
    num_blocks: int
    weight_bytes: int


class ScoredRow(Part, frozen=True):
    """Log-probabilities of prompt tokens, from a row whose seat asks for them."""

    slot: int
    epoch: int
    position: int
    """As in ``ScoredPrompt``."""
    logprobs: tuple[TokenLogprob, ...]


class PooledRow(Part, frozen=True):
    """The vector of a row that completed a prompt whose seat asks for one. Such a row is among the sampled ones
    too, with id 0."""

    slot: int
    epoch: int
    vector: bytes
    """float32[hidden]."""


class GivenUp(Message, frozen=True):
    """Answer to ``GiveUp``."""

    crew_epoch: int


class StepResult(Message, frozen=True):
    """From rank 0, one a plan, in order, also when no row samples."""

    crew_epoch: int
    step_id: int
    slots: bytes
    """int32[S]: the rows that sampled; one whose guesses proved right stands several times, in the tokens' order."""
    epochs: bytes
    """int32[S]."""
    ids: bytes
    """int32[S]; -1 where the logits were not finite, -2 where the request's constraints left no token, -3 where its
    grammar passed a limit."""
    logprobs: tuple[TokenLogprob | None, ...] = ()
    """Empty, or one for each row."""
    compute_us: int = 0
    drafted: int = 0
    """Tokens that were guessed, right or wrong."""
    scored: tuple[ScoredRow, ...] = ()
    pooled: tuple[PooledRow, ...] = ()


class Broken(Message, frozen=True):
    """The rank cannot go on in this crew epoch. After ``peer_lost`` it waits for the next ``Load``; after the
    other kinds it exits."""

    crew_epoch: int
    kind: Literal["load_failed", "peer_lost", "plan_invalid", "compute_failed"]
    detail: str


FrontendMessage = Hello | Submit | Cancel | Query | Abort | Rest | Survey | Goodbye
GatewayMessage = Welcome | Refused | Progress | Rejected | Aborted | Surveyed | Draining | Availability | Stats
CrewMessage = Load | Allocate | StepPlan | GiveUp | Stop
RankMessage = RankHello | Loading | Loaded | Ready | StepResult | GivenUp | Broken

PROTOCOL = 1
