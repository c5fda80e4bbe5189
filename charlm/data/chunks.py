"""Ids in, batches out: random chunks to train on, and every target exactly once to evaluate on.

Shape legend: B chunks in a batch, T = block_size.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from charlm.errors import InputError

# Batches whose random starts are drawn together: one call of the generator serves this many steps.
BATCHES_PER_DRAW = 256
# Characters that one gather fetches at most: gather small batches together, and keep memory bounded.
TOKENS_PER_GATHER = 16_384
# A target that cross_entropy leaves out; PyTorch's own default for `ignore_index`.
IGNORE = -100


def gather_chunks(ids: Tensor, starts: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """The chunks of `ids` (N,) that begin at `starts` (..., B): inputs and targets, (..., B, T) int64 each.

    `unfold` is a view, so everything is one gather; targets are the inputs one character on.
    """
    chunks = ids.unfold(0, block_size + 1, 1)[starts].long()  # (..., B, T + 1)
    return chunks[..., :-1].contiguous(), chunks[..., 1:].contiguous()


class RandomChunks:
    """Training batches at random places of a text, in epochs; batch k is a pure function of (seed, rank, k).

    There is no state to save: a run continues at any k, and no two ranks share a stream.

    Args:
        ids: the training split, (N,), any integer type, on the device where batches are wanted.
        batches_per_epoch: in one iteration.
        first: returns the number of the first batch of an iteration; None: continue after the previous iteration.

    Raises:
        InputError: if the split is shorter than block_size + 1.
    """

    def __init__(
        self,
        ids: Tensor,
        block_size: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        batches_per_epoch: int = 500,
        first: Callable[[], int] | None = None,
    ):
        check_length(ids, block_size, "train")
        self.ids, self.block_size, self.batch_size = ids, block_size, batch_size
        self.seed, self.rank = seed, rank
        self.batches_per_epoch, self.first = batches_per_epoch, first
        self._epochs = 0
        self._draw = -1
        self._starts = torch.empty(0)

    def starts(self, k: int) -> Tensor:
        """Return the starts of the chunks of batch k, (B,): uniform over all that leave room for a target."""
        draw, row = divmod(k, BATCHES_PER_DRAW)
        return self.draw(draw)[row]

    def draw(self, draw: int) -> Tensor:
        """Return the starts of BATCHES_PER_DRAW batches, one batch per row."""
        if draw != self._draw:
            generator = np.random.default_rng([self.seed, self.rank, draw])  # a stream of its own, as `derive_seed`
            places = len(self.ids) - self.block_size
            drawn = generator.integers(places, size=(BATCHES_PER_DRAW, self.batch_size))
            self._starts = torch.from_numpy(drawn).to(self.ids.device)
            self._draw = draw
        return self._starts

    def batch(self, k: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of batch k, (B, T) each."""
        return gather_chunks(self.ids, self.starts(k), self.block_size)

    def __len__(self) -> int:
        return self.batches_per_epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and targets of each batch, (B, T) each, to the end of the epoch."""
        k = self.first() if self.first else self._epochs * len(self)
        self._epochs += 1
        for xs, ys in self.gathers(k, k + len(self)):
            yield from zip(xs, ys, strict=True)

    def state_dict(self) -> dict[str, int]:
        """Return nothing: `first` gives the position. With this method Lightning resumes within an epoch."""
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """See `state_dict`."""

    def gathers(self, k: int, end: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches k to end - 1, as many at a time as one gather may fetch: (n, B, T) each.

        A gather costs as much as a step of a small model, whether it fetches one batch or a dozen.
        """
        together = max(1, TOKENS_PER_GATHER // (self.batch_size * self.block_size))
        while k < end:
            draw, row = divmod(k, BATCHES_PER_DRAW)
            starts = self.draw(draw)[row : row + min(together, end - k)]  # (n, B)
            yield gather_chunks(self.ids, starts, self.block_size)
            k += len(starts)


class Windows:
    """Windows of block_size over a whole split; each of its N - 1 targets is counted exactly once.

    Windows begin every `stride` characters and count their last `stride` targets (the first window counts
    all), so a stride below block_size gives every target at least block_size - stride characters of context.
    The last window ends with the split and counts only what is left: every window has the same shape.

    With several ranks, batch j goes to rank j modulo `world_size`; its content does not depend on how many there
    are, so neither do the losses. Each rank yields equally many batches, the last perhaps with nothing to count,
    because sharded models must step together.

    Raises:
        InputError: if the split is shorter than block_size + 1.
    """

    def __init__(
        self,
        ids: Tensor,
        block_size: int,
        stride: int | None = None,
        tokens_per_batch: int = 8_192,
        rank: int = 0,
        world_size: int = 1,
        split: str = "val",
    ):
        check_length(ids, block_size, split)
        self.ids, self.block_size, self.stride = ids, block_size, stride or block_size
        if not 1 <= self.stride <= block_size:
            raise InputError(f"stride={stride} is not possible: give 1 to block_size ({block_size})")
        self.batch_size = max(1, tokens_per_batch // block_size)
        self.rank, self.world_size = rank, world_size
        self.n_targets = len(ids) - 1
        self.n_windows = 1 + -(-(self.n_targets - block_size) // self.stride)
        self.n_batches = -(-self.n_windows // self.batch_size)

    def counts(self) -> Tensor:
        """Return the number of targets that each window counts, (n_windows,); their sum is N - 1."""
        return self.counted(torch.arange(self.n_windows))

    def counted(self, windows: Tensor) -> Tensor:
        """Return the number of targets that the given windows count."""
        end = (windows * self.stride + self.block_size).clamp_max(self.n_targets)
        before = ((windows - 1) * self.stride + self.block_size).where(windows > 0, 0)
        return end - before

    def batch(self, j: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of batch j, (B, T) each; IGNORE is where a target does not count.

        Beyond the last batch, the last one again without counted targets.
        """
        first = min(j, self.n_batches - 1) * self.batch_size
        windows = torch.arange(first, min(first + self.batch_size, self.n_windows), device=self.ids.device)
        starts = (windows * self.stride).clamp_max(self.n_targets - self.block_size)
        x, y = gather_chunks(self.ids, starts, self.block_size)
        if self.stride == self.block_size and j < self.n_batches - 1:
            return x, y  # all of it counts
        counted = self.counted(windows) if j < self.n_batches else torch.zeros_like(windows)
        place = torch.arange(self.block_size, device=y.device)
        return x, y.masked_fill(place < (self.block_size - counted)[:, None], IGNORE)

    def __len__(self) -> int:
        return -(-self.n_batches // self.world_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for j in range(len(self)):
            yield self.batch(j * self.world_size + self.rank)


def check_length(ids: Tensor, block_size: int, split: str) -> None:
    if len(ids) < block_size + 1:
        raise InputError(
            f"the {split} split has {len(ids)} characters, and block_size={block_size} needs at least "
            f"{block_size + 1}: choose a smaller block_size, a longer text or other split fractions"
        )
