"""Pairs of neighbours, counted in a text of any size: what the count baselines are made of."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from charlm.data.chunks import IGNORE, Windows

BLOCK = 2**18  # ids that are counted at a time: they stay in the cache of the CPU
DENSE = 2**22  # pairs that a table of all of them may have


class Pairs(NamedTuple):
    """The pairs of neighbours that occur in a text, in order, and how often: (n,) int64 each."""

    codes: Tensor  # first * V + second
    counts: Tensor

    @classmethod
    def of(cls, ids: Tensor, vocab_size: int) -> "Pairs":
        """Of ids (N,), any integer type, on the CPU."""
        most = BLOCK if is_dense(vocab_size, len(ids)) else DENSE
        dtype: Any = np.uint16 if vocab_size <= 256 else np.int64  # the narrower is faster

        def codes() -> Iterator[np.ndarray]:
            for start in range(0, len(ids) - 1, most):
                block = ids[start : start + most + 1].numpy().astype(dtype)
                yield block[:-1] * dtype(vocab_size) + block[1:]

        return cls.counted(codes(), vocab_size, len(ids))

    @classmethod
    def of_targets(cls, windows: Windows, vocab_size: int) -> "Pairs":
        """Of the targets that windows count, each with the id before it."""
        codes = ((x * vocab_size + y)[y != IGNORE].cpu().numpy() for x, y in windows)
        return cls.counted(codes, vocab_size, int(windows.counts().sum()))

    @classmethod
    def counted(cls, blocks: Iterable[np.ndarray], vocab_size: int, n: int) -> "Pairs":
        """From about n codes, in blocks."""
        if is_dense(vocab_size, n):
            table = np.zeros(vocab_size**2, np.int64)
            for block in blocks:
                table += np.bincount(block, minlength=len(table))
            codes = table.nonzero()[0]
            counts = table[codes]
        else:  # memory is bounded by the pairs that occur, and not by V squared
            codes, counts = np.empty(0, np.int64), np.empty(0, np.int64)
            for block in blocks:
                found, often = np.unique(block, return_counts=True)
                codes, place = np.unique(np.concatenate((codes, found)), return_inverse=True)
                counts = np.bincount(place, np.concatenate((counts, often)), len(codes)).astype(np.int64)
        return cls(torch.from_numpy(codes), torch.from_numpy(counts))


def is_dense(vocab_size: int, n: int) -> bool:
    """Return whether a table of all pairs is small, also against a text of n ids."""
    return vocab_size**2 <= min(DENSE, n)
