"""Seeds of independent random streams, derived from the seed of a run."""

import numpy as np


def derive_seed(*numbers: int) -> int:
    """Return 64 bits that depend on all `numbers`, such as the seed of a run, a process and a batch.

    By NumPy's SeedSequence (O'Neill 2015, "Developing a seed_seq alternative"): near numbers give independent streams.
    `numpy.random.default_rng([...])` derives its state from a list of numbers in the same way.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
