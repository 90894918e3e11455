"""What every model under comparison can do."""

from collections.abc import Iterator
from typing import Final, Protocol

from torch import Tensor

ROWS: Final = 64
"""At a time: a large vocabulary's logits take a megabyte each."""


class Teacher(Protocol):
    """A model that token ids are put through, whatever it would have said itself."""

    @property
    def name(self) -> str:
        """Program and weights."""
        ...

    @property
    def cache(self) -> str:
        """The number format of keys and values."""
        ...

    def logits(self, ids: list[int]) -> Iterator[Tensor]:
        """One row a token, float32 [up to ``ROWS``, vocabulary]; to be taken to the end, and overwritten after."""
        ...
