"""A random order of n things that is computed and not stored: position -> thing, by a keyed bijection.

A Feistel network (Luby and Rackoff 1988) is a bijection of pairs of h-bit numbers whatever its round function is. Where
it leads outside of 0 to n - 1 it is applied again until it leads back ("cycle walking", Black and Rogaway 2002), which
keeps it a bijection. Levanter and Grain order their data in the same way. On few things a network does not choose
evenly among all orders; there the order is a table.
"""

import numpy as np

ROUNDS = 8  # 4 make a pseudorandom permutation of long numbers
TABLE = 2**16  # things whose order is kept as a table


class Permutation:
    """A permutation of 0 to n - 1 that `key` selects.

    Args:
        key: numbers that are not negative; others give another order.
    """

    def __init__(self, n: int, key: tuple[int, ...]):
        generator = np.random.default_rng(key)
        self.n, self.table = n, generator.permutation(n) if n <= TABLE else None
        self.half = np.uint64(max(1, -(-(n - 1).bit_length() // 2)))  # bits; both halves together cover n, at most 4 n
        self.mask = np.uint64((1 << int(self.half)) - 1)
        self.keys = generator.integers(2**64, size=ROUNDS, dtype=np.uint64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Return what stands at the given positions: int64, of any shape, 0 to n - 1 each."""
        if self.table is not None:
            return self.table[positions]
        flat = self.once(positions.astype(np.uint64).ravel())
        while (outside := flat >= self.n).any():
            flat[outside] = self.once(flat[outside])
        return flat.astype(np.int64).reshape(positions.shape)

    def once(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self.half, values & self.mask
        for key in self.keys:
            left, right = right, left ^ (mixed(right ^ key) & self.mask)
        return left << self.half | right


def mixed(values: np.ndarray) -> np.ndarray:
    """Return 64-bit hashes (the finalizer of SplitMix64: Steele, Lea and Flood 2014), equally good in all bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
