"""A rank without a model: takes plans, checks them, answers with tokens that a test can compute by itself.

Its "keys and values" are digests of the tokens up to each position, so it knows whether what a row reads is
what the sequence should find there. It forgives nothing: a plan that contradicts what came before raises
``PlanInvalid``. Where a plan allows guesses it makes some, right and wrong ones, and a wrong one leaves something wrong
in the cache. No socket, no clock; ``fake_worker.py`` gives it a process, the property tests call it directly.
"""

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from shoal.messages import PooledRow, Sampling, ScoredRow, Seat, StepPlan, StepResult, TokenLogprob
from shoal.wire import pack_ids, unpack_ids

_MASK = (1 << 61) - 1
_FIRST = 0x5EED


class PlanInvalid(Exception):
    """A plan that contradicts the plans before it."""


def mix(state: int, value: int) -> int:
    """The digest of a sequence that goes on with ``value``."""
    return (state * 6364136223846793005 + value * 1442695040888963407 + 0x9E3779B97F4A7C15) & _MASK


def digest(tokens: Iterable[int]) -> int:
    """What the cache holds at the last position of ``tokens``."""
    state = _FIRST
    for token in tokens:
        state = mix(state, token)
    return state


def next_token(prefix_digest: int, seed: int, generated: int, vocab: int) -> int:
    """The token after a prefix: a function of all its tokens, the seed and how many were generated before."""
    return (mix(mix(prefix_digest, seed & _MASK), generated) >> 16) % vocab


def reference(
    prompt: list[int], seed: int, max_tokens: int, vocab: int, stop_ids: Iterable[int] = ()
) -> list[int]:
    """The whole answer that a request must get, whatever else happens."""
    stops, answer, state = set(stop_ids), list[int](), digest(prompt)
    while len(answer) < max_tokens and not (answer and answer[-1] in stops):
        answer.append(next_token(state, seed, len(answer), vocab))
        state = mix(state, answer[-1])
    return answer


def prompt_logprob(tokens: list[int]) -> TokenLogprob:
    """Of the last of ``tokens``: a function of all of them."""
    return TokenLogprob(-1.0 - digest(tokens) % 1000 / 1000)


def pooled_vector(tokens: list[int], pooling: str) -> bytes:
    """float32 [4]: a function of all tokens and of the way of pooling."""
    return array("f", [len(tokens), digest(tokens) % 1000, len(pooling), 1.0]).tobytes()


def never(sampling: Sampling, generated: int) -> bool:
    """The plain case of ``FakeRank.is_bad``."""
    return False


@dataclass(slots=True)
class Sequence:
    """Who sits in a slot."""

    epoch: int
    prompt_len: int
    tokens: list[int]
    digests: list[int]
    sampling: Sampling
    prompt_logprobs: int
    pooling: str
    pooled: int = 0
    """Tokens whose states were taken into the mean."""
    blocks: list[int] = field(default_factory=list)
    computed: int = -1
    """-1 until its first row, which may start behind a shared prefix."""
    wrong: int = 0
    """Guesses of its last row that it may have had and that did not come true."""
    reach: int = 0
    """Tokens that its blocks may have been taken for."""

    def append(self, token: int) -> None:
        """A sampled token stays in the slot."""
        self.tokens.append(token)
        self.digests.append(mix(self.digests[-1] if self.digests else _FIRST, token))


@dataclass(frozen=True, slots=True)
class Row:
    """What a plan asks for, and what becomes of its guesses."""

    slot: int
    start: int
    count: int
    blocks: list[int]
    samples: bool
    most_guesses: int
    guesses: int
    right: int


class FakeRank:
    """``step`` is the whole rank."""

    def __init__(
        self, num_blocks: int, block_size: int, vocab: int, is_bad: Callable[[Sampling, int], bool] = never
    ) -> None:
        self._size = block_size
        self._vocab = vocab
        self._is_bad = is_bad
        self._last_step_id: int | None = None
        self._seats: dict[int, Sequence] = {}
        self._last_epochs: dict[int, int] = {}
        self._cache: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]

    def step(self, plan: StepPlan) -> StepResult:
        """Applies a plan. Raises PlanInvalid."""
        _require(self._last_step_id in (None, plan.step_id - 1), f"step {plan.step_id} is out of order")
        self._last_step_id = plan.step_id
        for slot in unpack_ids(plan.leave):
            _require(self._seats.pop(slot, None) is not None, f"slot {slot} leaves and is empty")
        for seat in plan.admit:
            self._admit(seat)
        rows = self._rows(plan)
        for row in rows:
            self._extend(row)
        for row in rows:
            self._read(row.slot, row.start)
        for row in rows:
            self._write(row)
        scored = tuple(each for row in rows if (each := self._score(row.slot, row.start, row.count)))
        pooled = tuple(each for row in rows if (each := self._pool(row.slot, row.start, row.count)))
        return self._result(plan, [row for row in rows if row.samples], scored, pooled)

    def _admit(self, seat: Seat) -> None:
        _require(seat.slot not in self._seats, f"slot {seat.slot} is taken")
        _require(
            seat.epoch > self._last_epochs.get(seat.slot, 0), f"the epoch of slot {seat.slot} did not rise"
        )
        self._last_epochs[seat.slot] = seat.epoch
        prompt = unpack_ids(seat.prompt)
        sequence = Sequence(seat.epoch, len(prompt), [], [], seat.sampling, seat.prompt_logprobs, seat.pooling)
        for token in prompt + unpack_ids(seat.generated):
            sequence.append(token)
        self._seats[seat.slot] = sequence

    def _rows(self, plan: StepPlan) -> "list[Row]":
        slots, starts, counts = unpack_ids(plan.slots), unpack_ids(plan.starts), unpack_ids(plan.counts)
        block_counts, new_blocks = unpack_ids(plan.block_counts), unpack_ids(plan.new_blocks)
        drafts = unpack_ids(plan.drafts or bytes(len(plan.slots)))
        lengths = {len(slots), len(starts), len(counts), len(plan.samples), len(drafts), len(block_counts)}
        _require(
            lengths == {len(set(slots))} and bool(slots), "rows: empty, a slot twice, or arrays that differ"
        )
        _require(sum(block_counts) == len(new_blocks), "block_counts and new_blocks differ")
        rows = []
        for row in zip(slots, starts, counts, plan.samples, drafts, block_counts, strict=True):
            slot, start, count, samples, most, taken = row
            _require(slot in self._seats, f"slot {slot} is empty")
            if start == -1:
                start = len(self._seats[slot].tokens) - 1
            guesses = (7 * plan.step_id + slot) % (most + 1)
            right = (plan.step_id + 3 * slot) % (guesses + 1)
            rows.append(Row(slot, start, count, new_blocks[:taken], bool(samples), most, guesses, right))
            new_blocks = new_blocks[taken:]
        return rows

    def _extend(self, row: "Row") -> None:
        slot, start, count = row.slot, row.start, row.count
        sequence = self._seats[slot]
        shared = sequence.computed < 0 and start % self._size == 0
        _require(
            shared or start == sequence.computed, f"slot {slot}: {start} does not follow {sequence.computed}"
        )
        end = start + count
        _require(count > 0 and end <= len(sequence.tokens), f"slot {slot}: a row past the known tokens")
        _require(
            row.samples == (end == len(sequence.tokens)), f"slot {slot}: samples only after the last token"
        )
        _require(
            not row.most_guesses or (row.samples and count == 1 and not sequence.sampling.allowed_ids),
            f"slot {slot}: nothing can be guessed",
        )
        sequence.blocks += row.blocks
        sequence.reach = max(sequence.reach, end + row.most_guesses + sequence.wrong)
        least, most = (-(-tokens // self._size) for tokens in (end + row.most_guesses, sequence.reach))
        fitting = least <= len(sequence.blocks) <= most
        _require(
            fitting and len(set(sequence.blocks)) == len(sequence.blocks), f"slot {slot}: wrong block table"
        )
        _require(all(0 <= block < len(self._cache) for block in row.blocks), f"slot {slot}: no such block")
        sequence.wrong = row.most_guesses - row.right
        sequence.computed = end + row.right

    def _write(self, row: "Row") -> None:
        slot, start = row.slot, row.start
        sequence = self._seats[slot]
        written = set(sequence.blocks[start // self._size :])
        for other_slot, other in self._seats.items():
            both = other_slot != slot and not written.isdisjoint(other.blocks)
            _require(not both, f"slots {slot} and {other_slot} both have a block that is written")
        for position in range(start, start + row.count + row.guesses):
            block = sequence.blocks[position // self._size]
            known = position < len(sequence.digests)
            self._cache[block][position % self._size] = sequence.digests[position] if known else None

    def _read(self, slot: int, start: int) -> None:
        sequence = self._seats[slot]
        for position in range(start):
            found = self._cache[sequence.blocks[position // self._size]][position % self._size]
            _require(
                found == sequence.digests[position], f"slot {slot}: position {position} is not in the cache"
            )

    def _score(self, slot: int, start: int, count: int) -> ScoredRow | None:
        sequence = self._seats[slot]
        end = min(start + count + 1, sequence.prompt_len)
        if sequence.prompt_logprobs < 0 or end <= start + 1:
            return None
        logprobs = tuple(prompt_logprob(sequence.tokens[: at + 1]) for at in range(start + 1, end))
        return ScoredRow(slot, sequence.epoch, start + 1, logprobs)

    def _pool(self, slot: int, start: int, count: int) -> PooledRow | None:
        sequence = self._seats[slot]
        if not sequence.pooling:
            return None
        _require(sequence.pooling != "mean" or start == sequence.pooled, f"slot {slot}: a mean with a gap")
        sequence.pooled = start + count
        if sequence.pooled < sequence.prompt_len:
            return None
        return PooledRow(slot, sequence.epoch, pooled_vector(sequence.tokens, sequence.pooling))

    def _result(
        self,
        plan: StepPlan,
        rows: "list[Row]",
        scored: tuple[ScoredRow, ...],
        pooled: tuple[PooledRow, ...],
    ) -> StepResult:
        slots = [row.slot for row in rows for _ in range(row.right + 1)]
        sequences = [self._seats[slot] for slot in slots]
        ids = [self._sample(sequence) for sequence in sequences]
        for row in rows:
            self._write_right(row)
        wanted = any(sequence.sampling.logprobs >= 0 for sequence in sequences)
        logprobs = tuple(_logprob(*each) for each in zip(sequences, ids, strict=True)) if wanted else ()
        return StepResult(
            crew_epoch=plan.crew_epoch,
            step_id=plan.step_id,
            slots=pack_ids(slots),
            epochs=pack_ids(sequence.epoch for sequence in sequences),
            ids=pack_ids(ids),
            logprobs=logprobs,
            drafted=sum(row.guesses for row in rows),
            scored=scored,
            pooled=pooled,
        )

    def _write_right(self, row: "Row") -> None:
        """The guesses that were drawn: the cache has them as they are."""
        sequence = self._seats[row.slot]
        for position in range(row.start + 1, row.start + 1 + row.right):
            self._cache[sequence.blocks[position // self._size]][position % self._size] = sequence.digests[
                position
            ]

    def _sample(self, sequence: Sequence) -> int:
        generated = len(sequence.tokens) - sequence.prompt_len
        bad = self._is_bad(sequence.sampling, generated)
        if sequence.pooling:
            return -1 if bad else 0
        token = next_token(sequence.digests[-1], sequence.sampling.seed, generated, self._vocab)
        sequence.append(0 if bad else token)
        return -1 if bad else token


def _logprob(sequence: Sequence, token: int) -> TokenLogprob | None:
    """Falls with the rank; the sampled token is the best."""
    most = sequence.sampling.logprobs
    return TokenLogprob(-0.5, tuple((token + n, -0.5 - n) for n in range(most))) if most >= 0 else None


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise PlanInvalid(otherwise)
