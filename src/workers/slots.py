"""The sequences that live on a rank: their tokens, block tables and sampler states, one slot each.

``SlotTable`` applies a plan's comings, goings and new blocks, and lays out the step's arrays. It trusts nothing:
a plan that contradicts what the slots hold raises ``PlanInvalid``.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from shoal.messages import Seat, StepPlan
from shoal.workers.drafts import MOST_POSITIONS, Drafter, Guess
from shoal.workers.grammar import GrammarThreads
from shoal.workers.inputs import StepInputs
from shoal.workers.readings import PromptReading, ScoredSpan
from shoal.workers.sampler import NOT_KEPT, SamplerRow

Int32s = npt.NDArray[np.int32]
_FREE: Final = -1
_NONE: Final = -1
_LAST: Final = -1
"""As a row's start: its last known token."""


class PlanInvalid(Exception):
    """A plan does not fit what the slots hold: the scheduler and the rank disagree."""


class SlotTable:
    """Arrays over all slots. Rank 0 also keeps each slot's sampler state (``sampling`` is True there)."""

    def __init__(
        self,
        num_slots: int,
        session_len: int,
        num_blocks: int,
        block_size: int,
        vocab_size: int,
        *,
        sampling: bool,
        grammars: GrammarThreads | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        """drafter: None where nothing is guessed, whatever plans allow."""
        most_blocks = -(-session_len // block_size)
        self._block_size = block_size
        self._num_blocks = num_blocks
        self._vocab_size = vocab_size
        self._sampling = sampling
        self._grammars = grammars
        self._drafter = drafter
        self.last_block = 0
        """The highest block that any slot has had."""
        self._tokens: Int32s = np.zeros((num_slots, session_len), np.int32)
        self._known: Int32s = np.zeros(num_slots, np.int32)
        self._tables: Int32s = np.zeros((num_slots, most_blocks), np.int32)
        self._table_lens: Int32s = np.zeros(num_slots, np.int32)
        self._epochs: Int32s = np.full(num_slots, _FREE, np.int32)
        self._unread: Int32s = np.full(num_slots, _NONE, np.int32)
        self._samplers: dict[int, SamplerRow] = {}
        self._readings: dict[int, PromptReading] = {}

    def apply(self, plan: StepPlan) -> "PlannedRows":
        """Seats leave, come and get their new blocks; returns the rows to compute."""
        for slot in _int32s(plan.leave):
            self._leave(int(slot))
        for seat in plan.admit:
            self._admit(seat)
        rows = PlannedRows(plan)
        self._check(rows)
        self._append_blocks(rows, _int32s(plan.block_counts), _int32s(plan.new_blocks))
        self._note_readings(rows)
        if self._drafter is not None and rows.drafts.any():
            self._guess(rows, self._drafter)
        return rows

    def inputs(self, rows: "PlannedRows") -> StepInputs:
        """The arrays of the step, gathered without a loop over rows."""
        states = rows.states
        query_starts, state_starts = _starts(rows.counts), _starts(states)
        row_of = np.repeat(np.arange(len(rows.slots)), rows.counts)
        slot_of = rows.slots[row_of]
        positions = rows.starts[row_of] + np.arange(len(row_of), dtype=np.int32) - query_starts[row_of]
        blocks = self._tables[slot_of, positions // self._block_size].astype(np.int64)
        context_lens = rows.starts + rows.counts
        widest = -(-int(context_lens.max()) // self._block_size)
        return StepInputs(
            token_ids=self._tokens[slot_of, positions].astype(np.int64),
            positions=positions.astype(np.int32),
            cache_slots=blocks * self._block_size + positions % self._block_size,
            query_starts=query_starts,
            context_lens=context_lens.astype(np.int32),
            block_tables=self._tables[rows.slots, :widest],
            state_starts=state_starts,
            state_tokens=_last_of(query_starts[1:], states),
            sample_indices=_last_of(state_starts[1:][rows.draws], rows.guessed[rows.draws] + 1),
        )

    def sources(self, rows: "PlannedRows") -> Int32s:
        """For each token of the step the row of the last step that drew it, where that is not read yet; else -1."""
        unread = self._unread[rows.slots]
        last = np.cumsum(rows.counts) - 1
        is_new = (unread != _NONE) & (rows.starts + rows.counts == self._known[rows.slots])
        sources = np.full(int(rows.counts.sum()), _NONE, np.int32)
        sources[last[is_new]] = unread[is_new]
        return sources

    def spans(self, rows: "PlannedRows") -> list[ScoredSpan]:
        """The prompt tokens whose log-probabilities this step brings."""
        if not rows.readings:
            return []
        begins = _starts(rows.states)
        spans = []
        for row, reading in rows.readings.items():
            slot, start = int(rows.slots[row]), int(rows.starts[row])
            scored = reading.scored(start, int(rows.counts[row]))
            if scored:
                ids = self._tokens[slot, scored.start : scored.stop]
                epoch = int(self._epochs[slot])
                spans.append(ScoredSpan(slot, epoch, scored.start, ids, int(begins[row]), reading.top))
        return spans

    def samplers(self, slots: Int32s) -> list[SamplerRow]:
        """The sampler states of the given slots."""
        return [self._samplers[int(slot)] for slot in slots]

    def epochs(self, slots: Int32s) -> Int32s:
        """The epochs of the given slots."""
        return self._epochs[slots]

    def append(self, rows: "PlannedRows", ids: Int32s) -> tuple[Int32s, Int32s]:
        """Adds what was drawn for each slot, one token and as many more as guesses were right; −1 (no finite logits)
        stands as token 0 until the seat leaves. ids: int32 [S], ``NOT_KEPT`` behind a wrong guess. Returns slots and
        ids without those."""
        slots = rows.slots[rows.draws]
        places = self._known[slots]
        if rows.guesses:
            counts = rows.guessed[rows.draws] + 1
            kept, first = ids != NOT_KEPT, np.cumsum(counts) - counts
            self._learn(rows, np.add.reduceat(kept.astype(np.int32), first) - 1)
            places = np.repeat(places - first, counts) + np.arange(len(ids))
            slots, places, ids = np.repeat(slots, counts)[kept], places[kept], ids[kept]
        if (places >= self._tokens.shape[1]).any():
            raise PlanInvalid("a token was sampled past the session length")
        self._tokens[slots, places] = np.maximum(ids, 0)
        self._known[slots] = places + 1
        self._observe(slots, ids)
        return slots, ids

    def reserve(self, slots: Int32s) -> None:
        """One more token of each slot, the n-th slot's of the n-th row that is drawn; ``settle`` tells which."""
        known = self._known[slots]
        if (known >= self._tokens.shape[1]).any():
            raise PlanInvalid("a token was sampled past the session length")
        self._known[slots] += 1
        self._unread[slots] = np.arange(len(slots), dtype=np.int32)

    def settle(self, slots: Int32s, epochs: Int32s, ids: Int32s) -> None:
        """The tokens that were reserved last; of seats that have left meanwhile, nobody wants to know."""
        is_here = self._epochs[slots] == epochs
        slots, ids = slots[is_here], ids[is_here]
        self._tokens[slots, self._known[slots] - 1] = np.maximum(ids, 0)
        self._unread[slots] = _NONE
        self._observe(slots, ids)

    def _observe(self, slots: Int32s, ids: Int32s) -> None:
        if self._sampling:
            for slot, token_id in zip(slots.tolist(), ids.tolist(), strict=True):
                self._samplers[slot].observe(token_id)

    def _guess(self, rows: "PlannedRows", drafter: Drafter) -> None:
        """Puts guesses behind the last tokens of the rows that may have some, as far as they are worth their while."""
        candidates = np.flatnonzero(rows.drafts).tolist()
        positions, sampled = int(rows.counts.sum()), int(rows.draws.sum())
        if not drafter.may_gain(sampled):
            return
        worth = drafter.worth(sampled, positions)
        room = MOST_POSITIONS - positions
        for left, row in zip(range(len(candidates), 0, -1), candidates, strict=True):
            slot, most = int(rows.slots[row]), min(int(rows.drafts[row]), room // left)
            known = int(self._known[slot])
            if most < 1:
                continue
            guess = drafter.guess(self._tokens[slot, :known], most, worth)
            if count := len(guess.ids):
                self._tokens[slot, known : known + count] = guess.ids
                rows.guesses[row] = guess
                rows.guessed[row] = count
                rows.counts[row] += count
                room -= count

    def _learn(self, rows: "PlannedRows", right: Int32s) -> None:
        """right: of each row that draws, how many of its guesses were."""
        right_of = dict(zip(np.flatnonzero(rows.draws).tolist(), right.tolist(), strict=True))
        for row, guess in rows.guesses.items():
            assert self._drafter is not None
            self._drafter.learn(guess, right_of[row])

    def _leave(self, slot: int) -> None:
        if not 0 <= slot < len(self._epochs) or self._epochs[slot] == _FREE:
            raise PlanInvalid(f"slot {slot} cannot leave: it is not taken")
        self._epochs[slot] = _FREE
        self._unread[slot] = _NONE
        self._samplers.pop(slot, None)
        self._readings.pop(slot, None)

    def _admit(self, seat: Seat) -> None:
        if not 0 <= seat.slot < len(self._epochs) or self._epochs[seat.slot] != _FREE:
            raise PlanInvalid(f"slot {seat.slot} cannot be taken")
        prompt, generated = _int32s(seat.prompt), _int32s(seat.generated)
        known = len(prompt) + len(generated)
        tokens = np.concatenate([prompt, generated])
        if not 0 < known <= self._tokens.shape[1] or tokens.min() < 0 or tokens.max() >= self._vocab_size:
            raise PlanInvalid(f"slot {seat.slot}: {known} tokens do not fit the model")
        self._epochs[seat.slot] = seat.epoch
        self._tokens[seat.slot, :known] = tokens
        self._known[seat.slot] = known
        self._table_lens[seat.slot] = 0
        if PromptReading.wanted(seat):
            self._readings[seat.slot] = PromptReading(seat, len(prompt))
        if self._sampling:
            self._samplers[seat.slot] = SamplerRow(
                seat.sampling, prompt.tolist(), generated.tolist(), self._vocab_size, self._grammars
            )

    def _note_readings(self, rows: "PlannedRows") -> None:
        """Which rows are read for more than tokens; one whose states are pooled draws none."""
        if not self._readings:
            return
        for row, slot in enumerate(rows.slots.tolist()):
            reading = self._readings.get(slot)
            if reading is not None:
                if not reading.follows(int(rows.starts[row])):
                    raise PlanInvalid(f"slot {slot}: a mean needs the state of every token")
                rows.readings[row] = reading
                rows.draws[row] &= not reading.pooling

    def _append_blocks(self, rows: "PlannedRows", block_counts: Int32s, new_blocks: Int32s) -> None:
        if len(block_counts) != len(rows.slots) or block_counts.sum() != len(new_blocks):
            raise PlanInvalid("block_counts and new_blocks do not match")
        if len(new_blocks) and (new_blocks.min() < 0 or new_blocks.max() >= self._num_blocks):
            raise PlanInvalid("a block id is outside the cache")
        if len(new_blocks):
            self.last_block = max(self.last_block, int(new_blocks.max()))
        taken = 0
        for slot, count in zip(rows.slots.tolist(), block_counts.tolist(), strict=True):
            if count:
                length = self._table_lens[slot]
                if length + count > self._tables.shape[1]:
                    raise PlanInvalid(f"slot {slot}: more blocks than a session has")
                self._tables[slot, length : length + count] = new_blocks[taken : taken + count]
                self._table_lens[slot] += count
                taken += count
        ends = rows.starts + rows.counts + rows.drafts
        if (ends > self._table_lens[rows.slots] * self._block_size).any():
            raise PlanInvalid("a row reaches past its block table")

    def _check(self, rows: "PlannedRows") -> None:
        slots = rows.slots
        if len(slots) == 0 or slots.min() < 0 or slots.max() >= len(self._epochs):
            raise PlanInvalid("a plan needs rows of existing slots")
        if (self._epochs[slots] == _FREE).any() or len(set(slots.tolist())) != len(slots):
            raise PlanInvalid("a row names a slot that is free, or one twice")
        rows.starts[rows.starts == _LAST] = self._known[slots[rows.starts == _LAST]] - 1
        ends = rows.starts + rows.counts
        known = self._known[slots]
        if rows.starts.min() < 0 or rows.counts.min() < 1 or (ends > known).any():
            raise PlanInvalid("a row reaches past the known tokens")
        if (rows.samples & (ends != known)).any():
            raise PlanInvalid("a row samples before its last known token")
        if rows.drafts.min() < 0 or (rows.drafts.astype(bool) & ~(rows.samples & (rows.counts == 1))).any():
            raise PlanInvalid("only a row that decodes may have drafts")
        if (known + rows.drafts > self._tokens.shape[1]).any():
            raise PlanInvalid("drafts reach past the session length")


class PlannedRows:
    """The rows of a plan as numpy arrays: slots, starts, counts, drafts (int32 [R]), samples and draws (bool [R]). A
    row that samples draws a token, unless its states are pooled."""

    def __init__(self, plan: StepPlan) -> None:
        self.slots = _int32s(plan.slots)
        self.starts = _int32s(plan.starts)
        self.counts = _int32s(plan.counts)
        self.samples = np.frombuffer(plan.samples, np.uint8).astype(bool)
        self.drafts = _int32s(plan.drafts or bytes(len(plan.slots)))
        """How many tokens may be guessed behind the row's last."""
        arrays = (self.starts, self.counts, self.samples, self.drafts)
        if any(len(array) != len(self.slots) for array in arrays):
            raise PlanInvalid("the row arrays differ in length")
        self.guesses: dict[int, Guess] = {}
        """Of the rows, by number, that have guesses; their tokens are among ``counts``."""
        self.guessed: Int32s = np.zeros(len(self.slots), np.int32)
        self.draws = self.samples.copy()
        self.readings: dict[int, PromptReading] = {}
        """Of the rows, by number, that are read for more than tokens."""

    @property
    def states(self) -> Int32s:
        """Of how many of its last tokens each row's states are wanted, int32 [R]: of all that are read for more than
        tokens, else of those that a token is drawn after."""
        states: Int32s = (self.guessed + 1) * self.draws
        for row in self.readings:
            states[row] = self.counts[row]
        return states


def _starts(counts: Int32s) -> Int32s:
    """Where each row begins, and the last one ends."""
    starts = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    return starts


def _last_of(ends: Int32s, counts: Int32s) -> npt.NDArray[np.int64]:
    """The last ``counts[r]`` numbers before each ``ends[r]``."""
    first: npt.NDArray[np.int64] = np.repeat(ends - np.cumsum(counts), counts)
    return first + np.arange(len(first))


def _int32s(raw: bytes) -> Int32s:
    if len(raw) % 4:
        raise PlanInvalid("an int32 array has a broken length")
    return np.frombuffer(raw, "<i4").astype(np.int32)
