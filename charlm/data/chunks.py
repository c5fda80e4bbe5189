"""Ids in, batches out: random chunks to train on, and every target exactly once to evaluate on.

Shape legend: B chunks in a batch, T = block_size.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from charlm.data.permutation import Permutation
from charlm.errors import InputError

# Batches whose random starts are drawn together: one call of the generator serves this many steps.
BATCHES_PER_DRAW = 256
# Chunks of a blend in which each text has its share.
BLOCK = 1024
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


class Places:
    """The places of a text where chunks may begin, numbered from 0.

    Args:
        n_ids: N, the length of the text.
        documents: starts of the documents, in ascending order; a chunk then stays within one. None: chunks may cross.
        every: distance between places. With block_size, chunks share no target.

    Raises:
        InputError: if there is no place.
    """

    def __init__(self, n_ids: int, block_size: int, documents: np.ndarray | None = None, every: int = 1):
        begins = np.zeros(1, np.int64) if documents is None else documents[documents < n_ids]
        lengths = np.diff(begins, append=n_ids)
        self.begins, self.every = begins, every
        numbers = np.maximum(0, (lengths - block_size - 1) // every + 1)
        self.before = numbers.cumsum() - numbers  # places in earlier documents
        self.n = int(numbers.sum())
        if not self.n:
            raise InputError(
                f"no document of the train split is longer than block_size={block_size}: choose a smaller block_size, "
                f"or let chunks hold parts of several documents, cross_documents=True"
            )

    def starts(self, places: np.ndarray) -> np.ndarray:
        """Return where the chunks at the given places begin, of the same shape."""
        if len(self.begins) == 1:
            return self.begins[0] + places * self.every
        document = np.searchsorted(self.before, places, side="right") - 1
        return self.begins[document] + (places - self.before[document]) * self.every


class RandomChunks:
    """Training batches from random places of a text; batch k is a pure function of (seed, rank, k).

    There is no state to save: a run continues at any k, and no two ranks share a stream.

    Args:
        ids: the training split, (N,), any integer type, on the device where batches are wanted.
        batches_per_epoch: in one iteration of Lightning's.
        first: returns the number of the first batch of an iteration; None: continue after the previous iteration.
        order: "random": each chunk begins anywhere, as in the lecture, whatever was drawn before. "epoch": the text is
            cut into chunks of block_size, and all ranks together visit each once before any comes again, in an order
            that differs from epoch to epoch.
        world_size: number of ranks.
        documents: starts of the documents; a chunk then stays within one, and a document of block_size characters or
            less is never seen. None: chunks may cross.
        parts: where each of several texts in `ids` ends; no chunk crosses. None: it is one.
        weights: of the parts: how many chunks come from each, relative to each other; None: as many as they hold. In
            the order of epochs these shares hold in every BLOCK chunks, and each part has epochs of its own.

    Raises:
        InputError: if the split is shorter than block_size + 1, or so is each of its documents.
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
        order: Literal["random", "epoch"] = "random",
        world_size: int = 1,
        documents: np.ndarray | None = None,
        parts: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
    ):
        check_length(ids, block_size, "train")
        self.ids, self.block_size, self.batch_size = ids, block_size, batch_size
        self.seed, self.rank, self.order, self.world_size = seed, rank, order, world_size
        every = 1 if order == "random" else block_size
        ends = [*(parts or [len(ids)])]
        self.offsets, self.parts = [0, *ends[:-1]], []
        for start, end in pairwise([0, *ends]):
            within = None if documents is None else documents[(documents >= start) & (documents < end)] - start
            self.parts.append(Places(end - start, block_size, within, every))
        if weights is not None and len(weights) != len(ends):
            raise InputError(
                f"weights={[*weights]} are {len(weights)}, and the texts are {len(ends)}: give one weight for each"
            )
        shares = np.array(weights or [part.n for part in self.parts], np.float64)
        self.shares = shares / shares.sum()
        self.batches_per_epoch, self.first = batches_per_epoch, first
        self._epochs = 0
        self._draw = -1
        self._starts = torch.empty(0)

    def starts(self, k: int) -> Tensor:
        """Return the starts of the chunks of batch k, (B,)."""
        draw, row = divmod(k, BATCHES_PER_DRAW)
        return self.draw(draw)[row]

    def draw(self, draw: int) -> Tensor:
        """Return the starts of BATCHES_PER_DRAW batches, one batch per row."""
        if draw != self._draw:
            starts = self.anywhere(draw) if self.order == "random" else self.in_turn(draw)
            self._starts = torch.from_numpy(starts).to(self.ids.device)
            self._draw = draw
        return self._starts

    def anywhere(self, draw: int) -> np.ndarray:
        """Return independent starts, uniform over all that leave room for a target, (BATCHES_PER_DRAW, B)."""
        generator = np.random.default_rng([self.seed, self.rank, draw])  # a stream of its own, as `derive_seed`
        size = (BATCHES_PER_DRAW, self.batch_size)
        which = generator.choice(len(self.parts), size, p=self.shares) if len(self.parts) > 1 else np.zeros(size, int)
        starts = np.empty_like(which)
        for i, part in enumerate(self.parts):
            here = which == i
            starts[here] = self.offsets[i] + part.starts(generator.integers(part.n, size=int(here.sum())))
        return starts

    def in_turn(self, draw: int) -> np.ndarray:
        """Return the next starts of the random order of an epoch, (BATCHES_PER_DRAW, B)."""
        k = np.arange(draw * BATCHES_PER_DRAW, (draw + 1) * BATCHES_PER_DRAW)[:, None]
        chunks = (k * self.world_size + self.rank) * self.batch_size + np.arange(self.batch_size)  # of all ranks
        which, chunks = self.share_out(chunks) if len(self.parts) > 1 else (np.zeros_like(chunks), chunks)
        starts = np.empty_like(chunks)
        for i, part in enumerate(self.parts):
            epochs, positions = np.divmod(chunks, part.n)
            for epoch in np.unique(epochs[which == i]).tolist():
                here = (which == i) & (epochs == epoch)
                key = (self.seed, epoch, *([i + 1] if len(self.parts) > 1 else []))
                starts[here] = self.offsets[i] + part.starts(Permutation(part.n, key)(positions[here]))
        return starts

    def share_out(self, chunks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of chunks in the order of all -> the part that each is from, and its number in the order of that."""
        quotas = apportion(self.shares, BLOCK)
        ends = quotas.cumsum()
        blocks, positions = np.divmod(chunks, BLOCK)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            positions[here] = Permutation(BLOCK, (self.seed, block, 0))(positions[here])
        which = np.searchsorted(ends, positions, side="right")
        return which, blocks * quotas[which] + positions - (ends - quotas)[which]

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


def apportion(shares: np.ndarray, seats: int) -> np.ndarray:
    """Divide `seats` by shares that add up to 1, at least one for each: by largest remainders (Hamilton)."""
    exact = shares * (seats - len(shares))
    whole = np.floor(exact).astype(np.int64)
    most = np.argsort(whole - exact, kind="stable")[: seats - len(shares) - int(whole.sum())]
    whole[most] += 1
    return whole + 1


class Windows:
    """Windows of block_size over a split; each of its N - 1 targets is counted exactly once.

    Windows begin every `stride` characters and count their last `stride` targets (the first window counts
    all), so a stride below block_size gives every target at least block_size - stride characters of context.
    The last window ends with the split and counts only what is left: every window has the same shape.

    With several ranks, batch j goes to rank j modulo `world_size`; its content does not depend on how many there
    are, so neither do the losses. Each rank yields equally many batches, the last perhaps with nothing to count,
    because sharded models must step together.

    Args:
        most: number of targets to count at most, in windows that are evenly spaced; None: all.
        sizes: characters and bytes that each token stands for, (V, 2) int64; None: one of each.

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
        most: int | None = None,
        sizes: Tensor | None = None,
    ):
        check_length(ids, block_size, split)
        self.ids, self.block_size, self.stride = ids, block_size, stride or block_size
        if not 1 <= self.stride <= block_size:
            raise InputError(f"stride={stride} is not possible: give 1 to block_size ({block_size})")
        self.batch_size = max(1, tokens_per_batch // block_size)
        self.rank, self.world_size = rank, world_size
        self.n_targets = len(ids) - 1
        self.sizes = sizes
        there = 1 + -(-(self.n_targets - block_size) // self.stride)  # windows over the whole split
        self.whole = most is None or most >= self.n_targets
        if most is None or self.whole:
            self.numbers = torch.arange(there)
        else:
            n = max(1, 1 + (most - block_size) // self.stride)
            self.numbers = torch.arange(n) * there // n
        self.n_windows = len(self.numbers)
        self.n_batches = -(-self.n_windows // self.batch_size)

    def counts(self) -> Tensor:
        """Return the number of targets that each window counts, (n_windows,)."""
        return self.counted(self.numbers)

    @property
    def share(self) -> float:
        """The part of the split's targets that is counted."""
        return 1.0 if self.whole else int(self.counts().sum()) / self.n_targets

    @property
    def partial(self) -> bool:
        """Whether some targets of the split are left out."""
        return self.share < 1

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
        windows = self.numbers[first : first + self.batch_size].to(self.ids.device)
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
