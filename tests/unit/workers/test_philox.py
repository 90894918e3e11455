"""Philox-4x32-10 against the known answers that its authors publish with Random123 (kat_vectors)."""

import pytest

from shoal.workers.philox import Words, philox_4x32, uniform

ONES = 0xFFFFFFFF

KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter: Words, key: tuple[int, int], answer: Words) -> None:
    assert philox_4x32(counter, key) == answer


def test_uniform_takes_53_bits_of_the_block() -> None:
    assert uniform(0, 0) == ((0x6627E8D5 >> 5) * 2**26 + (0xE169C58D >> 6)) / 2**53


def test_every_bit_of_seed_and_position_counts() -> None:
    numbers = {uniform(0, 0)}
    numbers |= {uniform(1 << bit, 0) for bit in range(64)}
    numbers |= {uniform(0, 1 << bit) for bit in range(64)}
    assert len(numbers) == 129
    assert all(0 <= number < 1 for number in numbers)


def test_uniform_is_even() -> None:
    numbers = sorted(uniform(99, position) for position in range(2000))
    largest_gap = max(abs(number - (i + 0.5) / 2000) for i, number in enumerate(numbers))
    assert largest_gap < 1.95 / 2000**0.5  # Kolmogorov-Smirnov, one in a thousand
