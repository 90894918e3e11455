"""The KV blocks: who holds how many, which are free, which are idle but still worth keeping.

A block is free (nobody holds it, nothing useful in it), idle (nobody holds it, published in the prefix index,
evicted when needed, least recently used first) or held by one or more sequences. Called by plan and apply.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from shoal.scheduler.prefix import PrefixIndex


class BlockPool:
    """Reference counts of a fixed number of blocks."""

    def __init__(self, num_blocks: int, index: PrefixIndex) -> None:
        self.index = index
        self.reset(num_blocks)

    def reset(self, num_blocks: int) -> None:
        """All blocks are free and empty: the crew that held their contents is gone, or new."""
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: dict[int, None] = {}
        self._holders = [0] * num_blocks
        self.index.clear()

    @property
    def available(self) -> int:
        """Blocks that ``take`` can give."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        """Blocks with at least one holder; a shared one counts once."""
        return self.num_blocks - self.available

    @property
    def idle(self) -> int:
        """Unheld blocks whose contents are still indexed."""
        return len(self._idle)

    def count_idle(self, blocks: Iterable[int]) -> int:
        """How many of ``blocks`` nobody holds."""
        return sum(block in self._idle for block in blocks)

    def take(self, count: int) -> list[int]:
        """``count`` blocks for one new holder. The caller has looked at ``available``."""
        return [self._take_one() for _ in range(count)]

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder of published blocks."""
        for block in blocks:
            self._idle.pop(block, None)
            self._holders[block] += 1

    def give_back(self, blocks: Sequence[int]) -> None:
        """One holder fewer. The end of a prefix is given back first, so that it is evicted first."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._put_away(block)

    def forget(self, blocks: Iterable[int]) -> None:
        """The contents are not to be found again; who holds such a block goes on holding it."""
        for block in blocks:
            self.index.forget(block)
            if block in self._idle:
                del self._idle[block]
                self._free.append(block)

    def discrepancy(self, tables: Iterable[Sequence[int]]) -> str:
        """What is wrong with the books, given every holder's block table; empty when all blocks add up.

        A GPU has hundreds of thousands of blocks: unless something is wrong, only what a table names is looked at one
        by one; the rest takes tens of milliseconds."""
        holders = Counter(block for table in tables for block in table)
        unheld = {*self._free, *self._idle}
        if (
            len(unheld) == len(self._free) + len(self._idle) == self.num_blocks - len(holders)
            and self._holders.count(0) == len(unheld)
            and unheld.isdisjoint(holders)
            and max(unheld, default=-1) < self.num_blocks
            and all(self._holders[block] == count for block, count in holders.items())
            and self.index.has_all(self._idle.keys())
        ):
            return ""
        return self._name_discrepancy(holders)

    def _name_discrepancy(self, holders: Counter[int]) -> str:
        if wrong := [block for block, count in enumerate(self._holders) if count != holders[block]]:
            return f"blocks {wrong[:8]} have other holder counts than the tables that name them"
        unheld = sorted([*self._free, *self._idle])
        if unheld != [block for block, count in enumerate(self._holders) if count == 0]:
            return f"{len(unheld)} blocks are free or idle, {self._holders.count(0)} have no holder"
        stray = [block for block in self._idle if block not in self.index]
        return f"idle blocks {stray[:8]} are not in the prefix index"

    def _take_one(self) -> int:
        block = self._free.pop() if self._free else self._evict()
        self._holders[block] = 1
        return block

    def _evict(self) -> int:
        block = next(iter(self._idle))
        del self._idle[block]
        self.index.forget(block)
        return block

    def _put_away(self, block: int) -> None:
        if block in self.index:
            self._idle[block] = None
        else:
            self._free.append(block)
