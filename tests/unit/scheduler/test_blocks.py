"""Block pool and prefix index: counts, sharing, eviction order, digests."""

from array import array

import pytest

from shoal.messages import Sampling
from shoal.scheduler.blocks import BlockPool
from shoal.scheduler.prefix import PrefixIndex
from shoal.scheduler.request import Request

SIZE = 4


def make_pool(num_blocks: int = 8, *, enabled: bool = True, key: bytes = b"k") -> BlockPool:
    return BlockPool(num_blocks, PrefixIndex(SIZE, key, enabled))


def request_of(tokens: list[int], **more: str) -> Request:
    raw = array("i", tokens)
    return Request(
        1, 1, "r", 1, raw.tobytes(), raw, len(tokens), Sampling(1), 100, frozenset(), 0, 0, 0, **more
    )


def fill(pool: BlockPool, request: Request) -> None:
    """Takes blocks for all tokens and publishes the full ones, as plan does."""
    request.blocks = pool.take(-(-request.known // SIZE))
    request.planned = request.known
    pool.index.publish(request)


def test_taken_blocks_are_distinct_and_come_back() -> None:
    pool = make_pool()
    first, second = pool.take(3), pool.take(5)
    assert sorted(first + second) == list(range(8))
    assert (pool.available, pool.held) == (0, 8)
    pool.give_back(first)
    assert pool.available == 3
    assert pool.discrepancy([second]) == ""
    assert "holder" in pool.discrepancy([first, second])


def test_a_prefix_is_found_but_for_the_last_token() -> None:
    pool = make_pool()
    owner = request_of(list(range(10)))
    fill(pool, owner)
    assert pool.index.match(request_of(list(range(10)))) == owner.blocks[:2]
    assert pool.index.match(request_of(list(range(8)))) == owner.blocks[:1]
    assert pool.index.match(request_of([0, 1, 2, 3, 4, 5, 6, 99, 8, 9])) == owner.blocks[:1]
    assert pool.index.match(request_of([9, *range(1, 10)])) == []


def test_a_shared_block_is_free_when_its_last_holder_lets_go() -> None:
    pool = make_pool()
    owner = request_of(list(range(9)))
    fill(pool, owner)
    hits = pool.index.match(request_of(list(range(9))))
    pool.share(hits)
    assert pool.held == 3
    pool.give_back(owner.blocks)
    assert (pool.held, pool.idle) == (2, 0)
    pool.give_back(hits)
    assert (pool.held, pool.idle, pool.available) == (0, 2, 8)


def test_idle_blocks_are_evicted_oldest_first_and_the_end_of_a_prefix_before_its_start() -> None:
    pool = make_pool(6)
    old, new = request_of(list(range(9))), request_of(list(range(50, 59)))
    for request in (old, new):
        fill(pool, request)
    pool.give_back(old.blocks)
    pool.give_back(new.blocks)
    pool.take(3)
    assert pool.index.match(request_of(list(range(9)))) == old.blocks[:1]
    pool.take(1)
    assert pool.index.match(request_of(list(range(9)))) == []
    assert pool.index.match(request_of(list(range(50, 59)))) == new.blocks[:2]


def test_use_makes_an_idle_block_young() -> None:
    pool = make_pool(4)
    old, new = request_of(list(range(5))), request_of(list(range(50, 55)))
    for request in (old, new):
        fill(pool, request)
        pool.give_back(request.blocks)
    pool.share(old.blocks[:1])
    pool.give_back(old.blocks[:1])
    pool.take(3)
    assert pool.index.match(request_of(list(range(5)))) == old.blocks[:1]
    assert pool.index.match(request_of(list(range(50, 55)))) == []


def test_only_blocks_of_known_and_dispatched_tokens_are_published() -> None:
    pool = make_pool()
    request = request_of(list(range(7)))
    request.blocks = pool.take(3)
    request.planned = 9
    pool.index.publish(request)
    assert len(pool.index) == 1
    request.tokens.append(7)
    request.planned = 7
    pool.index.publish(request)
    assert len(pool.index) == 1
    request.planned = 8
    pool.index.publish(request)
    assert len(pool.index) == 2


def test_the_same_tokens_are_published_once() -> None:
    pool = make_pool()
    one, two = request_of(list(range(8))), request_of(list(range(8)))
    fill(pool, one)
    fill(pool, two)
    assert len(pool.index) == 2
    pool.give_back(two.blocks)
    assert pool.idle == 0
    assert pool.index.match(request_of(list(range(9)))) == one.blocks


def test_forgotten_contents_are_not_found_and_idle_ones_are_free() -> None:
    pool = make_pool()
    request = request_of(list(range(9)))
    fill(pool, request)
    pool.give_back(request.blocks[2:])
    pool.forget(request.blocks[:2])
    assert pool.index.match(request_of(list(range(9)))) == []
    assert pool.discrepancy([request.blocks[:2]]) == ""
    pool.give_back(request.blocks[:2])
    assert (pool.idle, pool.available) == (0, 8)


def test_key_tenant_and_salt_keep_digests_apart() -> None:
    digests = set()
    for key, tenant, salt in (
        (b"a", "", ""),
        (b"b", "", ""),
        (b"a", "t", ""),
        (b"a", "", "t"),
        (b"a", "t", "t"),
    ):
        pool, request = make_pool(key=key), request_of(list(range(8)), tenant=tenant, cache_salt=salt)
        fill(pool, request)
        digests.update(request.digests)
    assert len(digests) == 10


def test_only_the_same_tenant_with_the_same_salt_finds_a_prefix() -> None:
    pool = make_pool()
    tokens = list(range(9))
    owner = request_of(tokens, tenant="ab", cache_salt="c")
    fill(pool, owner)
    for tenant, salt in (("", ""), ("ab", ""), ("a", "bc"), ("", "abc")):
        assert pool.index.match(request_of(tokens, tenant=tenant, cache_salt=salt)) == []
    assert pool.index.match(request_of(tokens, tenant="ab", cache_salt="c")) == owner.blocks[:2]


def test_switched_off_nothing_is_published_or_found() -> None:
    pool = make_pool(enabled=False)
    request = request_of(list(range(8)))
    fill(pool, request)
    assert len(pool.index) == 0
    assert pool.index.match(request_of(list(range(8)))) == []
    pool.give_back(request.blocks)
    assert (pool.idle, pool.available) == (0, 8)


def test_a_new_crew_starts_empty() -> None:
    pool = make_pool()
    fill(pool, request_of(list(range(8))))
    pool.reset(5)
    assert (pool.num_blocks, pool.available, len(pool.index)) == (5, 5, 0)


@pytest.mark.parametrize("spoil", ["holder", "twice", "outside", "lost", "unpublished"])
def test_what_does_not_add_up_is_told(spoil: str) -> None:
    pool = make_pool()
    mine = pool.take(3)
    assert pool.discrepancy([mine]) == ""
    if spoil == "holder":
        pool._holders[mine[0]] = 2
    elif spoil == "twice":
        pool._free[0] = pool._free[1]
    elif spoil == "outside":
        pool._free[0] = 99
    elif spoil == "lost":
        del pool._free[0]
    else:
        pool._idle[pool._free.pop()] = None
    assert pool.discrepancy([mine]) != ""
