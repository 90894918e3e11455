"""Which block holds the keys and values of which tokens: an index by chained digests.

A block's digest covers its own tokens and its parent's digest, so one look-up stands for the whole prefix.
The digest is keyed with a secret of this process: nobody can craft two prompts that share a block they should
not. The first block's parent stands for the tenant and the salt, so only requests of one tenant and one salt share.
Called by plan (match, publish), apply (publish, withdraw) and the pool (forget, on eviction). The index dies with
the crew whose memory it describes.
"""

from collections.abc import Set
from hashlib import blake2b

from shoal.scheduler.request import Request

_DIGEST_BYTES = 16


class PrefixIndex:
    """digest ↔ block; a block is published under one digest at most."""

    def __init__(self, block_size: int, key: bytes, enabled: bool = True) -> None:
        self.block_size = block_size
        self.enabled = enabled
        self._key = key
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._digest_of)

    def __contains__(self, block: int) -> bool:
        return block in self._digest_of

    def has_all(self, blocks: Set[int]) -> bool:
        """Whether each of them is published."""
        return blocks <= self._digest_of.keys()

    def match(self, request: Request) -> list[int]:
        """Blocks that hold the longest known prefix; the last token is always left to be computed."""
        blocks: list[int] = []
        if not self.enabled:
            return blocks
        for number in range((request.known - 1) // self.block_size):
            block = self._block_of.get(self._digest_at(request, number))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def publish(self, request: Request) -> None:
        """Offers the request's blocks that are filled by dispatched steps with tokens whose ids are known."""
        if not self.enabled:
            return
        for number in range(request.published, self._filled(request)):
            digest, block = self._digest_at(request, number), request.blocks[number]
            if digest not in self._block_of:
                self._block_of[digest] = block
                self._digest_of[block] = digest
            request.published = number + 1

    def forget(self, block: int) -> None:
        """Withdraws a block, if it is published."""
        digest = self._digest_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]

    def clear(self) -> None:
        """Forgets every block."""
        self._block_of.clear()
        self._digest_of.clear()

    def _filled(self, request: Request) -> int:
        return min(request.planned, request.known) // self.block_size

    def _digest_at(self, request: Request, number: int) -> bytes:
        digests, size = request.digests, self.block_size
        while len(digests) <= number:
            parent = digests[-1] if digests else self._root(request)
            first = len(digests) * size
            digests.append(self._digest(parent + request.tokens[first : first + size].tobytes()))
        return digests[number]

    def _root(self, request: Request) -> bytes:
        tenant = request.tenant.encode()
        return self._digest(len(tenant).to_bytes(4, "little") + tenant + request.cache_salt.encode())

    def _digest(self, data: bytes) -> bytes:
        return blake2b(data, digest_size=_DIGEST_BYTES, key=self._key).digest()
