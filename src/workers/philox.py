"""Counter-based random numbers: Philox-4x32 with ten rounds (Salmon, Moraes, Dror, Shaw: Parallel Random
Numbers: As Easy as 1, 2, 3; 2011). A number is a function of its key and counter alone. Called by the sampler."""

_MASK = 0xFFFFFFFF
_ROUNDS = 10

Words = tuple[int, int, int, int]


def philox_4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Four unsigned 32-bit words of a counter of four and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (right >> 32) ^ c1 ^ k0, right & _MASK, (left >> 32) ^ c3 ^ k1, left & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """In [0, 1), a multiple of 2^-53; seed and position are unsigned and up to 64 bits wide."""
    counter = (position & _MASK, position >> 32, 0, 0)
    high, low, _, _ = philox_4x32(counter, (seed & _MASK, seed >> 32))
    return ((high >> 5) * 2**26 + (low >> 6)) / 2**53
